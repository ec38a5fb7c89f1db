"""σReparam: W_hat = gamma / sigma(W) * W, and its baselines spectral norm and weight norm.

Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (ICML 2023), Section 3.2
and Algorithm 1 (Appendix C). sigma(W) = u^T W v, where u (out,) and v (in,) follow the top singular vectors by power
iteration. u and v advance in a hook after each optimizer step (advancing.py), that is exactly once per change of W: never
in the forward pass, so evaluation, gradient accumulation and activation checkpointing leave them alone, `torch.compile`
sees a pure function, and a checkpoint written between two steps resumes bitwise.
"""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from .advancing import track
from .power_iteration import Iterate, top_singular_vectors
from .recomputing import remember
from .sharding import gathered, pieces
from .targets import FilterFn, Group, check_values, cut, find_groups, join, matrix


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
    """

    gamma_init: str = "one"
    qkv: str = "separate"
    n_power_iterations: int = 1
    stop_gradient: bool = False
    kind: str = "sigma"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("gamma_init", ("one", "spectral")),
            ("qkv", ("separate", "joint", "qk_joint")),
            ("kind", ("sigma", "spectral", "weight")),
            ("stop_gradient", (False, True)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} = {getattr(self, field)!r}: allowed are {', '.join(map(repr, allowed))}")
        if not isinstance(self.n_power_iterations, int) or self.n_power_iterations < 1:
            raise ValueError(f"n_power_iterations = {self.n_power_iterations!r}: allowed are whole numbers from 1")
        if self.kind == "spectral" and self.gamma_init == "spectral":
            raise ValueError("gamma_init = 'spectral': with kind = 'spectral' gamma is fixed at 1, allowed is 'one'")
        for field in fields(self) if self.kind == "weight" else ():
            if field.name != "kind" and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} = {getattr(self, field.name)!r}: kind = 'weight' has no such setting")


def full_precision(W: Tensor):
    """No autocast. Where there is none to switch off, doing it anyway would take as long as a small matrix."""
    return torch.autocast(W.device.type, enabled=False) if _autocast_dtype(W) else nullcontext()


def _autocast_dtype(W: Tensor) -> torch.dtype | None:
    """What autocast makes of the operands of a matrix product on W's device; the meta device has none."""
    device = W.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


class _ScaleBySigma(torch.autograd.Function):
    """(W, gamma) -> (gamma / sigma * W in `dtype`, sigma), sigma = u^T W v, in fp32 whatever autocast says.

    W (out, in) is cut into blocks of `rows`; gamma and sigma (blocks,), u (out,), v (blocks, in). Of each block
    dL/dW = gamma/sigma * G - gamma/sigma^2 <G, W> u v^T and dL/dgamma = <G, W> / sigma, where G = dL/dW_hat.
    It keeps no copy of W, where plain autograd would keep W/sigma too. sigma is an output so that second derivatives
    (Hessian-vector products) see it as a function of W.
    """

    @staticmethod
    def forward(W, gamma, u, v, rows: tuple[int, ...], stop_gradient: bool, dtype: torch.dtype):
        with full_precision(W):
            # W^T u, which reads W along its rows, takes two thirds of the time of W v
            sigma = join([torch.dot(torch.mv(block.float().T, x), y).view(1) for block, x, y in _blocks(W, u, v, rows)])
            scale = _per_row(gamma.float() / sigma, rows)
            if torch.compiler.is_compiling():
                return (W * scale).to(dtype), sigma
            return torch.mul(W, scale, out=torch.empty_like(W, dtype=dtype)), sigma  # no matrix in fp32 between

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        W, gamma, u, v, ctx.rows, ctx.stop_gradient, _ = inputs
        ctx.save_for_backward(W, gamma, u, v, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, G: Tensor | None, g_sigma: Tensor | None):
        # Nothing here is lowered by autocast; to switch it off would leave it off for what torch.compile traces next.
        W, gamma, u, v, sigma = ctx.saved_tensors
        if G is None:
            G = torch.zeros_like(W)
        G32, scale = G.float(), gamma.float() / sigma
        blocks = zip(cut(G32, ctx.rows), cut(W.float(), ctx.rows), strict=True)
        overlap = join([_inner_product(g, block).view(1) for g, block in blocks])
        d_gamma = (overlap / sigma).to(gamma.dtype) if ctx.needs_input_grad[1] else None
        d_W = G32 * _per_row(scale, ctx.rows)
        if not ctx.stop_gradient:
            d_sigma = -overlap * scale / sigma
            if g_sigma is not None:
                d_sigma = d_sigma + g_sigma
            d_sigma = cut(d_sigma, [1] * len(ctx.rows))
            for (block, x, y), d in zip(_blocks(d_W, u, v, ctx.rows), d_sigma, strict=True):
                block.addr_(d * x, y)  # in place: a second matrix costs more than the sum
        return d_W.to(W.dtype), d_gamma, None, None, None, None, None


