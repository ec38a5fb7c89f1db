"""The top singular vectors of a matrix: found once at the start, followed by power iteration while the matrix trains."""

import torch
from torch import Tensor
from torch.distributed import is_available as distributed_is_available

if distributed_is_available():
    from torch.distributed.tensor import DTensor, Replicate

EXACT_UP_TO = 64  # an exact SVD of a matrix with a side this short takes about a millisecond
KRYLOV_STEPS, WARM_STEPS = 24, 8  # from a random start, and from nearby
MAX_RESTARTS = 40
TOLERANCE = 1e-3


def matvec(W: Tensor, x: Tensor) -> Tensor:
    """W x in fp32. A weight sharded by FSDP2 is multiplied where it lies; only the vector travels."""
    if distributed_is_available() and isinstance(W, DTensor):
        x = DTensor.from_local(x, W.device_mesh, [Replicate()] * W.device_mesh.ndim)
        return torch.mm(W.float(), x[:, None]).full_tensor()[:, 0]
    return torch.mv(W.float(), x)


def power_iteration(W: Tensor, u: Tensor, v: Tensor, n: int) -> None:
    """n times u <- W v / |W v|, v <- W^T u / |W^T u|, in place [σ, Algorithm 1]. W (out, in), u (out,), v (in,)."""
    for _ in range(n):
        torch.nn.functional.normalize(matvec(W, v), dim=0, out=u)
        torch.nn.functional.normalize(matvec(W.T, u), dim=0, out=v)


def top_singular_vectors(W: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """u (out,) and v (in,) of the largest singular value of W (out, in), so that u^T W v is it within 1e-3.

    v, if given, is that of a matrix nearby, such as W some updates before.

    Restarted Lanczos on W^T W: the best pair in the Krylov space of a vector, then again from there, until
    |W^T u - sigma v| <= 1e-3 sigma. Plain power iteration needs hundreds of products for the small gaps of random matrices,
    and a full SVD of each layer takes longer than building the model. The start is from a fixed seed: every rank finds
    the same pair, and the global random state is untouched.
    """
    W = W.detach().float()
    if min(W.shape) <= EXACT_UP_TO:
        u, _, v = torch.linalg.svd(W, full_matrices=False)
        return u[:, 0], v[0]
    steps = KRYLOV_STEPS if v is None else WARM_STEPS
    start = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(0), dtype=W.dtype).to(W.device)
    v = start if v is None else v + 0.1 * start / start.norm()  # a pair that is no longer the top one must not hold it
    for _ in range(MAX_RESTARTS):
        basis, images = [v / v.norm()], []  # orthonormal columns Q and W Q
        for _ in range(steps):
            images.append(torch.mv(W, basis[-1]))
            image, Q = torch.mv(W.T, images[-1]), torch.stack(basis, dim=1)
            following = image
            for _ in range(2):  # once leaves rounding errors that grow from step to step
                following = following - Q @ (Q.T @ following)
            norm = following.norm()
            if norm <= 1e-5 * image.norm():  # the space is exhausted: W has few distinct singular values
                break
            basis.append(following / norm)
        U, sigma, Zt = torch.linalg.svd(torch.stack(images, dim=1), full_matrices=False)
        u, v = U[:, 0], torch.stack(basis[: len(images)], dim=1) @ Zt[0]
        if (torch.mv(W.T, u) - sigma[0] * v).norm() <= TOLERANCE * sigma[0]:
            break
    return u, v
