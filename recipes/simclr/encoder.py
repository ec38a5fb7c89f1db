"""The ViT encoders of the four variants [σ, Tables 3 and 6]: initialisation, positions, what is frozen."""

import timm
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import timm_stable  # noqa: F401  which registers the models

VARIANTS = {
    "baseline": "vit_base_patch16_224",
    "frozen_patcher": "vit_base_patch16_224",
    "sigma": "sigma_vit_base_patch16_224",
    "sigma_preln": "sigma_vit_base_patch16_224_preln",
}


def encoder(variant: str, img_size: int | None, model_kwargs: dict) -> VisionTransformer:
    """images -> the class token after the last block, and after the last norm where there is one.

    Args:
        variant: of VARIANTS.
        img_size: side of the images, pixels; None: 224.
        model_kwargs: timm's, to change ViT-B/16.

    Raises:
        ValueError: timm refuses model_kwargs.
    """
    moco = not variant.startswith("sigma")
    init = {"weight_init": "moco"} if moco else {}  # the σ variants' own is trunc_normal(.02)
    try:
        vit = timm.create_model(VARIANTS[variant], num_classes=0, img_size=img_size, **init, **model_kwargs)
        fix_positions(vit)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"model_kwargs = {model_kwargs}: {error}") from None
    if moco:  # timm's leaves the patch embedding out; a view, as MoCo v3 counts a patch as one input
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(vit.patch_embed.proj.bias)
    vit.patch_embed.requires_grad_(variant != "frozen_patcher")
    return vit


@torch.no_grad()
def fix_positions(vit: VisionTransformer) -> None:
    """MoCo v3's position embedding: stacked 2D sines and cosines, nothing for the class token, not trained."""
    patches = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim, interleave_sin_cos=True)
    vit.pos_embed.copy_(F.pad(patches, (0, 0, vit.num_prefix_tokens, 0)))
    vit.pos_embed.requires_grad_(False)
