"""σReparam: W_hat = gamma / sigma(W) * W, and its baselines spectral norm and weight norm.

Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (ICML 2023), Section 3.2
and Algorithm 1 (Appendix C): sigma(W) = u^T W v, where power iteration brings u (out,) and v (in,) to the top singular vectors.
Only u is stored: v = W^T u / |W^T u|, so that sigma = |W^T u| / |u|, which an average of several u still estimates well.

u advances after each optimizer step (advancing.py), not in the forward pass. So evaluation, gradient accumulation and
activation checkpointing do not change it, `torch.compile` sees a pure function, and a checkpoint written between two steps
resumes bitwise. A weight that changes without a step is detected in the forward pass (watching.py).
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
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
from .watching import (
    AWAITS,
    IDLE,
    LAG,
    NEGATIVE,
    PROVES,
    REPLACED,
    UNANNOUNCED,
    Notice,
    Watch,
    can_look,
    is_real,
    is_transformed,
    unwrapped,
    versions,
)


@dataclass(frozen=True)
class SigmaReparamConfig:
    """Settings of `sigma_reparam`.

    Attributes:
        gamma_init: "spectral" sets gamma = sigma(W), so that the model computes the same function as before: the paper's
            choice for vision, and right for a pretrained model. "one" is its choice for translation, speech and language.
            With kind = "spectral" gamma is 1 in any case.
        qkv: "separate" has one sigma and gamma per projection, "joint" one over [Wq; Wk; Wv], "qk_joint" one over
            [Wq; Wk] and one for Wv.
        n_power_iterations: power iterations after each optimizer step, from 1.
        stop_gradient: treat sigma as a constant in the backward pass.
        kind: "sigma" is σReparam; "spectral" the spectral norm baseline, gamma = 1 and not learned; "weight" torch's
            weight norm, one learned norm per output row.
        kernels: "auto" runs Triton kernels on CUDA GPUs from compute capability 8.0, where they are faster; "torch" never
            does; "triton" raises ValueError in the forward pass where they cannot run.

    Raises:
        ValueError: a value that is not allowed, or a setting that `kind` does not have.
    """

    gamma_init: str = "spectral"
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
        for other in fields(self) if self.kind == "weight" else ():
            if other.name != "kind" and getattr(self, other.name) != other.default:
                raise ValueError(f"{other.name} = {getattr(self, other.name)!r}: kind = 'weight' has no such setting")

    @property
    def keeps_function(self) -> bool:
        """Whether gamma starts at sigma(W), so that a model computes what it did before."""
        return self.kind == "sigma" and self.gamma_init == "spectral"


class SigmaReparam(HasLayout):
    """The parametrization W -> gamma / sigma(W) * W of one weight, or of several that share one sigma.

    The weights, seen as matrices (out, in) and stacked along `out`, are cut into blocks of `rows` outputs; each block has
    its own gamma and sigma. One block is Algorithm 1; three are a packed [Wq; Wk; Wv] with separate sigmas; several
    weights and one block are a joint sigma over separate layers.

    The state dict holds gamma (blocks,), u (out,), which stays in fp32, and the layout (layout.py).
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
        self.index = group.leader  # index of the weight that this module is registered on
        self._members = [None] * len(group.members)  # weak references to their Originals, which own this module
        self.watch, self.before_rest, self._unit = Watch(), None, None
        self.unproven = PROVES  # updates left, until an optimizer must have held gamma; 0 where one has
        self._u_at_look: tuple[tuple[int, int], ...] | None = None
        self._taken, self._placed = None, (None, None)  # cached answers of `takes_kernels` and `place`
        self._notice, self.together = shared or (Notice(), Together())
        # (versions, u, sigma) of other weights that are evaluated, such as an average, to which self.u does not belong.
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
            if config.keeps_function:
                gamma = sigma.clone()  # a copy: gamma is trained, the sigma that `watch` expects is not
        gamma = gamma.to(weight.dtype)
        if config.kind == "spectral":
            self.register_buffer("gamma", gamma)
        else:
            self.gamma = nn.Parameter(gamma, requires_grad=weight.requires_grad)
        hook_optimizers()

    # ------------------------------------------------------------------------------------------------ its weights

    def leader(self) -> "SigmaReparam":
        """The SigmaReparam that holds u and gamma: this one. A JointMember returns another."""
        return self

    def layout(self) -> Layout:
        return Layout(self.rows, self.transposed, self.member_names, self.index)

    def attach(self, originals: Originals, index: int | None = None) -> None:
        """Links the Originals of weight `index` to this module, when it is registered and after a deep copy."""
        self._members[self.index if index is None else index] = weakref.ref(originals)
        if None not in self._members:
            self.watch.rebind(self.originals())

    def members(self) -> tuple[Originals, ...]:
        """The Originals of its weights. Raises ValueError where one was deleted or copied without the others."""
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
        # A weight by itself is taken from the argument: in a replica of nn.DataParallel it is not the one linked here.
        return self.scaled_weights([W] if len(self._members) == 1 else self.originals())[self.index]

    def scaled_weights(self, originals: list[Tensor]) -> list[Tensor]:
        """W_hat of every weight, shaped as its layer has it."""
        # Under autocast W_hat is made in low precision: a cast by the layer takes longer, and keeps an fp32 W_hat for backward.
        dtype = originals[0].dtype
        if dtype == torch.float32:
            dtype = autocast_dtype(originals[0]) or dtype
        if len(originals) == 1 and (originals[0].ndim == 2 or originals[0].is_contiguous()):
            return [self._scaled(originals, originals[0], self.transposed, dtype)]
        if len(originals) > 1:
            self._refuse_zero_3()
        W_hat = self._scaled(originals, join([matrix(W, self.transposed) for W in originals]), False, dtype)
        parts = cut(W_hat, [W.shape[self.transposed] for W in originals])
        return [(W.T if self.transposed else W).view_as(W0) for W, W0 in zip(parts, originals, strict=True)]

    def _scaled(self, originals: list[Tensor], W: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
        """W_hat of W, which is the only original in its own shape, or all originals stacked as (out, in)."""
        rows, stop_gradient = self.rows, self.config.stop_gradient
        if is_transformed():
            if self.training and not torch.compiler.is_compiling() and (plain := unwrapped(W)) is not None:
                with temporarily_clear_interpreter_stack():
                    self._look_at_others(matrix(plain, transposed))
            W_hat = scale_plainly(matrix(W, transposed), self.gamma, self.u, rows, stop_gradient)[0].to(dtype)
            return W_hat.T if transposed else W_hat.view_as(W)
        fused, real = self.takes_kernels(W), is_real(W)
        if self.config.kernels == "triton" and not fused and real and (why := why_not(W.device, W.dtype)):
            raise ValueError(f"{self.name}: kernels = 'triton': {why}; or set it to 'auto'")
        looks = real and not is_sharded(W)
        if looks and self.watch.replaces(originals):
            self._look_at_others(matrix(W.detach(), transposed))
            looks = False
        looks = looks and self.watch.is_due(originals) and can_look(W)
        found = self._find(originals, W, transposed, fused, looks)
        W_hat = ScaleBySigma.apply(
            W, self.gamma, found, rows, transposed, stop_gradient, dtype, self.together if fused else None
        )
        remember(W_hat, lambda: scaled(W, found.factor, rows, transposed, dtype))
        return W_hat

    def _find(self, originals: list[Tensor], W: Tensor, transposed: bool, fused: bool, looks: bool) -> Measured:
        """sigma and what else `measure` finds of the weights.

        With `looks` it checks that u belongs to these weights; if not, u is corrected and the weights are measured again.
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
        """The u to use: self.u, or the one found for other weights, such as an average, that are being evaluated."""
        kept = self._evaluated
        return kept[1] if kept is not None and kept[0] == versions(originals) else self.u

    def takes_kernels(self, W: Tensor) -> bool:
        """Whether W is scaled by the Triton kernels."""
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
        """sigma = |W^T u| / |u| of each block, (blocks,), bitwise as in the forward pass."""
        ones = self.u.new_ones(len(self.rows))  # for gamma, which may be sharded and is not needed
        return self._measure(stacked, False, u, ones, self.takes_kernels(stacked)).s.view(-1)

    def _is_unit(self, u: Tensor) -> bool:
        """Whether each |u| is known to be 1 (to 1e-5). False under a compiler and on a GPU, which reading u would wait for."""
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
        """Notes that power iteration has advanced u, to length 1, and found the lower bound `at_least` of sigma (blocks,)."""
        self._unit = versions([self.u])
        self.watch.expect(weights, at_least, slack=LAG)

    def prove_gamma(self, held: bool) -> None:
        """After each of the first updates: warns of a gamma that W's optimizer does not hold, and that no other has held."""
        if held or not self.gamma.requires_grad:
            self.unproven = 0
            return
        if self.unproven == PROVES:
            setattr(self.gamma, AWAITS, True)
        self.unproven -= 1
        if not self.unproven and hasattr(self.gamma, AWAITS):
            self._notice.warn(self.name, IDLE)

    def lone_weight(self) -> Tensor | None:
        """Its weight if it has only one, else None."""
        link = self._members[0]
        member = None if link is None else link()
        return member.original if member is not None and len(self._members) == 1 else None

    def place(self, W: Tensor) -> tuple[Place, int, int, int]:
        """(Place of W, u and gamma in memory, their version counters), for a W that is contiguous and its only weight."""
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
        """An Iterate for each block, for `power_iteration`, and the process group that W is sharded over, or None."""
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
        """Sets u to the top left singular vectors of the weights as they are now."""
        stacked = self._stacked()
        with torch.no_grad():
            self.u.copy_(top_u(stacked, self.u, self.rows))
        self.watch.expect(self.originals(), self._estimate(stacked, self.u))

    @torch.no_grad()
    def reset(self) -> None:
        """Sets u and gamma as `sigma_reparam` does, for weights that were drawn or loaded after it."""
        self.converge()
        self.gamma.copy_(self.sigma() if self.config.keeps_function else torch.ones_like(self.gamma))

    @torch.no_grad()
    def right_inverse(self, W_hat: Tensor) -> Tensor:
        """What `layer.weight = W_hat` calls: sets u and gamma, and returns the W whose effective weight is W_hat.

        Raises:
            ValueError: the norm of W_hat is not 1 where kind = "spectral", or the weight is sharded.
        """
        return self.take(W_hat, self.index)

    @torch.no_grad()
    def take(self, W_hat: Tensor, index: int) -> Tensor:
        """`right_inverse` for the weight `index`; the effective weights of those that share its sigma do not change."""
        if self._members[index] is None:  # torch calls this while the parametrization is being registered
            return W_hat
        originals = self.originals()
        if is_sharded(originals[0]):
            raise ValueError(f"{self.name}: its weight is sharded; assign to it before fully_shard")
        ratio = self.gamma.to(self.u.dtype) / self.sigma()
        # Weights that share a sigma keep their ratio gamma / sigma of W_hat to W. A weight by itself becomes W_hat.
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
        """Whether `sigma`, found with `u`, is as expected of these weights. If not, u is corrected and False returned."""
        if u is not self.u and (kept := self._evaluated) is not None:
            right = kept[2] in (None, sigma)
            self._evaluated = (*kept[:2], sigma) if right else None
            return right
        watch, changed = self.watch, self.watch.moved(originals) or self.watch.announced
        averaged = not (watch.exact or self.training or is_unit(u, self.rows))
        agrees = watch.agrees(sigma, changed, stacked.dtype)
        if (agrees and not averaged) or not all(0 < x < math.inf for x in sigma):
            watch.expect(originals, sigma)
            return True  # weights of NaN, inf or zeros have no u to find, and show in the loss
        if not self.training:  # an average, or weights swapped in for a while: self.u is kept for training
            self._evaluated = versions(originals), top_u(stacked, u, self.rows), None
            return False
        if not changed and not watch.is_stepped:
            self._notice.warn(self.name, UNANNOUNCED)
        u.copy_(join([x / torch.linalg.vector_norm(x) for x in cut(u, self.rows)]))
        if self._iterated(stacked, u):
            u.copy_(top_u(stacked, u, self.rows))
        watch.expect(originals, None)
        return False

    def _iterated(self, stacked: Tensor, u: Tensor) -> bool:
        """Advances u, in place, and says whether it was further behind these weights than a step leaves it."""
        blocks = zip(cut(stacked, self.rows), cut(u, self.rows), strict=True)
        iterates = [Iterate([Piece(W)], x, W.shape[1]) for W, x in blocks]
        before, after = power_iteration(iterates, self.config.n_power_iterations)
        return bool((after > 1.1 * before).any())

    @torch.no_grad()
    def _look_at_others(self, stacked: Tensor) -> None:
        """Looks whether u, which is not theirs, does for the tensors that a training pass is given in place of the weights.

        From the fourth pass on, as finite differences and meta-learning make a few.
        """
        self._refuse_zero_3()
        if not (self.training and self.watch.is_scheduled(first=4) and can_look(stacked)):
            return
        before, self._u_at_look = self._u_at_look, versions([self.u])
        # A u that advances, as under FSDP2, may be as far behind in the first updates.
        if before == self._u_at_look and self._iterated(stacked, self.u.clone()):
            self._notice.warn(self.name, REPLACED)

    def _refuse_zero_3(self) -> None:
        if hasattr(self.originals()[0], "ds_id"):
            raise ValueError(
                f"{self.name}: DeepSpeed's ZeRO-3 takes its weight away between passes, so that u cannot follow it; take stage "
                "1 or 2, or fully_shard"
            )

    def train(self, mode: bool = True) -> "SigmaReparam":
        if self.training and not mode:
            self._settle()
        super().train(mode)
        self._evaluated = None
        self.watch.look_soon()
        return self

    def _settle(self) -> None:
        """Before evaluation, notes the exact sigma, so that these weights are recognised if others are swapped in and out."""
        if None in self._members or self.u.is_meta or is_sharded(self.originals()[0]) or torch.compiler.is_compiling():
            return
        originals = self.originals()
        if not self.watch.exact and not self.watch.announced and not self.watch.moved(originals):
            sigma = self._estimate(self._stacked(), self.u).tolist()
            if self.watch.agrees(sigma, False, originals[0].dtype) and is_unit(self.u, self.rows):
                self.watch.expect(originals, sigma)
        if self.watch.trusts and can_look(self.gamma) and not is_sharded(self.gamma) and (self.gamma < 0).any():
            self._notice.warn(self.name, NEGATIVE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmaReparam":
        # u follows the model to another device but stays in fp32: .half() and .bfloat16() must not round it.
        before = self.u
        super()._apply(fn, recurse)
        self.u = self.u.float() if before.is_meta else before.to(self.u.device)
        self.watch.forget()
        self._evaluated = self._taken = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}v", None)  # checkpoints of early versions hold v, too
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.u = self.u.float()
        self.watch.forget()
        if None not in self._members:
            self.watch.rebind(self.originals())
        if self.u.is_meta:
            return
        # u is found anew where it is missing, or an average of several, as in an average of checkpoints.
        if f"{prefix}u" not in state_dict or not is_unit(self.u, self.rows):
            self.converge()

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied; the copied Originals attach themselves.
        return {**self.__dict__, "_members": [None] * len(self._members)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        hook_optimizers()

    def extra_repr(self) -> str:
        return f"rows={list(self.rows)}, {self.config}"


class JointMember(HasLayout):
    """The parametrization of a weight whose u and gamma are held by the SigmaReparam of another weight of its group."""

    def __init__(self, leader: SigmaReparam, index: int, name: str) -> None:
        super().__init__()
        self._leader, self._index, self.name = (leader,), index, name

    def leader(self) -> SigmaReparam:
        """The SigmaReparam that holds u and gamma."""
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

    It changes Linear, Conv1d and Conv2d layers, transformers' Conv1D, and the projections of nn.MultiheadAttention. Weights W
    keep their values, so initialise the model or load its weights before. Build the optimizer after, so that it has the gammas.

    Args:
        model: any module; it is changed.
        config: `SigmaReparamConfig()` if left out.
        filter_fn: `filter_fn(module, fully_qualified_name) -> bool` picks the layers; by default all of them, except those
            whose weight is tied to another layer (such as an output projection that shares the embedding's).

    Returns:
        The model, which was changed in place.

    Raises:
        ValueError: no layer to reparametrise; a picked layer that is reparametrised already, or whose weight is tied, sharded,
            zero, NaN or inf; a qkv setting that does not fit the model; a config of another type; a filter_fn that cannot be
            called so. The model is then left as it was.
    """
    # Not by isinstance: for models that ship this source (remote code) transformers loads another copy of its classes.
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
            # torch has given this layer a class of its own. parallelize_module reads this attribute before it shards a layer.
            type(layer)._distribute_module_applied = property(_refuse_tensor_parallelism)
            type(layer).register_parameter = _refuse_pruning
    return model


def _refuse_pruning(layer: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Replaces `register_parameter` to raise ValueError for torch.nn.utils.prune, which would store W_hat as a constant."""
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
    """A load hook of reparametrised layers: raises ValueError for a plain weight, which strict=False would skip in silence."""
    for name in getattr(layer, "parametrizations", ()):  # none after torch's remove_parametrizations
        if f"{prefix}{name}" in state_dict:
            raise ValueError(
                f"{prefix}{name}: the state dict holds a plain weight; load it into the plain model, then call sigma_reparam"
            )


def converge(model: Model) -> Model:
    """Computes u (out,) of every σReparam layer anew from its weight, in place, and returns the model.

    Call it before training goes on from averaged weights, such as an exponential moving average: the average of u is not a
    singular vector of the averaged W. Evaluating, and loading an averaged state dict, do this by themselves.

    Raises:
        ValueError: a weight holds NaN or inf, which have no singular vectors.
    """
    for name, parametrization in sigma_layers(model):
        try:
            parametrization.converge()
        except torch.linalg.LinAlgError:
            raise ValueError(f"{name}: it holds NaN or inf; go back to a sound checkpoint") from None
    return model
