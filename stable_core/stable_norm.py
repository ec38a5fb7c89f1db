"""StableNorm: RMSNorm with the length of its output d^alpha in place of sqrt(d), for a width of d.

Source: "Stable-Transformer: Towards a Stable Transformer Training" (ICLR 2025 submission), eq. 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StableNorm(nn.Module):
    """StableNorm(x) = gamma * d^alpha * x / sqrt(|x|_2^2 + eps) over the last dimension, of size d [ST, eq. 2].

    alpha = 1/2 is RMSNorm; alpha = 0 gives vectors of length 1 (while gamma = 1). The norm of its Jacobian is at most
    d^alpha / sqrt(eps). It is computed as d^(alpha - 1/2) * rms_norm(x, eps / d), by torch's fused kernel. The paper uses
    alpha = 0.475 for GPT and 0.25 for StableViT-g. (Its listing adds eps to |x| outside the root, and starts from alpha = 0.)

    Args:
        dim: d.
        alpha: from 0 to 1/2.
        eps: positive; the paper's text says 1e-5.
        scale: a constant factor of the output, into which StableAtten folds tau.

    Shape: (..., dim) to the same.

    Raises:
        ValueError: dim, alpha or eps out of range.
    """

    def __init__(
        self,
        dim: int,
        alpha: float,
        eps: float = 1e-5,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim = {dim!r}: allowed are whole numbers from 1")
        if not 0 <= alpha <= 0.5:
            raise ValueError(f"alpha = {alpha!r}: allowed are numbers from 0 to 0.5")
        if not eps > 0:
            raise ValueError(f"eps = {eps!r}: allowed are positive numbers")
        self.dim, self.alpha, self.eps, self.scale = dim, alpha, eps, scale
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma = 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) to the same shape."""
        weight = self.weight * (self.scale * self.dim ** (self.alpha - 0.5))
        return F.rms_norm(x, (self.dim,), weight, self.eps / self.dim)

    def extra_repr(self) -> str:
        return f"{self.dim}, alpha={self.alpha}, eps={self.eps}" + (
            f", scale={self.scale:.4g}" if self.scale != 1 else ""
        )
