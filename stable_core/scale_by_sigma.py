"""The arithmetic of σReparam: sigma = |W^T u| / |u|, W_hat = gamma / sigma * W, and their gradients.

Source: Zhai et al. (ICML 2023), Section 3.2 and Algorithm 1. All of it is computed in at least fp32, also under autocast.
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
    """A context without autocast; an empty one where autocast is off, which is faster than to switch it off again."""
    return torch.autocast(W.device.type, enabled=False) if autocast_dtype(W) else nullcontext()


def autocast_dtype(W: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts matrix products on W's device; None where it is off or the device is meta."""
    device = W.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def wide(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def scale_plainly(
    W: Tensor, gamma: Tensor, u: Tensor, rows: tuple[int, ...], stop_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(gamma / sigma * W (out, in), sigma (blocks,)) by operators that autograd can differentiate twice.

    It is used under torch.func, for second derivatives, and for folding. Arguments as for `ScaleBySigma`. sigma is not computed
    by a matrix product, because autocast would lower its precision.
    """
    sigmas, scaled = [], []
    for block, g, x in zip(cut(wide(W), rows), cut(gamma, [1] * len(rows)), cut(u, rows), strict=True):
        x = x.to(block.dtype)
        sigma = torch.linalg.vector_norm((block * x[:, None]).sum(0)) / torch.linalg.vector_norm(x)
        sigmas.append(sigma.view(1))
        scaled.append(block * (g.to(block.dtype) / (sigma.detach() if stop_gradient else sigma)))
    return join(scaled), join(sigmas)


def measure(W: Tensor, u: Tensor, gamma: Tensor, rows: tuple[int, ...], unit: bool) -> Measured:
    """`kernels.measure` by torch's operators: z, w, s and gamma / s of the blocks of W (out, in). `unit`: each |u| is 1.

    With one block, z is (in,), and s a scalar in fp64.
    """
    W, many = wide(W), len(rows) > 1
    u, gamma = u.to(W.dtype), gamma.to(W.dtype)
    if not many:
        z = torch.mv(W.T, u)
    elif _are_equal(rows, W):
        z = torch.bmm(u.view(len(rows), 1, -1), _blocked(W, rows)).squeeze(1)
    else:
        z = torch.stack([torch.mv(block.T, x) for block, x in zip(cut(W, rows), cut(u, rows), strict=True)])
    # In fp64: squares of very large and very small weights are out of the range of fp32.
    s = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64)
    if many:
        s = s.to(W.dtype)
    if unit:
        return Measured(z, _over_rows(u, s, rows), s, gamma / s)
    lengths = torch.linalg.vector_norm(u) if not many else join([x.norm().view(1) for x in cut(u, rows)])
    s = s / lengths
    return Measured(z, _over_rows(u, s * lengths.square(), rows), s, gamma / s)


class ScaleBySigma(torch.autograd.Function):
    """W_hat = gamma / s * W in `dtype`, from W, gamma and `found`, which `measure` found of them; s = |W^T u| / |u|.

    W, as the matrix (out, in) that `matrix` makes of it, is cut into blocks of `rows`; gamma and s are (blocks,), u is (out,).
    With z = W^T u, w = u / (|u|^2 s) and G = dL/dW_hat, the gradients of each block are

        dL/dgamma = c = <G, W> / s,    dL/dW = gamma / s * (G - c w z^T).

    All is in at least fp32: autocast casts none of these operators. For the backward pass only W itself is kept, where plain
    autograd would keep W / s, too. With `fused` Triton kernels do the backward pass.
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
        else:  # not by save_for_backward, which is slow; nothing else uses these tensors
            ctx.save_for_backward(W, gamma)
            ctx.found = found
        return scaled(W, found.factor, rows, transposed, dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        rows, transposed, stop_gradient, fused = ctx.settings
        W0, gamma, *found = ctx.saved_tensors
        found = Measured(*found) if fused is None else ctx.found
        W, G = matrix(W0, transposed), matrix(G, transposed)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True: second derivatives
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
    """dL/dW (out, in) and dL/dgamma (blocks,): `kernels.scale_backward` by torch's operators, in at least fp32."""
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
    """Each block of W times its entry of factor (blocks,), in `dtype` and W's shape and strides; one pass, rounded once."""
    same = dtype == W.dtype == factor.dtype
    if torch.compiler.is_compiling() and not same:  # the compiler fuses the product and the cast
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
    """Whether x has several blocks of one size, to be batched; False if sharded, as some operators do not support that."""
    return len(rows) > 1 and len(set(rows)) == 1 and not is_sharded(x)


def _blocked(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """(out, in) -> (blocks, rows, in) where `_are_equal`, else x itself."""
    return x.unflatten(0, (len(rows), -1)) if _are_equal(rows, x) else x


def _per_row(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """x (blocks,) in a shape that broadcasts with the result of `_blocked`."""
    if len(rows) == 1:
        return x
    if _are_equal(rows, x):
        return x[:, None, None]
    return torch.cat([one.expand(n) for one, n in zip(x, rows, strict=True)])[:, None]


def _over_rows(u: Tensor, x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """u (out,) with each block divided by its entry of x (blocks,)."""
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
    """The top left singular vectors of the blocks, (out,), each with the sign nearer to u, as averages of u need it."""
    found = []
    for W, x in zip(cut(stacked, rows), cut(u, rows), strict=True):
        with full_precision(W):
            top, _ = top_singular_vectors(W)
        found.append(-top if torch.dot(x, top) < 0 else top)
    return join(found)


def sound_u(stacked: Tensor, u: Tensor, rows: tuple[int, ...]) -> Tensor:
    """u (out,) if of length 1; else it is an average of several, and the top singular vectors of `stacked` are returned."""
    return u if is_unit(u, rows) else top_u(stacked, u, rows)


def is_unit(u: Tensor, rows: tuple[int, ...]) -> bool:
    """Whether the u of each block has length 1, as power iteration leaves it."""
    return not bool(((torch.stack([x.norm() for x in cut(u, rows)]) - 1).abs() > 1e-5).any())
