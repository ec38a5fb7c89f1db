"""Residual connections by name: the place of a block's norm, and how its branch is added."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .deepnorm import deepnorm_scales
from .registry import method, register_residual
from .targets import layers, rows_beside_qk


class Residual(NamedTuple):
    """x + f(norm(x)) if `norm_first`, else norm(alpha x + f(x)); the first weights of f are multiplied by beta."""

    norm_first: bool
    alpha: float = 1.0
    beta: float = 1.0

    def connect(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """The next x (..., width), from x, the norm, and the branch f, which maps (..., width) to the same shape."""
        return x + branch(norm(x)) if self.norm_first else norm(branch(x).add(x, alpha=self.alpha))


def build_residuals(options: Any, encoder_layers: int, decoder_layers: int) -> tuple[Residual, Residual]:
    """The residual connections (encoder's, decoder's) that `options.residual` names; either side may have no layers.

    Raises:
        WrongOption: there is no such residual connection.
        ValueError: as `deepnorm_scales`.
    """
    return method("residual", options.residual).build(encoder_layers, decoder_layers)


@register_residual("pre-ln", "x + f(norm(x))")
def _pre_ln(encoder_layers: int, decoder_layers: int) -> tuple[Residual, Residual]:
    return Residual(True), Residual(True)


@register_residual("post-ln", "norm(x + f(x)), and no norm after the last block")
def _post_ln(encoder_layers: int, decoder_layers: int) -> tuple[Residual, Residual]:
    return Residual(False), Residual(False)


@register_residual("deepnorm", "norm(alpha x + f(x)), first weights of f times beta [Wang et al., 2022]")
def _deepnorm(encoder_layers: int, decoder_layers: int) -> tuple[Residual, Residual]:
    encoder, decoder = deepnorm_scales(encoder_layers, decoder_layers)
    return Residual(False, *encoder), Residual(False, *decoder)


def scale_branches_(block: nn.Module, beta: float) -> None:
    """Multiplies all weights of a block but those of q and k by beta, in place: v, output and feed-forward layers.

    Raises:
        ValueError: q, k and v are packed in an unknown order.
    """
    for target in layers(block) if beta != 1 else ():
        scale_rows_(target.weight.T if target.transposed else target.weight, rows_beside_qk(block, target), beta)


@torch.no_grad()
def scale_rows_(weight: Tensor, rows: Tensor | slice, beta: float) -> None:
    """Multiplies rows of one weight (out, in) by beta, in place; `rows` is as `targets.rows_beside_qk` returns it."""
    weight[rows] *= beta
