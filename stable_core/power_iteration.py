"""The top singular vectors of a matrix: computed once at the start, then updated by power iteration in training."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .sharding import Piece

EXACT_UP_TO = 64  # an exact SVD of a matrix with a side this short takes about a millisecond
STEPS, MAX_RESTARTS = 64, 40
# Steps of bidiagonalisation before the residual is first checked: in bfloat16, in fp32 after that, and in fp32 without it.
# Each further check comes after an eighth more steps.
COARSE_STEPS, FINE_STEPS, WARM_STEPS = 32, 2, 16
TOLERANCE = 1e-3
FITS_A_CACHE = 2 << 20  # numbers of fp32, which are then read as fast as bfloat16 and need no second search
# On a GPU, where a search waits for it twice a step, W W^T of a side this short is squared so often instead.
SQUARED_UP_TO, SQUARINGS = 1536, 12


@dataclass(frozen=True)
class Iterate:
    """The state of power iteration for one matrix: u (out,), the parts of W (out, in) on this process, and width = in."""

    pieces: list[Piece]
    u: Tensor
    width: int

    def W_v(self, v: Tensor) -> Tensor:
        """W v (out,) in fp32, of the parts on this process only: the sum over processes is W v."""
        if len(self.pieces) == 1 and len(self.pieces[0].weight) == len(self.u):
            return torch.mv(self.pieces[0].weight.float(), self.pieces[0].columns(v))
        out = torch.zeros_like(self.u)
        for piece in self.pieces:
            piece.rows(out).addmv_(piece.weight.float(), piece.columns(v))
        return out

    def Wt_u(self) -> Tensor:
        """W^T u (in,) in fp32, of the parts on this process only."""
        if len(self.pieces) == 1 and self.pieces[0].weight.shape[1] == self.width:
            return torch.mv(self.pieces[0].weight.float().T, self.pieces[0].rows(self.u))
        out = self.u.new_zeros(self.width)
        for piece in self.pieces:
            piece.columns(out).addmv_(piece.weight.float().T, piece.rows(self.u))
        return out


@torch.no_grad()
def power_iteration(iterates: list[Iterate], n: int, group: "dist.ProcessGroup | None" = None) -> tuple[Tensor, Tensor]:
    """u <- W W^T u / |W W^T u|, n times and in place [σ, Algorithm 1], for many matrices of a device together.

    Returns, each (matrices,) in fp64 and of the last iteration, |W^T u| and |W v| / |v| with v = W^T u. For u of length 1 both
    are lower bounds of the spectral norm: the first is at most the second, and the second at most |W^T u| of the new u.

    All vectors are divided by their lengths in one call, as a call for each would take longer than its arithmetic. W v of a
    matrix is computed right after its W^T u, while the matrix is in the cache. Where matrices are sharded over the processes of
    `group`, all W^T u are computed first and then all W v, so that each needs one all-reduce for all matrices.
    """
    us = [iterate.u for iterate in iterates]
    for _ in range(n):
        if group is None:
            vs, new = [], []
            for iterate in iterates:
                vs.append(iterate.Wt_u())
                new.append(iterate.W_v(vs[-1]))
        else:
            vs = _sum([iterate.Wt_u() for iterate in iterates], group)
            new = _sum([iterate.W_v(v) for iterate, v in zip(iterates, vs, strict=True)], group)
        lengths_v, lengths_u = _lengths(vs), _lengths(new)
        torch._foreach_div_(new, list(lengths_u.float().clamp_min_(torch.finfo(torch.float32).tiny).unbind()))
        torch._foreach_copy_(us, new)
    return lengths_v, lengths_u / lengths_v


def _sum(vectors: list[Tensor], group: "dist.ProcessGroup") -> list[Tensor]:
    """The sum of each vector over all processes, in one all-reduce."""
    together = torch.cat(vectors)
    dist.all_reduce(together, group=group)
    return list(together.split([len(x) for x in vectors]))


def _lengths(vectors: list[Tensor]) -> Tensor:
    """Lengths of the vectors, in fp64: squares of W W^T u are out of the range of fp32 for weights of 1e-15 or 1e12."""
    return torch.stack(torch._foreach_norm(vectors, 2, torch.float64))


def top_singular_vectors(W: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The top singular vectors u (out,) and v (in,) of W (out, in), fp32, with u^T W v the spectral norm within 1e-3.

    The argument v, if given, is where the search starts: the v of a nearby matrix, such as W some updates ago.

    It is Golub-Kahan bidiagonalisation until |W^T u - sigma v| <= 1e-3 sigma. Plain power iteration needs hundreds of products
    for random matrices, whose largest singular values are close, and a full SVD of each layer takes longer than building the
    model. The time of a product is that of reading W, so a search without v in a large W runs in bfloat16 first and then
    corrects its rounding in fp32. On a GPU small matrices are searched otherwise (`_by_squaring`). It starts from a fixed seed:
    every rank finds the same vectors, and the global random state is not used.
    """
    W = W.detach().float()
    if min(W.shape) <= EXACT_UP_TO:
        u, _, v = torch.linalg.svd(W, full_matrices=False)
        return u[:, 0], v[0]
    if _squares(W):
        return _by_squaring(W)
    start = _start(W.shape[1]).to(W.device)
    steps = WARM_STEPS
    if v is None and W.numel() <= FITS_A_CACHE:
        v, steps = start, COARSE_STEPS
    elif v is None:
        _, v, _, taken = _bidiagonalise(W.bfloat16(), start, COARSE_STEPS)
        # It stops earlier if W has few singular values, or bfloat16 cannot tell them apart: fp32 then needs more steps.
        if taken >= COARSE_STEPS:
            steps = FINE_STEPS
    else:
        v = v + start / start.norm()  # else it could not leave singular vectors that are no longer the top ones
    for _ in range(MAX_RESTARTS):
        u, v, residual, _ = _bidiagonalise(W, v, steps)
        if not residual > TOLERANCE:  # also ends where it is NaN, as for W = 0
            break
    return u, v


