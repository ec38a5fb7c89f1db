"""timm's `stablevit_*` and `sigma_vit_*`, and its plain Vision Transformers -> StableViT and SigmaViT."""

import argparse
import importlib
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ParseKwargs
from torch import nn
from torch.nn.utils import parametrize
from transformers import CLIPImageProcessor
from transformers.image_utils import PILImageResampling

from stable_core.attentions import stable_tau
from stable_core.options import Options
from stable_core.reparams import sigma_settings

from .configuration_stable_vit import SigmaViTConfig, StableViTConfig
from .conversion import check_equal, load_whole
from .exporting import export
from .modeling_stable_vit import SigmaViTForImageClassification, StableViTForImageClassification


@torch.no_grad()
def from_timm(vit: VisionTransformer) -> StableViTForImageClassification:
    """The same model, outputs equal to 1e-4, in evaluation mode.

    Raises:
        ValueError: no Vision Transformer of timm; one with an option that StableViT does not have, such as register tokens or
            another pooling than the class token's.
    """
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"{type(vit).__name__}: allowed are timm's stablevit_*, sigma_vit_* and vit_*")
    fields = {**_methods(vit), **_sizes(vit)}
    if fields["reparam"] == "none":
        model = StableViTForImageClassification(StableViTConfig(**fields))
    else:
        model = SigmaViTForImageClassification(SigmaViTConfig(**fields))
    state = {
        f"vit.{name}" if not name.startswith("head.") else name.replace("head", "classifier", 1): tensor
        for name, tensor in vit.state_dict().items()
    }
    load_whole(model, state, type(vit).__name__)
    size = (2, fields["num_channels"], fields["image_size"], fields["image_size"])
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(vit.pos_embed.device)
    model.to(images.device)
    check_equal(model.eval()(images).logits, vit.eval()(images), type(vit).__name__)
    return model


def _methods(vit: VisionTransformer) -> dict:
    """The methods that timm_stable's model says it has, as far as they can still be seen; timm's own has none of them."""
    attn, norm = vit.blocks[0].attn, vit.blocks[0].norm1
    if (options := getattr(vit, "options", None)) is None:
        plain = "none" if isinstance(norm, nn.Identity) else "layernorm"
        options = Options(
            norm=plain if isinstance(norm, nn.Identity | nn.LayerNorm) else "rmsnorm",
            attention="dot" if isinstance(attn.q_norm, nn.Identity) else "qknorm",
        )
    methods = dict(vars(options))
    if sigma_settings(options) is not None and not any(map(parametrize.is_parametrized, vit.modules())):  # folded
        methods["reparam"] = "none"
    if options.attention == "stable":  # tau is that of the image size that the model was built for
        one = stable_tau(vit.patch_embed.num_patches + 1) * attn.head_dim ** (0.5 - 2 * options.alpha)
        methods["tau_scale"] = attn.q_norm.scale / one
    return methods


def _sizes(vit: VisionTransformer) -> dict:
    """The other fields of the configuration, read off the modules."""
    block, patches = vit.blocks[0], vit.patch_embed
    if len({*patches.img_size, *patches.patch_size} - {patches.img_size[0], patches.patch_size[0]}):
        raise ValueError(f"img_size = {patches.img_size}, patch_size = {patches.patch_size}: allowed are squares")
    if vit.global_pool != "token":
        raise ValueError(f"global_pool = {vit.global_pool!r}: allowed is 'token'")
    return {
        "image_size": patches.img_size[0],
        "patch_size": patches.patch_size[0],
        "num_channels": patches.proj.in_channels,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "num_labels": vit.num_classes,
        "norm_eps": getattr(block.norm1, "eps", 1e-6),
        "qk_norm_eps": getattr(block.attn.q_norm, "eps", None),
    }


def image_processor(vit: VisionTransformer) -> CLIPImageProcessor:
    """timm's evaluation transform: resized by the shorter side, cropped at the centre, normalised."""
    cfg, side = timm.data.resolve_model_data_config(vit), vit.patch_embed.img_size[0]
    return CLIPImageProcessor(
        size={"shortest_edge": int(side / cfg["crop_pct"])},
        crop_size={"height": side, "width": side},
        resample=PILImageResampling[cfg["interpolation"].upper()],
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arch", metavar="ARCH", help="stablevit_large, sigma_vit_base_patch16_224, ...")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument(
        "--device-modules", nargs="*", default=[], metavar="MODULE", help="timm's: timm_stable, for our models"
    )
    parser.add_argument("--checkpoint", default="", metavar="FILE", help="what timm's train.py or the recipes wrote")
    parser.add_argument(
        "--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE", help="num_classes=10 ..."
    )


def run(args: argparse.Namespace) -> Path:
    for module in args.device_modules:
        importlib.import_module(module)
    if not timm.is_model(args.arch):
        raise ValueError(
            f"{args.arch}: no model of timm; --device-modules timm_stable adds stablevit_* and sigma_vit_*"
        )
    vit = timm.create_model(args.arch, **args.model_kwargs)
    if args.checkpoint:
        try:
            timm.models.load_checkpoint(vit, args.checkpoint)
        except OSError:
            raise
        except Exception as error:  # of a damaged file, whatever its bytes lead to
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{args.checkpoint}: no checkpoint of {args.arch}: {what}") from error
    return export(from_timm(vit), args.out, processors=(image_processor(vit),))
