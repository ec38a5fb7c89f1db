"""Which layers of a model have σReparam: by what they are, not by whose class they have."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from .sigma_reparam import SigmaReparam


def sigma_layers(model: nn.Module) -> "Iterator[tuple[str, SigmaReparam]]":
    """(layer, parametrization) of every sigma in `model`, where layer is `encoder.layers.0.fc1`, or `attn.in_proj_weight`.

    Weights that share a sigma are found once, at the layer that keeps it. A model that brought its own copy of this source
    (transformers' trust_remote_code) has classes of its own, and is found as well.
    """
    for name, module in model.named_modules():
        if is_sigma(module):
            layer, _, tensor = name.removesuffix(".0").rpartition("parametrizations.")
            yield (layer.removesuffix(".") if tensor == "weight" else layer + tensor), module


def is_sigma(module: nn.Module) -> "TypeGuard[SigmaReparam]":
    """Whether it is the parametrization that keeps gamma and u."""
    return isinstance(module._buffers.get("u"), Tensor) and hasattr(module, "gamma") and hasattr(module, "rows")
