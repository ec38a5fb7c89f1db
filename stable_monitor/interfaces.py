"""Functions of transformers' attention interface: (module, query, key, value, attention_mask, **kwargs), under whatever name.

Those of transformers end in kernels that are seen themselves. One that ends in no known kernel is seen by its arguments.
"""

import sys
from typing import Any

from torch import Tensor

from .kernel_calls import Arguments, Kernel, Scores
from .rules import flex, in_order, masked, softcap, window

POSITIONS = ("module", "query", "key", "value", "attention_mask")


def registries() -> list[dict[str, Any]]:
    """The dictionaries of transformers in which attention functions are registered; empty where it is not imported."""
    home = sys.modules.get("transformers.modeling_utils")
    everywhere, here = getattr(home, "AttentionInterface", None), getattr(home, "ALL_ATTENTION_FUNCTIONS", None)
    found = [getattr(everywhere, "_global_mapping", None), getattr(here, "_local_mapping", None)]
    return [registry for registry in found if isinstance(registry, dict)]


def interface_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a call by name."""
    return {**dict(zip(POSITIONS, args, strict=False)), **kwargs}


def _read(given: Arguments) -> list[Scores]:
    """What the arguments say: a mask of four dimensions or a BlockMask is all there is of masks, else causal and window."""
    q, k, mask, module = given["query"], given["key"], given.get("attention_mask"), given["module"]
    scale = q.shape[-1] ** -0.5 if given.get("scaling") is None else given["scaling"]
    rules = [softcap(given.get("softcap")), masked(given.get("position_bias"))]
    if isinstance(mask, Tensor) and mask.ndim == 4:
        rules.append(masked(mask))
    elif mask is not None and not isinstance(mask, Tensor):
        rules.append(flex(None, mask))
    else:
        is_causal = given.get("is_causal")
        is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        left = given.get("sliding_window")
        left = None if left is None else left - 1  # the window counts the query itself
        ahead = k.shape[2] - q.shape[2]
        rules.append(window(ahead, left, 0 if is_causal and q.shape[2] > 1 else left))
        rules.append(None if mask is None else masked(mask[:, None, None, -k.shape[2] :].bool()))
    return [Scores(q, k, scale, in_order(*rules), given.get("s_aux"))]


def _refuse(given: Arguments, tau: float) -> Arguments:
    raise ValueError(
        f"{type(given['module']).__name__}: the kernel of its attention function is not known, and its temperature cannot be "
        "changed; use attn_implementation='sdpa'"
    )


INTERFACE = Kernel(_read, _refuse)
