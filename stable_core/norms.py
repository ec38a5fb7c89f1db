"""The norms of a block, by name: (..., dim) to the same."""

from torch import nn

from .registry import method, register_norm
from .stable_norm import StableNorm


def build_norm(dim: int, options, *, eps: float = 1e-5, bias: bool = True, device=None, dtype=None) -> nn.Module:
    """The norm that options.norm names; `bias` is LayerNorm's.

    Raises:
        WrongOption: no such norm.
    """
    return method("norm", options.norm).build(dim, options, eps=eps, bias=bias, device=device, dtype=dtype)


@register_norm("layernorm", "gamma (x - mean) / std + beta")
def _layernorm(dim, options, *, eps, bias, device, dtype):
    return nn.LayerNorm(dim, eps, bias=bias, device=device, dtype=dtype)


@register_norm("rmsnorm", "gamma x / rms(x)")
def _rmsnorm(dim, options, *, eps, bias, device, dtype):
    return nn.RMSNorm(dim, eps, device=device, dtype=dtype)


@register_norm("stable", "StableNorm, gamma d^alpha x / |x| [ST, eq. 2]")
def _stable(dim, options, *, eps, bias, device, dtype):
    return StableNorm(dim, options.alpha, eps, device=device, dtype=dtype)


@register_norm("none", "no norm, for σReparam [σ, Section 4]")
def _none(dim, options, **_):
    return nn.Identity()
