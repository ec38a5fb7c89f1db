"""timm plugin: `import timm_stable` puts StableViT and σReparam ViT into timm's registry."""

from stable_core.extras import extra

with extra("timm"):
    from . import sigma_vit, stablevit  # noqa: F401  which register themselves
