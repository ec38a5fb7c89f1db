"""The norms of a block, by name. Each maps (..., dim) to (..., dim)."""

from typing import Any

import torch
from torch import nn

from .registry import method, register_norm
from .stable_norm import StableNorm


def build_norm(
    dim: int,
    options: Any,
    *,
    eps: float = 1e-5,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The norm over `dim` features that `options.norm` names; `bias` is for LayerNorm only.

    Raises:
        WrongOption: there is no such norm.
    """
    return method("norm", options.norm).build(dim, options, eps=eps, bias=bias, device=device, dtype=dtype)


@register_norm("layernorm", "gamma (x - mean) / std + beta")
def _layernorm(dim: int, options: Any, *, eps: float, bias: bool, **made: Any) -> nn.Module:
    return nn.LayerNorm(dim, eps, bias=bias, **made)


@register_norm("rmsnorm", "gamma x / rms(x)")
def _rmsnorm(dim: int, options: Any, *, eps: float, bias: bool, **made: Any) -> nn.Module:
    return nn.RMSNorm(dim, eps, **made)


@register_norm("stable", "StableNorm, gamma d^alpha x / |x| [ST, eq. 2]")
def _stable(dim: int, options: Any, *, eps: float, bias: bool, **made: Any) -> nn.Module:
    return StableNorm(dim, options.alpha, eps, **made)


@register_norm("none", "no norm, for σReparam [σ, Section 4]")
def _none(dim: int, options: Any, **_: Any) -> nn.Module:
    return nn.Identity()
