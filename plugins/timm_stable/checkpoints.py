"""Checkpoints of timm's plain Vision Transformers, and our own of other sizes, for a reparametrised one."""

import copy

from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter_fn
from torch import Tensor

from stable_core import SigmaReparamConfig, fold, sigma_reparam
from stable_core.folding import fold_state_dict
from stable_core.layout import KEY
from stable_core.reparams import sigma_settings

from .vit import StableVisionTransformer


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: StableVisionTransformer) -> dict[str, Tensor]:
    """A checkpoint of timm's plain ViT as one of `model`, its function kept (gamma = sigma); one of `model` as it is.

    Both are fitted as timm fits them: position embeddings to the image size, the patch embedding to patches and channels. A
    head for other classes is left out. What else is missing, too much or of another shape is for the loading to refuse.
    """
    if sigma_settings(model.options) is None:
        return timm_filter_fn(state_dict, model)
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    own, trained = model.state_dict(), any(_PARAMETRIZED in name for name in state_dict)
    if _shapes(state_dict) == _shapes(own):
        return state_dict
    given = timm_filter_fn(fold_state_dict(state_dict) if trained else state_dict, model)
    stem, head = given.get("patch_embed.proj.weight"), given.get("head.bias")
    if stem is not None and stem.shape[1] != model.in_chans:
        given["patch_embed.proj.weight"] = adapt_input_conv(model.in_chans, stem, stem.shape[1])
    if head is not None and len(head) != model.num_classes:
        given = _without_head(given)
    plain = fold(copy.deepcopy(model))
    missing, unexpected = plain.load_state_dict(given, strict=False)
    config = sigma_settings(model.options)
    if config.kind != "weight":  # which keeps the function by itself
        config = SigmaReparamConfig(gamma_init="spectral", qkv=config.qkv)
    fitted = sigma_reparam(plain, config).state_dict()
    if trained:  # where nothing had to be fitted W stays as it was trained, whose size the function does not show
        other = {_layer(name) for name, x in state_dict.items() if name not in own or x.shape != own[name].shape}
        fitted |= {name: x for name, x in state_dict.items() if _PARAMETRIZED in name and _layer(name) not in other}
    absent = {*missing, *(name.removesuffix(".weight") for name in missing)}
    fitted = {name: x for name, x in fitted.items() if _layer(name) not in absent}
    return fitted | {name: given[name] for name in unexpected}


_PARAMETRIZED = ".parametrizations."


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple]:
    """Without the layouts, which a checkpoint from before lacks."""
    return {name: tuple(x.shape) for name, x in state_dict.items() if not name.endswith(KEY)}


def _layer(name: str) -> str:
    return name.partition(_PARAMETRIZED)[0]


def _without_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state_dict.items() if not name.startswith("head.")}


def pretrained_filter_fn(state_dict: dict[str, Tensor], model: StableVisionTransformer) -> dict[str, Tensor]:
    """The same for `pretrained=True`, where timm leaves out a head for other classes by the names it has in a plain model."""
    fitted = checkpoint_filter_fn(state_dict, model)
    if sigma_settings(model.options) is None:
        return fitted
    return fitted if model.num_classes == model.pretrained_cfg["num_classes"] else _without_head(fitted)
