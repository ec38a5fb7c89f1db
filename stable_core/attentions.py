"""Attentions by name: how logits are made of queries and keys. Each runs on the stack's own dot-product attention kernel.

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
    """How queries q and keys k (..., tokens, d1) are changed to q', k' before the kernel computes softmax(q' k'^T / sqrt(d1)).

    d1 is the head size before the change. A stack's attention module holds q_norm and k_norm. Its forward pass takes q for k
    where `tied`, applies both norms, stores the keys in its cache in this form, and then applies `features`, a function without
    parameters, to what the kernel is given. Another scale of the logits is folded into q_norm.
    """

    q_norm: nn.Module
    k_norm: nn.Module
    features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    tied: bool = False

    @property
    def only_norms(self) -> bool:
        """Whether it is no more than two norms, so that any attention with QK-norm, such as timm's, can use it."""
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
    """The attention that `options.attention` names.

    Args:
        head_dim: d1, the size of a head.
        options: an Options.
        sequence_length: the longest that the model is configured for, N in StableAtten's tau.
        eps: of the norms.

    Raises:
        WrongOption: there is no such attention.
        ValueError: as `stable_qk_norms`.
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

    |q_i|^2 is the same for all j, so that softmax over j does not change by it: a dot-product kernel computes L2 attention.
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

    The factor tau / d1^(2 alpha), times sqrt(d1) to cancel the kernel's 1 / sqrt(d1), is folded into the norm of q. N is the
    sequence length of the configuration, not of the input, so that tau is the same with a key-value cache.

    Args:
        head_dim: d1.
        sequence_length: N, from 2.
        alpha, eps: of `StableNorm`.
        tau_scale: factor by which tau is multiplied, above 0.

    Raises:
        ValueError: one of these is not allowed.
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
