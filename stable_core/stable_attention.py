"""StableAtten as a module of its own, for models that are written with it.

Source: "Stable-Transformer: Towards a Stable Transformer Training" (ICLR 2025 submission), eq. 3, Section 3.3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attentions import stable_qk_norms


class StableAttention(nn.Module):
    """Multi-head self-attention with StableAtten: packed qkv, `stable_qk_norms`, output projection [ST, eq. 3].

    Args:
        dim: width of tokens, a multiple of num_heads.
        num_heads: h; d1 = dim / h.
        sequence_length: N of tau = 1.618 log2(N), the longest sequence that the model is configured for.
        alpha: exponent of the StableNorm of queries and keys, from 0 to 1/2.
        tau_scale: factor by which tau is multiplied; the paper tries 0.5, 1 and 2.
        qkv_bias, attn_drop, proj_drop: as in timm's attention.

    Shape: (batch, tokens, dim) to the same.

    Raises:
        ValueError: dim is no multiple of num_heads; as `stable_qk_norms`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sequence_length: int,
        alpha: float,
        *,
        tau_scale: float = 1.0,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim = {dim!r}, num_heads = {num_heads!r}: dim must be a multiple of num_heads")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **made)
        self.q_norm, self.k_norm = stable_qk_norms(dim // num_heads, sequence_length, alpha, tau_scale, eps, **made)
        self.proj = nn.Linear(dim, dim, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (batch, tokens, dim) to the same shape; attn_mask and is_causal as for torch's scaled_dot_product_attention."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, dropout, is_causal)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