# `apply` asks for the signature at every call; reading it off the source of the function takes as long as a small layer.
_ScaleBySigma.forward.__signature__ = inspect.signature(_ScaleBySigma.forward)


def _blocks(W: Tensor, u: Tensor, v: Tensor, rows: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(cut(W, rows), cut(u, rows), v, strict=True)


def _per_row(scale: Tensor, rows: tuple[int, ...]) -> Tensor:
    """(blocks,) -> what a stacked weight (out, in) is multiplied by, in one pass over it."""
    return scale if len(rows) == 1 else torch.cat([x.expand(n) for x, n in zip(scale, rows, strict=True)])[:, None]


def _inner_product(A: Tensor, B: Tensor) -> Tensor:
    """<A, B>, without a copy of transposed matrices."""
    if not B.is_contiguous():
        A, B = A.T, B.T
    return torch.dot(A.reshape(-1), B.reshape(-1))


class SigmaReparam(nn.Module):
    """The parametrization W -> gamma / sigma(W) * W of one weight, or of several that share one sigma.

    The weights, seen as matrices (out, in) and stacked along `out`, are cut into blocks of `rows` outputs; each block has
    its own gamma and sigma. One block is Algorithm 1; three are a packed [Wq; Wk; Wv] with separate sigmas; several
    weights and one block are a joint sigma over separate layers.

    State, all of it in the state dict: gamma (blocks,), u (out,), v (blocks, in); u and v stay in fp32.
    """

    def __init__(self, group: Group, config: SigmaReparamConfig) -> None:
        super().__init__()
        self.rows, self.transposed, self.config = group.rows, group.members[0].transposed, config
        self.index = group.leader  # which of the weights it is registered on
        self._members: tuple[parametrize.ParametrizationList, ...] = ()
        weight, stacked = group.members[0].weight, join([target.matrix for target in group.members])
        fp32 = {"device": weight.device, "dtype": torch.float32}
        self.register_buffer("u", torch.zeros(stacked.shape[0], **fp32))
        self.register_buffer("v", torch.zeros(len(self.rows), stacked.shape[1], **fp32))
        gamma = torch.ones(len(self.rows), **fp32)
        if not weight.is_meta:
            self._converge(stacked)
            if config.gamma_init == "spectral":
                gamma = self._sigma(stacked)
        gamma = gamma.to(weight.dtype)
        if config.kind == "spectral":
            self.register_buffer("gamma", gamma)
        else:
            self.gamma = nn.Parameter(gamma, requires_grad=weight.requires_grad)
        track(self)

    def attach(self, members: list[parametrize.ParametrizationList]) -> None:
        """Remembers where its weights live; a tuple, so that they do not become submodules."""
        self._members = tuple(members)

    def members(self) -> tuple[parametrize.ParametrizationList, ...]:
        """Where its weights live."""
        return self._members

    def originals(self) -> list[Tensor]:
        """The learned weights W, shaped as their layers have them."""
        return [member.original for member in self._members]

    def forward(self, W: Tensor) -> Tensor:
        # A lone weight is the one given, which in a replica of nn.DataParallel is not the one remembered.
        return self.scaled_weights([W] if len(self._members) == 1 else self.originals())[self.index]

    def scaled_weights(self, originals: list[Tensor]) -> list[Tensor]:
        """W_hat of every weight, shaped as its layer has it."""
        # Rounded here where the layer would do it: autocast's own copy takes longer, and keeps W_hat in fp32 for backward.
        dtype = originals[0].dtype
        if dtype == torch.float32:
            dtype = _autocast_dtype(originals[0]) or dtype
        scaled = self._scaled(originals, dtype)
        remember(scaled, lambda: self._scaled(originals, dtype))
        parts = cut(scaled, [W.shape[self.transposed] for W in originals])
        return [(W.T if self.transposed else W).view_as(W0) for W, W0 in zip(parts, originals, strict=True)]

    def _scaled(self, originals: list[Tensor], dtype: torch.dtype) -> Tensor:
        stacked = join([matrix(W, self.transposed) for W in originals])
        # Clones, because DDP broadcasts buffers in place before each forward, also between a forward and its backward.
        state = self.gamma, self.u.clone(), self.v.clone(), tuple(self.rows), self.config.stop_gradient
        return _ScaleBySigma.apply(stacked, *state, dtype)[0]

    def iterates(self) -> tuple[list[Iterate], object]:
        """What `power_iteration` advances, an iterate per block, and the process group over which W is cut up, if any."""
        parts, group = pieces(self.originals(), self.transposed)
        if len(self.rows) == 1:
            return [Iterate(parts, self.u, self.v[0])], group
        iterates, start = [], 0
        for u, v, size in zip(self.u.split(self.rows), self.v, self.rows, strict=True):
            inside = (piece.of_block(start, size) for piece in parts)
            iterates.append(Iterate([piece for piece in inside if piece is not None], u, v))
            start += size
        return iterates, group

    def converge(self) -> None:
        """Finds u and v of the present weights from nothing."""
        self._converge(self._stacked())

    @torch.no_grad()
    def reset(self) -> None:
        """u, v and gamma as they start, for weights that were drawn or loaded after `sigma_reparam`."""
        self.converge()
        self.gamma.copy_(self.sigma() if self.config.gamma_init == "spectral" else torch.ones_like(self.gamma))

    def sigma(self) -> Tensor:
        """The estimate u^T W v of each block's spectral norm, shape (blocks,), without gradient."""
        return self._sigma(self._stacked())

    @torch.no_grad()
    def _sigma(self, stacked: Tensor) -> Tensor:
        with full_precision(stacked):
            return torch.stack([torch.dot(u, torch.mv(W.float(), v)) for W, u, v in self._blocks(stacked)])

    @torch.no_grad()
    def _converge(self, stacked: Tensor) -> None:
        for W, u, v in self._blocks(stacked):
            with full_precision(W):
                top_u, top_v = top_singular_vectors(W)
            sign = -1 if torch.dot(v, top_v) < 0 else 1  # of the two, the pair at hand: an average goes on with it
            u.copy_(sign * top_u)
            v.copy_(sign * top_v)

    def _stacked(self) -> Tensor:
        return join([matrix(gathered(W.detach()), self.transposed) for W in self.originals()])

    def _blocks(self, stacked: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(cut(stacked, self.rows), self.u.split(self.rows), self.v, strict=True)

    def _apply(self, fn, recurse=True):
        # .half() and .bfloat16() must not round the state: it follows the model's device, not its dtype.
        before = self.u, self.v
        super()._apply(fn, recurse)
        self.u, self.v = (
            after.float() if state.is_meta else state.to(after.device)
            for state, after in zip(before, (self.u, self.v), strict=True)
        )
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.u, self.v = self.u.float(), self.v.float()
        # An average of checkpoints averages u and v too, and the result is no pair of unit vectors: find it afresh.
        norms = torch.stack([vector.norm() for vector in (*self.u.split(self.rows), *self.v)])
        if not norms.is_meta and ((norms - 1).abs() > 1e-5).any():
            self.converge()

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        track(self)  # a deep copy advances with its own optimizer

    def extra_repr(self) -> str:
        return f"rows={self.rows}, {self.config}"


class JointMember(nn.Module):
    """The parametrization of a weight whose sigma is kept with another weight of its group."""

    def __init__(self, leader: SigmaReparam, index: int) -> None:
        super().__init__()
        self._leader, self._index = (leader,), index

    def members(self) -> tuple[parametrize.ParametrizationList, ...]:
        return self._leader[0].members()

    def forward(self, W: Tensor) -> Tensor:
        leader = self._leader[0]
        return leader.scaled_weights(leader.originals())[self._index]


def sigma_reparam(
    model: nn.Module, config: SigmaReparamConfig | None = None, filter_fn: FilterFn | None = None
) -> nn.Module:
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
    for group, leader in [(group, SigmaReparam(group, config)) for group in groups]:
        for index, target in enumerate(group.members):
            parametrization = leader if index == group.leader else JointMember(leader, index)
            parametrize.register_parametrization(target.module, target.tensor_name, parametrization, unsafe=True)
            target.module.register_load_state_dict_pre_hook(refuse_plain_weight)
        leader.attach([target.module.parametrizations[target.tensor_name] for target in group.members])
    return model


def refuse_plain_weight(layer: nn.Module, state_dict, prefix: str, *_) -> None:
    """A load hook of reparametrised layers: one line, also with strict=False, which would leave the weight out in silence."""
    for name in layer.parametrizations:
        if f"{prefix}{name}" in state_dict:
            raise ValueError(
                f"{prefix}{name}: the state dict holds a plain weight; load it into the plain model, then call sigma_reparam"
            )


def converge(model: nn.Module) -> nn.Module:
    """Finds u and v of every σReparam layer afresh, for weights that no optimizer made, and returns the model.

    Call it on an exponential moving average before it is evaluated or folded: averaging u and v, or W alone, leaves them
    no singular vectors of the averaged W. Loading an averaged state dict does it by itself.

    Raises:
        ValueError: a weight holds NaN or inf, which have no singular vectors.
    """
    for name, module in model.named_modules():
        if isinstance(module, SigmaReparam):
            try:
                module.converge()
            except torch.linalg.LinAlgError:
                layer = name.rpartition("parametrizations.")[0] + name.split(".")[-2]
                raise ValueError(f"{layer}: it holds NaN or inf; go back to a sound checkpoint") from None
    return model
