"""StableInit: weights whose largest singular value is at most 1 in expectation.

Source: "Stable-Transformer: Towards a Stable Transformer Training" (ICLR 2025 submission), eq. 1.
"""

import math
from typing import TypeVar

from torch import Tensor, nn

from .targets import layers

Given = TypeVar("Given", bound=nn.Module | Tensor)


def stable_init_(module_or_tensor: Given, gain: float = 1.0) -> Given:
    """W ~ N(0, (gain / (sqrt(n_in) + sqrt(n_out)))^2), in place, so that E sigma_max(W) <= gain [ST, eq. 1].

    (Xavier's normal initialisation has E sigma_max <= 2 [ST, Lemma 1].) A packed [Wq; Wk; Wv] is one matrix, as in the
    paper's listing.

    Args:
        module_or_tensor: a weight (out, in, ...), where a convolution's kernel counts as inputs; or a module, of which every
            Linear, Conv1d and Conv2d, transformers' Conv1D and the projections of nn.MultiheadAttention are initialised,
            with biases of 0. Embeddings and norms are left as they are.
        gain: the upper bound of E sigma_max(W), positive.

    Returns:
        module_or_tensor.

    Raises:
        ValueError: gain is not positive; a tensor of fewer than two dimensions; a module without such a layer.
    """
    if not gain > 0:
        raise ValueError(f"gain = {gain!r}: allowed are positive numbers")
    if isinstance(module_or_tensor, Tensor):
        if module_or_tensor.ndim < 2:
            raise ValueError(f"a tensor of shape {tuple(module_or_tensor.shape)}: allowed are weights (out, in, ...)")
        _init(module_or_tensor, module_or_tensor.shape[0], gain)
        return module_or_tensor
    targets = list(layers(module_or_tensor))
    if not targets:
        raise ValueError(f"{type(module_or_tensor).__name__}: no Linear, Conv or attention layer to initialise")
    for target in targets:
        _init(target.weight, target.matrix.shape[0], gain)
        for name in ("bias", "in_proj_bias"):
            if isinstance(bias := getattr(target.module, name, None), Tensor):
                nn.init.zeros_(bias)
    return module_or_tensor


def _init(weight: Tensor, n_out: int, gain: float) -> None:
    nn.init.normal_(weight, 0.0, gain / (math.sqrt(weight.numel() // n_out) + math.sqrt(n_out)))
