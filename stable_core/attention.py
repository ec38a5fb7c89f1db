"""StableAtten, and the attentions that the Stable-Transformer paper holds it against.

Kernels take q, k, v of shape (batch, heads, tokens, head_dim), as `F.scaled_dot_product_attention` does, on which they all
run. Source: "Stable-Transformer: Towards a Stable Transformer Training" (ICLR 2025 submission), eq. 3, Section 3.3, App. N.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stable_norm import StableNorm


class NormalisedKernel(nn.Module):
    """softmax(q_norm(q) k_norm(k)^T / sqrt(d1)) v: QK-norm with `nn.RMSNorm`s, under which |logit| <= sqrt(d1) while gamma = 1
    [ST, Theorem 3]; StableAtten with `stable_qk_norms`."""

    def __init__(self, q_norm: nn.Module, k_norm: nn.Module) -> None:
        super().__init__()
        self.q_norm, self.k_norm = q_norm, k_norm

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal=False
    ) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, dropout_p, is_causal)


class L2Kernel(nn.Module):
    """softmax(-|q_i - k_j|_2^2 / sqrt(d1)) v [ST, App. N; Kim et al., 2021].

    Tied is what a layer makes it, by giving the queries for keys.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal=False
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5
        return F.scaled_dot_product_attention(*l2_features(q, k), v, attn_mask, dropout_p, is_causal, scale=scale)


def l2_features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (..., tokens, d1) -> q', k' (..., tokens, d1 + 1) with q'_i . k'_j = |q_i|^2 - |q_i - k_j|^2.

    Softmax over j does not see |q_i|^2, so that any kernel of dot-product attention is one of L2 attention.
    """
    return (
        torch.cat([2 * q, torch.ones_like(q[..., :1])], dim=-1),
        torch.cat([k, -k.square().sum(-1, keepdim=True)], dim=-1),
    )


def stable_qk_norms(
    head_dim: int,
    sequence_length: int,
    alpha: float,
    tau_scale: float = 1.0,
    eps: float = 1e-5,
    device=None,
    dtype=None,
) -> tuple[StableNorm, StableNorm]:
    """The norms of q and k that make dot-product attention StableAtten: softmax(tau * SN(q) SN(k)^T / d1^(2 alpha)) v,
    tau = 1.618 log2(N) [ST, eq. 3].

    tau / d1^(2 alpha), and sqrt(d1) against the attention's own 1 / sqrt(d1), are folded into the norm of q. N is the
    sequence length of the configuration, not that of the moment: a key-value cache must not change it.

    Raises:
        ValueError: sequence_length below 2, tau_scale not positive; what `StableNorm` refuses.
    """
    if not isinstance(sequence_length, int) or sequence_length < 2:
        raise ValueError(f"sequence_length = {sequence_length!r}: allowed are whole numbers from 2")
    if not tau_scale > 0:
        raise ValueError(f"tau_scale = {tau_scale!r}: allowed are positive numbers")
    scale = tau_scale * stable_tau(sequence_length) * head_dim ** (0.5 - 2 * alpha)
    made = {"device": device, "dtype": dtype}
    return StableNorm(head_dim, alpha, eps, scale, **made), StableNorm(head_dim, alpha, eps, **made)


def stable_tau(sequence_length: int) -> float:
    """tau = 1.618 log2(N) [ST, Section 3.3.2]."""
    return 1.618 * math.log2(sequence_length)


class StableAttention(nn.Module):
    """Multi-head self-attention with StableAtten: packed qkv, `stable_qk_norms`, output projection [ST, eq. 3].

    Args:
        dim: width of tokens, a multiple of num_heads.
        num_heads: h; d1 = dim / h.
        sequence_length: N of tau = 1.618 log2(N), the longest sequence that the model is configured for.
        alpha: of the StableNorm of queries and keys, from 0 to 1/2.
        tau_scale: multiple of tau; the paper tries 0.5, 1 and 2.
        qkv_bias, attn_drop, proj_drop: as in timm's attention.

    Shape: (batch, tokens, dim) to the same.

    Raises:
        ValueError: dim is no multiple of num_heads; what `stable_qk_norms` refuses.
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
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim = {dim!r}, num_heads = {num_heads!r}: dim must be a multiple of num_heads")
        made = {"device": device, "dtype": dtype}
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **made)
        self.kernel = NormalisedKernel(
            *stable_qk_norms(dim // num_heads, sequence_length, alpha, tau_scale, eps, **made)
        )
        self.proj = nn.Linear(dim, dim, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (batch, tokens, dim) to the same shape; attn_mask and is_causal as for torch's scaled_dot_product_attention."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.kernel(q, k, v, attn_mask, self.attn_drop if self.training else 0.0, is_causal)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
