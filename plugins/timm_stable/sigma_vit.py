"""ViT-S/B/L/H with σReparam on every Linear and Conv layer, the patch embedding included [σ, Section 4.1, App. H].

As in the paper without LayerNorm, and with gamma = sigma at the start; `_preln` has timm's pre-LN, and its last norm.
"""

from timm.models import generate_default_cfgs, register_model

from .checkpoints import pretrained_filter_fn
from .vit import StableVisionTransformer, cfg, create

__all__ = []  # the entrypoints, which register_model adds

SIZES = {
    "small_patch16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge_patch14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}
default_cfgs = generate_default_cfgs(
    {f"sigma_vit_{size}_224{variant}": cfg() for size in SIZES for variant in ("", "_preln")}
)


def _register(size: str, variant: str) -> None:
    name = f"sigma_vit_{size}_224{variant}"

    def entrypoint(pretrained: bool = False, **kwargs) -> StableVisionTransformer:
        args = {**SIZES[size], "norm": "layernorm" if variant else "none", "reparam": "sigma", **kwargs}
        return create(pretrained_filter_fn, name, pretrained, **args)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"ViT {size.replace('_', ', ')}, σReparam, {'pre-LN' if variant else 'no LayerNorm'}."
    globals()[name] = register_model(entrypoint)


for size in SIZES:
    for variant in ("", "_preln"):
        _register(size, variant)
