"""What softmax sees of queries and keys, by name. All of them run on a stack's own kernel of dot-product attention.

Source: "Stable-Transformer: Towards a Stable Transformer Training" (ICLR 2025 submission), eq. 3, Section 3.3, App. N.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .registry import method, register_attention
from .stable_norm import StableNorm


class QueryKey(NamedTuple):
    """How queries q and keys k (..., tokens, d1) become those of softmax(q' k'^T / sqrt(d1)), with the d1 of before.

    A stack gives its attention module q_norm and k_norm, takes q for k where `tied`, norms both, keeps keys so in its cache,
    and then calls `features`, a function without parameters, on what it hands to its kernel. A scale of the logits is folded
    into q_norm.
    """

    q_norm: nn.Module
    k_norm: nn.Module
    features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    tied: bool = False

    @property
    def only_norms(self) -> bool:
        """Whether two norms are all, which attention with norms of q and k, such as timm's, can be given."""
        return self.features is None and not self.tied


def build_attention(
    head_dim: int,
    options: Any,
    sequence_length: int,
    *,
    eps: float = 1e-5,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> QueryKey:
    """What options.attention names, for heads of width head_dim.

    sequence_length is the longest that the model is configured for, the N of StableAtten's tau.

    Raises:
        WrongOption: no such attention.
        ValueError: what `stable_qk_norms` refuses.
    """
    build = method("attention", options.attention).build
    return build(head_dim, options, sequence_length=sequence_length, eps=eps, device=device, dtype=dtype)


@register_attention("dot", "q . k / sqrt(d1)")
def _dot(head_dim: int, options: Any, **_: Any) -> QueryKey:
    return QueryKey(nn.Identity(), nn.Identity())


@register_attention("qknorm", "RMSNorm of q and k: |logit| <= sqrt(d1) while gamma = 1 [ST, Theorem 3]")
def _qknorm(head_dim: int, options: Any, *, sequence_length: int, eps: float, **made: Any) -> QueryKey:
    return QueryKey(nn.RMSNorm(head_dim, eps, **made), nn.RMSNorm(head_dim, eps, **made))


@register_attention("stable", "StableAtten, tau SN(q) . SN(k) / d1^(2 alpha) [ST, eq. 3]")
def _stable(head_dim: int, options: Any, *, sequence_length: int, eps: float, **made: Any) -> QueryKey:
    return QueryKey(*stable_qk_norms(head_dim, sequence_length, options.alpha, options.tau_scale, eps, **made))


@register_attention("l2", "-|q - k|^2 / sqrt(d1) [ST, App. N; Kim et al., 2021]")
def _l2(head_dim: int, options: Any, **_: Any) -> QueryKey:
    return QueryKey(nn.Identity(), nn.Identity(), l2_features)


@register_attention("l2_tied", "the same with Wk = Wq, Lipschitz continuous; the weights of k are there and unused")
def _l2_tied(head_dim: int, options: Any, **_: Any) -> QueryKey:
    return QueryKey(nn.Identity(), nn.Identity(), l2_features, tied=True)


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
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
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
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    return StableNorm(head_dim, alpha, eps, scale, **made), StableNorm(head_dim, alpha, eps, **made)


def stable_tau(sequence_length: int) -> float:
    """tau = 1.618 log2(N) [ST, Section 3.3.2]."""
    return 1.618 * math.log2(sequence_length)
