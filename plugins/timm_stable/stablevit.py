"""StableViT: timm's Vision Transformer with StableNorm, StableAtten and StableInit [ST, Table 1, App. F, G]."""

from timm.models import generate_default_cfgs, register_model

from .checkpoints import pretrained_filter_fn
from .vit import StableVisionTransformer, cfg, create

__all__ = ["StableVisionTransformer"]  # and the entrypoints, which register_model adds

default_cfgs = generate_default_cfgs(
    {f"stablevit_{size}": cfg() for size in ("small", "base", "large", "huge", "giant", "200")}
)


def _create(name: str, pretrained: bool, **kwargs) -> StableVisionTransformer:
    args = {"norm": "stable", "attention": "stable", "init": "stable", **kwargs}
    return create(pretrained_filter_fn, name, pretrained, **args)


@register_model
def stablevit_small(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """12 blocks of width 384, 6 heads, patch 16."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("stablevit_small", pretrained, **{**args, **kwargs})


@register_model
def stablevit_base(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """12 blocks of width 768, 12 heads, patch 16."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("stablevit_base", pretrained, **{**args, **kwargs})


@register_model
def stablevit_large(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """24 blocks of width 1024, 16 heads, patch 16: 304M [ST, Table 1: 307M]."""
    args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("stablevit_large", pretrained, **{**args, **kwargs})


@register_model
def stablevit_huge(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """32 blocks of width 1280, 16 heads, patch 14: 632M [ST, Table 1]."""
    args = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
    return _create("stablevit_huge", pretrained, **{**args, **kwargs})


@register_model
def stablevit_giant(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """40 blocks of width 1408 and MLPs of 6144, 16 heads, patch 14: 1011M [ST, Table 1]."""
    args = {"patch_size": 14, "embed_dim": 1408, "mlp_ratio": 48 / 11, "depth": 40, "num_heads": 16}
    return _create("stablevit_giant", pretrained, **{**args, **kwargs})


@register_model
def stablevit_200(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
    """200 blocks of width 768, 12 heads, patch 14: 1419M [ST, Table 1: 1439M, and no patch]."""
    args = {"patch_size": 14, "embed_dim": 768, "depth": 200, "num_heads": 12}
    return _create("stablevit_200", pretrained, **{**args, **kwargs})
