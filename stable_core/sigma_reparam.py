"""σReparam: W_hat = gamma / sigma(W) * W, and its baselines spectral norm and weight norm.

Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (ICML 2023), Section 3.2
and Algorithm 1 (Appendix C): sigma(W) = u^T W v, where u (out,) and v (in,) follow the top singular vectors by power
iteration. v is W^T u / |W^T u|, so that sigma = |W^T u| / |u|, and u alone is kept: any u, an average of several too, gives a
sigma that is near the norm. u advances after each optimizer step (advancing.py), not in the forward pass: evaluation, gradient
accumulation and activation checkpointing leave it alone, `torch.compile` sees a pure function, and a checkpoint written between
two steps resumes bitwise. A weight that changed unannounced is found in the forward pass (watching.py).
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from .advancing import hook_optimizers
from .kernels import Measured, Place, is_dense, why_not
from .kernels import measure as measure_in_kernels
from .layout import HasLayout, Layout
from .originals import Originals
from .power_iteration import Iterate, power_iteration
from .recomputing import remember
from .scale_by_sigma import (
    ScaleBySigma,
    autocast_dtype,
    full_precision,
    is_unit,
    measure,
    scale_plainly,
    scaled,
    top_u,
    wide,
)
from .sharding import Piece, gathered, is_sharded, pieces
from .sigma_layers import sigma_layers
from .targets import FilterFn, Group, Model, check_values, cut, find_groups, join, matrix
from .together import Together
from .watching import LAG, Notice, Watch, can_look, is_real, is_transformed, versions


@dataclass(frozen=True)
class SigmaReparamConfig:
    """Settings of `sigma_reparam`.

    Attributes:
        gamma_init: "one" is the paper's choice for translation, speech and language; "spectral" sets gamma = sigma(W),
            which leaves the function of the model as it is (the paper's choice for vision, and yours for a pretrained one).
        qkv: "separate" has one sigma and gamma per projection, "joint" one over [Wq; Wk; Wv], "qk_joint" one over
            [Wq; Wk] and one for Wv.
        n_power_iterations: power iterations per change of W.
        stop_gradient: treat sigma as a constant in the backward pass.
        kind: "sigma" is σReparam; "spectral" the spectral norm baseline, gamma = 1 and not learned; "weight" torch's
            weight norm, one learned norm per output row.
        kernels: "auto" runs Triton's kernels where they are faster, which is on GPUs of CUDA from compute capability 8.0,
            "torch" never, "triton" raises ValueError in the forward pass where they do not run.
    """

    gamma_init: str = "one"
    qkv: str = "separate"
    n_power_iterations: int = 1
    stop_gradient: bool = False
    kind: str = "sigma"
    kernels: str = "auto"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("gamma_init", ("one", "spectral")),
            ("qkv", ("separate", "joint", "qk_joint")),
            ("kind", ("sigma", "spectral", "weight")),
            ("stop_gradient", (False, True)),
            ("kernels", ("auto", "torch", "triton")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} = {getattr(self, field)!r}: allowed are {', '.join(map(repr, allowed))}")
        if not isinstance(self.n_power_iterations, int) or self.n_power_iterations < 1:
            raise ValueError(f"n_power_iterations = {self.n_power_iterations!r}: allowed are whole numbers from 1")
        if self.kind == "spectral" and self.gamma_init == "spectral":
            raise ValueError("gamma_init = 'spectral': with kind = 'spectral' gamma is fixed at 1, allowed is 'one'")
        for other in fields(self) if self.kind == "weight" else ():
            if other.name != "kind" and getattr(self, other.name) != other.default:
                raise ValueError(f"{other.name} = {getattr(self, other.name)!r}: kind = 'weight' has no such setting")


class SigmaReparam(HasLayout):
    """The parametrization W -> gamma / sigma(W) * W of one weight, or of several that share one sigma.

    The weights, seen as matrices (out, in) and stacked along `out`, are cut into blocks of `rows` outputs; each block has
    its own gamma and sigma. One block is Algorithm 1; three are a packed [Wq; Wk; Wv] with separate sigmas; several
    weights and one block are a joint sigma over separate layers.

    State, all of it in the state dict: gamma (blocks,) and u (out,), which stays in fp32; and beside them its layout.
    """

    u: Tensor
    gamma: Tensor
    before_rest: list[Tensor] | None  # W^T u of each block, before an optimizer's step at a learning rate of 0
    _members: "list[weakref.ref[Originals] | None]"
    _unit: tuple[tuple[int, int], ...] | None
    _taken: tuple[torch.device, torch.dtype] | None
    _placed: tuple[Any, Any]

    def __init__(
        self, group: Group, config: SigmaReparamConfig, shared: "tuple[Notice, Together] | None" = None
    ) -> None:
        super().__init__()
        self.rows, self.transposed, self.config = tuple(group.rows), group.members[0].transposed, config
        self.name, self.member_names = group.members[group.leader].name, group.names
        self.index = group.leader  # which of the weights it is registered on
        self._members = [None] * len(group.members)  # weak links to their Originals: to own them would be a cycle
        self.watch, self.before_rest, self._unit = Watch(), None, None
        self._taken, self._placed = None, (None, None)  # what is known of its weight: to look again takes longer
        self._notice, self.together = shared or (Notice(), Together())
        # (versions, u, sigma) of weights that u does not belong to, while evaluated.
        self._evaluated: tuple[Any, ...] | None = None
        weight, stacked = group.members[0].weight, join([target.matrix for target in group.members])
        fp32: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.register_buffer("u", torch.zeros(stacked.shape[0], **fp32))
        gamma = torch.ones(len(self.rows), **fp32)
        if not weight.is_meta:
            self.u.copy_(top_u(stacked, self.u, self.rows))
            with full_precision(weight):
                sigma = measure(stacked, self.u, gamma, self.rows, is_unit(self.u, self.rows)).s.view(-1)
            self.watch.expect([], sigma)
            if config.gamma_init == "spectral":
                gamma = sigma.clone()  # it learns, and the expectation does not
        gamma = gamma.to(weight.dtype)
        if config.kind == "spectral":
            self.register_buffer("gamma", gamma)
        else:
            self.gamma = nn.Parameter(gamma, requires_grad=weight.requires_grad)
        hook_optimizers()

    # ------------------------------------------------------------------------------------------------ its weights

    def leader(self) -> "SigmaReparam":
        """Where the state is kept."""
        return self

    def layout(self) -> Layout:
        return Layout(self.rows, self.transposed, self.member_names, self.index)

    def attach(self, originals: Originals, index: int | None = None) -> None:
        """Remembers where a weight of its lives: at first, and after a deep copy."""
        self._members[self.index if index is None else index] = weakref.ref(originals)
        if None not in self._members:
            self.watch.rebind(self.originals())

    def members(self) -> tuple[Originals, ...]:
        """Where its weights live."""
        members: tuple[Any, ...] = tuple([link and link() for link in self._members])
        if None in members:
            raise ValueError(f"{self.name}: a layer that shares its sigma is gone; fold or copy the whole attention")
        return members

    def originals(self) -> list[Tensor]:
        """The learned weights W, shaped as their layers have them."""
        return [member.original for member in self.members()]

    def _stacked(self) -> Tensor:
        return join([matrix(gathered(W.detach()), self.transposed) for W in self.originals()])

    # ------------------------------------------------------------------------------------------------ the forward pass

    def forward(self, W: Tensor) -> Tensor:
        # A lone weight is the one given, which in a replica of nn.DataParallel is not the one remembered.
        return self.scaled_weights([W] if len(self._members) == 1 else self.originals())[self.index]

    def scaled_weights(self, originals: list[Tensor]) -> list[Tensor]:
        """W_hat of every weight, shaped as its layer has it."""
        # Under autocast W_hat is rounded here: the layer, which else does it, takes longer, and keeps fp32 for backward.
        dtype = originals[0].dtype
        if dtype == torch.float32:
            dtype = autocast_dtype(originals[0]) or dtype
        if len(originals) == 1 and (originals[0].ndim == 2 or originals[0].is_contiguous()):
            return [self._scaled(originals, originals[0], self.transposed, dtype)]
        W_hat = self._scaled(originals, join([matrix(W, self.transposed) for W in originals]), False, dtype)
        parts = cut(W_hat, [W.shape[self.transposed] for W in originals])
        return [(W.T if self.transposed else W).view_as(W0) for W, W0 in zip(parts, originals, strict=True)]

    def _scaled(self, originals: list[Tensor], W: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
        """W_hat of W, which is the only one of the originals as it is, or all of them stacked."""
        rows, stop_gradient = self.rows, self.config.stop_gradient
        if is_transformed():
            W_hat = scale_plainly(matrix(W, transposed), self.gamma, self.u, rows, stop_gradient)[0].to(dtype)
            return W_hat.T if transposed else W_hat.view_as(W)
        fused, real = self.takes_kernels(W), is_real(W)
        if self.config.kernels == "triton" and not fused and real and (why := why_not(W.device, W.dtype)):
            raise ValueError(f"{self.name}: kernels = 'triton': {why}; or set it to 'auto'")
        looks = real and not is_sharded(W) and self.watch.is_due(originals) and can_look(W)
        found = self._find(originals, W, transposed, fused, looks)
        W_hat = ScaleBySigma.apply(
            W, self.gamma, found, rows, transposed, stop_gradient, dtype, self.together if fused else None
        )
        remember(W_hat, lambda: scaled(W, found.factor, rows, transposed, dtype))
        return W_hat

    def _find(self, originals: list[Tensor], W: Tensor, transposed: bool, fused: bool, looks: bool) -> Measured:
        """What is measured of the weights, with the u that belongs to them.

        With `looks` it is checked whether u does; if not, u is put right, and the weights are measured again.
        """
        u, batch, index = self._u_of(originals), None, 0
        if fused and W is originals[0] and u is self.u:
            batch, index = self.together.take(self, W)
        found = batch.found[index] if batch else self._measure(W, transposed, u, self.gamma, fused)
        if looks:
            sigma, stacked = batch.sigma(index) if batch else found.s.view(-1).tolist(), matrix(W.detach(), transposed)
            while not self._is_right(originals, stacked, u, sigma):
                u = self._u_of(originals)
                found = self._measure(W, transposed, u, self.gamma, fused)
                sigma = found.s.view(-1).tolist()
        return found

    def _u_of(self, originals: list[Tensor]) -> Tensor:
        """u; in evaluation of weights to which u does not belong, such as an average, the one that was found for those."""
        kept = self._evaluated
        return kept[1] if kept is not None and kept[0] == versions(originals) else self.u

    def takes_kernels(self, W: Tensor) -> bool:
        """Whether Triton's kernels do the work."""
        setting = self.config.kernels
        if setting == "torch" or not (W.is_cuda or setting == "triton") or not is_real(W) or is_sharded(W):
            return False
        taken = W.device, W.dtype
        if self._taken != taken:
            if why_not(*taken) or not self.u.device == self.gamma.device == W.device:
                return False
            self._taken = taken
        return True

    def _measure(self, W: Tensor, transposed: bool, u: Tensor, gamma: Tensor, fused: bool) -> Measured:
        stacked, gamma = matrix(W.detach(), transposed), gamma.detach()
        if fused:
            dense = stacked if is_dense(stacked) else stacked.contiguous()
            return measure_in_kernels(dense, u, gamma.float(), self.rows)
        with full_precision(W):
            return measure(stacked, u, gamma, self.rows, self._is_unit(u))

    def _estimate(self, stacked: Tensor, u: Tensor) -> Tensor:
        """sigma = |W^T u| / |u| of each block, (blocks,), bitwise the forward pass's."""
        ones = self.u.new_ones(len(self.rows))  # gamma may be sharded
        return self._measure(stacked, False, u, ones, self.takes_kernels(stacked)).s.view(-1)

    def _is_unit(self, u: Tensor) -> bool:
        """Whether each |u| is known to be 1 (to 1e-5, whoever made it); only where asking waits for no device."""
        if not u.is_cpu or torch.compiler.is_compiling():
            return False
        if self.training and self._unit == versions([u]):
            return True
        if not can_look(u):
            return False
        found = is_unit(u, self.rows)
        self._unit = versions([u]) if found else None
        return found

    def advanced(self, weights: list[Tensor], at_least: Tensor) -> None:
        """u was brought to length 1 by power iteration, which found sigma (blocks,) to be `at_least` so much."""
        self._unit = versions([self.u])
        self.watch.expect(weights, at_least, slack=LAG)

    def lone_weight(self) -> Tensor | None:
        """Its weight, if it has no more than one."""
        link = self._members[0]
        member = None if link is None else link()
        return member.original if member is not None and len(self._members) == 1 else None

    def place(self, W: Tensor) -> tuple[Place, int, int, int]:
        """Where its lone weight, which is contiguous, and its state lie; and how often torch saw W, u and gamma written to."""
        u, gamma = self.u, self.gamma
        key = W.data_ptr(), W.shape, u.data_ptr(), gamma.data_ptr()
        if self._placed[0] != key:
            out = W.shape[self.transposed]
            shape = out, W.numel() // out
            self._placed = (
                key,
                Place(key[0], shape, (1, out) if self.transposed else (shape[1], 1), self.rows, *key[2:]),
            )
        return self._placed[1], W._version, u._version, gamma._version

    # ------------------------------------------------------------------------------------------------ u and its weights

    def iterates(self) -> "tuple[list[Iterate], dist.ProcessGroup | None]":
        """What `power_iteration` advances, an iterate per block, and the process group over which W is cut up, if any."""
        originals = self.originals()
        if any(map(is_sharded, originals)) or len(originals) > 1:
            parts, group = pieces(originals, self.transposed)
        else:
            parts, group = [Piece(matrix(originals[0].detach(), self.transposed))], None
        width = originals[0].shape[0] if self.transposed else originals[0].numel() // originals[0].shape[0]
        if len(self.rows) == 1:
            return [Iterate(parts, self.u, width)], group
        iterates, start = [], 0
        for u, size in zip(self.u.split(self.rows), self.rows, strict=True):
            inside = (piece.of_block(start, size) for piece in parts)
            iterates.append(Iterate([piece for piece in inside if piece is not None], u, width))
            start += size
        return iterates, group

    def sigma(self) -> Tensor:
        """The estimate |W^T u| / |u| of each block's spectral norm, shape (blocks,), without gradient."""
        stacked = self._stacked()
        return self._estimate(stacked, self.u).to(wide(stacked).dtype)

    def true_sigma(self) -> Tensor:
        """Each block's spectral norm to 1e-3, shape (blocks,), without gradient and without touching u."""
        stacked = self._stacked()
        return self._estimate(stacked, top_u(stacked, self.u, self.rows)).to(wide(stacked).dtype)

    def converge(self) -> None:
        """Finds u of the present weights."""
        stacked = self._stacked()
        with torch.no_grad():
            self.u.copy_(top_u(stacked, self.u, self.rows))
        self.watch.expect(self.originals(), self._estimate(stacked, self.u))

    @torch.no_grad()
    def reset(self) -> None:
        """u and gamma as they start, for weights that were drawn or loaded after `sigma_reparam`."""
        self.converge()
        self.gamma.copy_(self.sigma() if self.config.gamma_init == "spectral" else torch.ones_like(self.gamma))

    @torch.no_grad()
    def right_inverse(self, W_hat: Tensor) -> Tensor:
        """`layer.weight = W_hat`: the W, with u and gamma set, whose effective weight is W_hat.

        Raises:
            ValueError: gamma is not learned (kind = "spectral"), and the norm of W_hat is not 1.
        """
        return self.take(W_hat, self.index)

    @torch.no_grad()
    def take(self, W_hat: Tensor, index: int) -> Tensor:
        """W of the weight `index` so that its effective weight is W_hat, and those of the others are what they were."""
        if self._members[index] is None:  # it is being registered
            return W_hat
        originals = self.originals()
        if is_sharded(originals[0]):
            raise ValueError(f"{self.name}: its weight is sharded; assign to it before fully_shard")
        ratio = self.gamma.to(self.u.dtype) / self.sigma()
        # Weights that share a sigma have one ratio of W_hat to W, which stays. A weight with sigmas of its own becomes W_hat.
        W = W_hat.clone() if len(originals) == 1 else (W_hat / ratio).to(W_hat.dtype)
        stacked = join([matrix(W if i == index else other, self.transposed) for i, other in enumerate(originals)])
        u = top_u(stacked, self.u, self.rows)
        sigma = self._estimate(stacked, u).to(self.u.dtype)
        gamma = sigma if len(originals) == 1 else sigma * ratio
        if self.config.kind == "spectral":
            if not torch.allclose(gamma, torch.ones_like(gamma), atol=2e-3):
                norms = ", ".join(f"{x:.4g}" for x in gamma.tolist())
                raise ValueError(f"{self.name}: a weight of norm {norms}; with kind = 'spectral' allowed is 1")
        else:
            self.gamma.copy_(gamma)
        self.u.copy_(u)
        self.watch.forget()
        return W

    @torch.no_grad()
    def _is_right(self, originals: list[Tensor], stacked: Tensor, u: Tensor, sigma: list[float]) -> bool:
        """Whether `u`, with which a forward pass found `sigma`, belongs to the weights; where not, u is put right."""
        if u is not self.u and (kept := self._evaluated) is not None:
            right = kept[2] in (None, sigma)
            self._evaluated = (*kept[:2], sigma) if right else None
            return right
        watch, changed = self.watch, self.watch.moved(originals) or self.watch.announced
        averaged = not (watch.exact or self.training or is_unit(u, self.rows))
        agrees = watch.agrees(sigma, changed, stacked.dtype)
        if (agrees and not averaged) or not all(0 < x < math.inf for x in sigma):
            watch.expect(originals, sigma)
            return True  # also of NaN, inf and zeros, which have no u: the loss shows them
        if not self.training:  # an average, or other weights for a while: u stays as it is for training
            self._evaluated = versions(originals), top_u(stacked, u, self.rows), None
            return False
        if not changed:
            self._notice.warn(self.name)
        u.copy_(join([x / torch.linalg.vector_norm(x) for x in cut(u, self.rows)]))
        blocks = zip(cut(stacked, self.rows), cut(u, self.rows), strict=True)
        iterates = [Iterate([Piece(W)], x, W.shape[1]) for W, x in blocks]
        before, after = power_iteration(iterates, self.config.n_power_iterations)
        if (after > 1.1 * before).any():  # more than a step changes
            u.copy_(top_u(stacked, u, self.rows))
        watch.expect(originals, None)
        return False

    def train(self, mode: bool = True) -> "SigmaReparam":
        if self.training and not mode:
            self._settle()
        super().train(mode)
        self._evaluated = None
        self.watch.look_soon()
        return self

    def _settle(self) -> None:
        """Before evaluation, which may swap in other weights: the exact sigma, by which these are known when they are back."""
        if None in self._members or self.u.is_meta or is_sharded(self.originals()[0]) or torch.compiler.is_compiling():
            return
        originals = self.originals()
        if not self.watch.exact and not self.watch.announced and not self.watch.moved(originals):
            sigma = self._estimate(self._stacked(), self.u).tolist()
            if self.watch.agrees(sigma, False, originals[0].dtype) and is_unit(self.u, self.rows):
                self.watch.expect(originals, sigma)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmaReparam":
        # .half() and .bfloat16() must not round the state: it follows the model's device, not its dtype.
        before = self.u
        super()._apply(fn, recurse)
        self.u = self.u.float() if before.is_meta else before.to(self.u.device)
        self.watch.forget()
        self._evaluated = self._taken = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}v", None)  # of checkpoints that kept v beside u
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.u = self.u.float()
        self.watch.forget()
        if None not in self._members:
            self.watch.rebind(self.originals())
        if self.u.is_meta:
            return
        # An average of checkpoints has an average of u; a checkpoint without u leaves that of other weights.
        if f"{prefix}u" not in state_dict or not is_unit(self.u, self.rows):
            self.converge()

    def __getstate__(self) -> dict[str, Any]:
        # Links to weights are not copied; each weight's Originals attach themselves again.
        return {**self.__dict__, "_members": [None] * len(self._members)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        hook_optimizers()

    def extra_repr(self) -> str:
        return f"rows={list(self.rows)}, {self.config}"


class JointMember(HasLayout):
    """The parametrization of a weight whose sigma is kept with another weight of its group."""

    def __init__(self, leader: SigmaReparam, index: int, name: str) -> None:
        super().__init__()
        self._leader, self._index, self.name = (leader,), index, name

    def leader(self) -> SigmaReparam:
        """Where the state is kept."""
        return self._leader[0]

    def layout(self) -> Layout:
        return replace(self.leader().layout(), index=self._index)

    def attach(self, originals: Originals) -> None:
        self.leader().attach(originals, self._index)

    def members(self) -> tuple[Originals, ...]:
        return self.leader().members()

    def forward(self, W: Tensor) -> Tensor:
        return self.leader().scaled_weights(self.leader().originals())[self._index]

    def right_inverse(self, W_hat: Tensor) -> Tensor:
        return self.leader().take(W_hat, self._index)


def sigma_reparam(model: Model, config: SigmaReparamConfig | None = None, filter_fn: FilterFn | None = None) -> Model:
    """Reparametrises weights of `model` in place and returns it: W_hat = gamma / sigma(W) * W.

    It takes Linear, Conv1d and Conv2d layers, transformers' Conv1D, and the projections of nn.MultiheadAttention. Weights
    keep the values they have, so initialise the model, or load a pretrained one, before. Optimizers built before do not
    know the new gammas: build them after.

    Args:
        model: any module; it is changed.
        config: `SigmaReparamConfig()` if left out.
        filter_fn: `filter_fn(module, fully_qualified_name) -> bool` picks the layers; by default all of them, except those
            whose weight is tied to another layer (an output projection that shares the embedding).

    Raises:
        ValueError: nothing to reparametrise; a layer that already is, whose weight is tied, zero, NaN or inf; a qkv setting
            that does not fit the model; a config of another type, or a filter_fn that cannot be called so. The model is then
            as it was.
    """
    # By what it has: where a model brings its own source, transformers loads this module, and so its classes, more than once.
    if config is not None and not hasattr(config, "gamma_init"):
        raise ValueError(f"config = {config!r}: allowed are None and a SigmaReparamConfig")
    config = config or SigmaReparamConfig()
    groups = find_groups(model, filter_fn, config.qkv)
    for group in groups:
        check_values(group, every_row=config.kind == "weight")
    if config.kind == "weight":
        for target in (target for group in groups for target in group.members):
            weight_norm(target.module, target.tensor_name, dim=1 if target.transposed else 0)
            target.module.register_load_state_dict_pre_hook(refuse_plain_weight)
        return model
    shared = Notice(), Together()
    for group, leader in [(group, SigmaReparam(group, config, shared)) for group in groups]:
        for index, target in enumerate(group.members):
            parametrization = leader if index == group.leader else JointMember(leader, index, target.name)
            parametrize.register_parametrization(target.module, target.tensor_name, parametrization, unsafe=True)
            target.module.register_load_state_dict_pre_hook(refuse_plain_weight)
        for target in group.members:
            layer: Any = target.module
            Originals.take_over(layer.parametrizations[target.tensor_name])
            # Its class is its own, from torch; this is what parallelize_module asks a layer before it cuts its weights.
            type(layer)._distribute_module_applied = property(_refuse_tensor_parallelism)
            type(layer).register_parameter = _refuse_pruning
    return model


def _refuse_pruning(layer: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """`register_parameter`, by which torch.nn.utils.prune would put a mask on W_hat as it is now."""
    if name.removesuffix("_orig") in getattr(layer, "parametrizations", ()):
        raise ValueError(
            f"{type(layer).__name__}: a weight under σReparam cannot be pruned; stable_core.fold(model) first"
        )
    nn.Module.register_parameter(layer, name, param)


def _refuse_tensor_parallelism(layer: nn.Module) -> NoReturn:
    raise ValueError(
        f"{type(layer).__name__}: tensor parallelism cuts a weight whose norm σReparam needs whole; "
        "shard with FSDP2 (fully_shard), or leave this layer out of the plan"
    )


def refuse_plain_weight(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A load hook of reparametrised layers: one line, also with strict=False, which would leave the weight out in silence."""
    for name in getattr(layer, "parametrizations", ()):  # torch's remove_parametrizations leaves this hook
        if f"{prefix}{name}" in state_dict:
            raise ValueError(
                f"{prefix}{name}: the state dict holds a plain weight; load it into the plain model, then call sigma_reparam"
            )


def converge(model: Model) -> Model:
    """Finds u of every σReparam layer afresh, for weights that no optimizer made, and returns the model.

    Call it on an exponential moving average before it goes on training: averaging u, or W alone, leaves it no singular vector
    of the averaged W. Evaluation, and loading an averaged state dict, do it by themselves.

    Raises:
        ValueError: a weight holds NaN or inf, which have no singular vectors.
    """
    for name, parametrization in sigma_layers(model):
        try:
            parametrization.converge()
        except torch.linalg.LinAlgError:
            raise ValueError(f"{name}: it holds NaN or inf; go back to a sound checkpoint") from None
    return model
