"""timm plugin: `import timm_stable` puts StableViT and σReparam ViT into timm's registry."""

from . import sigma_vit, stablevit  # noqa: F401  which register themselves
