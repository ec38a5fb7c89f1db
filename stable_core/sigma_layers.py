"""Finds the layers of a model that have σReparam, by their attributes and not by their class."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from .sigma_reparam import SigmaReparam


def sigma_layers(model: nn.Module) -> "Iterator[tuple[str, SigmaReparam]]":
    """(name, parametrization) of every SigmaReparam in `model`, named as `encoder.layers.0.fc1` or `attn.in_proj_weight`.

    Weights that share a sigma have one, under the name of the layer that holds it. Models that ship a copy of this package
    (transformers' trust_remote_code), and so have other classes, are found, too.
    """
    for name, module in model.named_modules():
        if is_sigma(module):
            layer, _, tensor = name.removesuffix(".0").rpartition("parametrizations.")
            yield (layer.removesuffix(".") if tensor == "weight" else layer + tensor), module


def is_sigma(module: nn.Module) -> "TypeGuard[SigmaReparam]":
    """Whether a module is a SigmaReparam, which holds gamma and u, of this or another copy of the package."""
    return isinstance(module._buffers.get("u"), Tensor) and hasattr(module, "gamma") and hasattr(module, "rows")
