"""The arithmetic of σReparam: sigma = |W^T u| / |u|, W_hat = gamma / sigma * W, and their gradients.

Source: Zhai et al. (ICML 2023), Section 3.2 and Algorithm 1. Everything is in at least fp32, whatever autocast says.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .kernels import Measured, scale_backward
from .power_iteration import top_singular_vectors
from .sharding import is_sharded
from .targets import cut, join, matrix
from .together import Together
from .watching import is_transformed


def full_precision(W: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast; an empty one where none is on, as switching it off takes as long as a small matrix."""
    return torch.autocast(W.device.type, enabled=False) if autocast_dtype(W) else nullcontext()


def autocast_dtype(W: Tensor) -> torch.dtype | None:
    """What autocast makes of the operands of a matrix product on W's device; the meta device has none."""
    device = W.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def wide(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def scale_plainly(
    W: Tensor, gamma: Tensor, u: Tensor, rows: tuple[int, ...], stop_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(gamma / sigma * W, sigma) for torch to differentiate: under a compiler, torch.func, and for second derivatives.

    As for `ScaleBySigma`. sigma is not a matrix product here, which autocast would round.
    """
    sigmas, scaled = [], []
    for block, g, x in zip(cut(wide(W), rows), cut(gamma, [1] * len(rows)), cut(u, rows), strict=True):
        x = x.to(block.dtype)
        sigma = torch.linalg.vector_norm((block * x[:, None]).sum(0)) / torch.linalg.vector_norm(x)
        sigmas.append(sigma.view(1))
        scaled.append(block * (g.to(block.dtype) / (sigma.detach() if stop_gradient else sigma)))
    return join(scaled), join(sigmas)


def measure(W: Tensor, u: Tensor, gamma: Tensor, rows: tuple[int, ...], unit: bool) -> Measured:
    """What `kernels.measure` finds, by torch's operators. `unit` says that each |u| is 1.

    With one block, z is (in,), and s a number in fp64.
    """
    W, many = wide(W), len(rows) > 1
    u, gamma = u.to(W.dtype), gamma.to(W.dtype)
    if not many:
        z = torch.mv(W.T, u)
    elif _are_equal(rows, W):
        z = torch.bmm(u.view(len(rows), 1, -1), _blocked(W, rows)).squeeze(1)
    else:
        z = torch.stack([torch.mv(block.T, x) for block, x in zip(cut(W, rows), cut(u, rows), strict=True)])
    # In fp64: the squares of large and small weights are out of the range of fp32.
    s = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64)
    if many:
        s = s.to(W.dtype)
    if unit:
        return Measured(z, _over_rows(u, s, rows), s, gamma / s)
    lengths = torch.linalg.vector_norm(u) if not many else join([x.norm().view(1) for x in cut(u, rows)])
    s = s / lengths
    return Measured(z, _over_rows(u, s * lengths.square(), rows), s, gamma / s)


class ScaleBySigma(torch.autograd.Function):
    """(W, gamma, what was measured of them) -> gamma / s * W in `dtype`; s = |W^T u| / |u|.

    W, a matrix (out, in), or what `matrix` makes one of, is cut into blocks of `rows`; gamma and s (blocks,), u (out,). With
    z = W^T u and w = u / (|u|^2 s), each block has dL/dgamma = c = <G, W> / s and dL/dW = gamma / s * (G - c w z^T), where
    G = dL/dW_hat. All in at least fp32 whatever autocast says: none of its operators is one that autocast casts. It keeps no
    copy of W, where plain autograd would keep W / s too. With `fused` Triton's kernels do the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        W: Tensor,
        gamma: Tensor,
        found: Measured,
        rows: tuple[int, ...],
        transposed: bool,
        stop_gradient: bool,
        dtype: torch.dtype,
        fused: Together | None,
    ) -> Tensor:
        ctx.settings = rows, transposed, stop_gradient, fused
        if fused is None:
            ctx.save_for_backward(W, gamma, *found)
        else:  # kept without autograd, which takes longer for each than all the rest; nobody else holds them
            ctx.save_for_backward(W, gamma)
            ctx.found = found
        return scaled(W, found.factor, rows, transposed, dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        rows, transposed, stop_gradient, fused = ctx.settings
        W0, gamma, *found = ctx.saved_tensors
        found = Measured(*found) if fused is None else ctx.found
        W, G = matrix(W0, transposed), matrix(G, transposed)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # somebody asks for second derivatives
            W_hat, _ = scale_plainly(W, gamma, found.w, rows, stop_gradient)
            wanted = [x for x, needed in zip((W0, gamma), ctx.needs_input_grad, strict=False) if needed]
            gradients = iter(torch.autograd.grad(W_hat, wanted, G.to(W_hat.dtype), create_graph=True))
            return *(next(gradients) if needed else None for needed in ctx.needs_input_grad[:2]), *(None,) * 6
        if fused is not None:
            fused.drop()
        if fused is None or is_transformed():
            d_W, d_gamma = gradients_of(G, W, found, rows, stop_gradient)
        else:
            d_W, d_gamma = scale_backward(G, W, found, rows, stop_gradient)
        if transposed:
            d_W = d_W.T
        elif W is not W0:
            d_W = d_W.view_as(W0)
        return d_W.to(W0.dtype), d_gamma.to(gamma.dtype), None, None, None, None, None, None


def gradients_of(
    G: Tensor, W: Tensor, found: Measured, rows: tuple[int, ...], stop_gradient: bool
) -> tuple[Tensor, Tensor]:
    """dL/dW and dL/dgamma: what `kernels.scale_backward` finds, by torch's operators, in at least fp32."""
    (z, w, s, factor), W, G, many = found, wide(W), wide(G), len(rows) > 1
    products = [_inner_product(g, block) for g, block in zip(cut(G, rows), cut(W, rows), strict=True)]
    d_gamma = (torch.stack(products) if many else products[0].view(1)) / s
    scale = _per_row(factor, rows)
    if stop_gradient:
        return (_blocked(G, rows) * scale).view_as(G), d_gamma
    if many and not _are_equal(rows, W):
        t = z * d_gamma[:, None]
        parts = zip(cut(G, rows), cut(w, rows), t, strict=True)
        return join([torch.addcmul(g, x[:, None], y, value=-1) for g, x, y in parts]).mul_(scale), d_gamma
    t = z * (d_gamma[:, None] if many else d_gamma)
    left = w.view(len(rows), -1, 1) if many else w[:, None]
    d_W = torch.addcmul(_blocked(G, rows), left, t[:, None] if many else t, value=-1).mul_(scale)
    return d_W.flatten(0, 1) if many else d_W, d_gamma


def scaled(W: Tensor, factor: Tensor, rows: tuple[int, ...], transposed: bool, dtype: torch.dtype) -> Tensor:
    """Each block of W times its entry of factor (blocks,), shaped and laid out as W; in one pass, and rounded once."""
    same = dtype == W.dtype == factor.dtype
    if torch.compiler.is_compiling() and not same:  # which fuses the two
        return scaled(wide(W), factor, rows, transposed, factor.dtype).to(dtype)
    if len(rows) == 1:
        return W * factor if same else torch.mul(W, factor, out=torch.empty_like(W, dtype=dtype))
    blocks, factor = _blocked(matrix(W, transposed), rows), _per_row(factor, rows)
    if same:
        W_hat = blocks * factor
        W_hat = W_hat.flatten(0, 1) if W_hat.ndim == 3 else W_hat
        return W_hat.T if transposed else W_hat.view_as(W)
    W_hat = torch.empty_like(W, dtype=dtype)
    torch.mul(blocks, factor, out=_blocked(matrix(W_hat, transposed), rows))
    return W_hat


def _are_equal(rows: tuple[int, ...], x: Tensor) -> bool:
    """Whether x is cut into several blocks of one size, which one operator takes together; not every one does if sharded."""
    return len(rows) > 1 and len(set(rows)) == 1 and not is_sharded(x)


def _blocked(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """(out, in) -> (blocks, rows, in), where all blocks have as many rows."""
    return x.unflatten(0, (len(rows), -1)) if _are_equal(rows, x) else x


def _per_row(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """(blocks,) -> what `_blocked` is multiplied by."""
    if len(rows) == 1:
        return x
    if _are_equal(rows, x):
        return x[:, None, None]
    return torch.cat([one.expand(n) for one, n in zip(x, rows, strict=True)])[:, None]


def _over_rows(u: Tensor, x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """u (out,) / x (blocks,), each block by its own."""
    if len(rows) == 1:
        return u / x
    if _are_equal(rows, x):
        return (u.view(len(rows), -1) / x[:, None]).view(-1)
    return torch.cat([part / one for part, one in zip(cut(u, rows), x, strict=True)])


def _inner_product(A: Tensor, B: Tensor) -> Tensor:
    """<A, B>, without a copy of transposed matrices."""
    if not B.is_contiguous():
        A, B = A.T, B.T
    return torch.dot(A.reshape(-1), B.reshape(-1))


@torch.no_grad()
def top_u(stacked: Tensor, u: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The top left singular vector x of each block, (out,); of x and -x the one nearer to u, which averages of u need."""
    found = []
    for W, x in zip(cut(stacked, rows), cut(u, rows), strict=True):
        with full_precision(W):
            top, _ = top_singular_vectors(W)
        found.append(-top if torch.dot(x, top) < 0 else top)
    return join(found)


def sound_u(stacked: Tensor, u: Tensor, rows: tuple[int, ...]) -> Tensor:
    """u; where it is an average of several, as in an average of checkpoints, the top singular vector of the weights at hand."""
    return u if is_unit(u, rows) else top_u(stacked, u, rows)


def is_unit(u: Tensor, rows: tuple[int, ...]) -> bool:
    """Whether the u of each block has length 1, as power iteration leaves it."""
    return not bool(((torch.stack([x.norm() for x in cut(u, rows)]) - 1).abs() > 1e-5).any())
