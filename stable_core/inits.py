"""The first weights of Linear and Conv layers, by name."""

from typing import Any

import torch
from torch import Tensor, nn

from .registry import method, register_init
from .stable_init import stable_init_
from .targets import layers


@torch.no_grad()
def init_(module_or_weight: nn.Module | Tensor, options: Any) -> None:
    """Draws the weights of a module's layers, or one weight (out, in, ...), in place, by the method `options.init`.

    "stock" changes nothing. Other methods also set biases of a module's layers to 0. A convolution's kernel counts as inputs.

    Raises:
        WrongOption: there is no such initialisation.
    """
    draw_ = method("init", options.init).build
    if isinstance(module_or_weight, Tensor):
        draw_(module_or_weight.flatten(1))
    else:
        for target in layers(module_or_weight) if options.init != "stock" else ():
            draw_(target.weight.T if target.transposed else target.weight.flatten(1))
            for name in ("bias", "in_proj_bias"):
                if isinstance(bias := getattr(target.module, name, None), Tensor):
                    nn.init.zeros_(bias)


@register_init("stock", "the stack's own")
def _stock(weight: Tensor) -> None:
    pass


@register_init("stable", "StableInit, N(0, (1 / (sqrt(in) + sqrt(out)))^2) [ST, eq. 1]")
def _stable(weight: Tensor) -> None:
    stable_init_(weight)


@register_init("xavier", "N(0, 2 / (in + out)) [Glorot and Bengio, 2010]")
def _xavier(weight: Tensor) -> None:
    nn.init.xavier_normal_(weight)