def _squares(W: Tensor) -> bool:
    return W.is_cuda and min(W.shape) <= SQUARED_UP_TO


def _start(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _by_squaring(W: Tensor) -> tuple[Tensor, Tensor]:
    """The top singular vectors of W by 4,096 steps of power iteration: (W W^T)^(2^12), in 12 products and no wait for the GPU.

    Where the second singular value is lower by a part d, sigma is too low by d exp(-8192 d), at most some 1e-4; the rounding of
    TF32 does not change that.
    """
    tall = W.shape[0] > W.shape[1]
    M = W.T if tall else W
    M = M / M.abs().amax().clamp(min=torch.finfo(W.dtype).tiny)
    power = M @ M.T
    for i in range(SQUARINGS + 1):
        if i > 0:
            power = power @ power
        if i % 3 == 0:  # in three products an eigenvalue of 1 / sqrt(1536) falls to 2e-13
            power /= torch.linalg.vector_norm(power).clamp(min=torch.finfo(W.dtype).tiny)
    v = F.normalize(M.T @ (power @ _start(len(M)).to(W.device)), dim=0)
    u = M @ v
    u, v = F.normalize(u, dim=0), F.normalize(M.T @ u, dim=0)
    return (v, u) if tall else (u, v)


def _bidiagonalise(W: Tensor, v: Tensor, enough: int) -> tuple[Tensor, Tensor, float, int]:
    """The best u (out,) and v (in,) in the Krylov space of v, the residual |W^T u - sigma v| / sigma, and the number of steps.

    `enough` is the number of steps before the residual is first checked.

    alpha_k u_k = W v_k - beta_(k-1) u_(k-1) and beta_k v_(k+1) = W^T u_k - alpha_k v_k [Golub and Van Loan, Matrix
    Computations, Section 10.4]. Then W V = U B and W^T U = V B^T + beta_k v_(k+1) e_k^T, where the rows of `U` (k, out) and
    `V` (k, in) are the columns of U and V, and B (k, k) has the alphas on its diagonal and the betas above it. For the top
    singular vectors p and q of B, u = U p, v = V q and |W^T u - sigma v| = beta_k |p_k|.
    """
    U, V = (torch.empty(STEPS, size, dtype=torch.float32, device=W.device) for size in W.shape)
    alphas: list[float] = []
    betas: list[float] = []
    V[0] = v / _norm(v)
    for k in range(STEPS):
        left = _times(V[k], W.T)
        if k > 0:
            left.sub_(U[k - 1], alpha=betas[-1])
            left.sub_(U[:k].T @ (U[:k] @ left))  # reorthogonalised, or rounding errors would grow from step to step
        alphas.append(_norm(left))
        torch.div(left, alphas[-1] or 1.0, out=U[k])
        right = _times(U[k], W).sub_(V[k], alpha=alphas[-1])
        right.sub_(V[: k + 1].T @ (V[: k + 1] @ right))
        betas.append(_norm(right))
        # W has few distinct singular values, and a further step would be rounding errors only
        exhausted = min(alphas[-1], betas[-1]) <= torch.finfo(W.dtype).eps ** 0.75 * max(alphas + betas)
        if k + 1 == enough or exhausted:
            alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in (alphas, betas))
            P, sigma, Qt = torch.linalg.svd(alpha.diag() + beta[:-1].diag(1))
            residual = (beta[-1] * P[-1, 0].abs() / sigma[0]).item()
            if k + 1 == STEPS or residual <= TOLERANCE or exhausted:
                break
            enough = min(enough + 1 + enough // 8, STEPS)
        torch.div(right, betas[-1], out=V[k + 1])
    u, v = (x.to(V) @ vectors[: k + 1] for x, vectors in ((P[:, 0], U), (Qt[0], V)))
    return u, v, residual, k + 1


def _times(x: Tensor, W: Tensor) -> Tensor:
    """x^T W in fp32. In bfloat16 as a product of matrices, which on a CPU takes half of the time of torch.mv."""
    return torch.mv(W.T, x) if W.dtype == torch.float32 else (x.to(W.dtype)[None] @ W)[0].float()


def _norm(x: Tensor) -> float:
    """|x| in fp64, as squares of 1e-20 or 1e20 are out of the range of fp32; on the CPU, as some accelerators have no fp64."""
    return torch.linalg.vector_norm(x.cpu(), dtype=torch.float64).item()
