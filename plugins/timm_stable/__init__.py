"""timm plugin: `import timm_stable` puts StableViT and σReparam ViT into timm's registry."""

from . import stablevit  # noqa: F401  which registers itself
