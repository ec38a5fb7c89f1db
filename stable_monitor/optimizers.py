"""One optimizer, or several in a list, tuple or dict."""

from collections.abc import Iterable
from typing import Any

import torch

Optimizers = torch.optim.Optimizer | list[Any] | tuple[Any, ...] | dict[Any, Any]


def listed(optimizers: Optimizers) -> list[Any]:
    """The optimizers as a list; any object with param_groups counts as one, such as a wrapper.

    Raises:
        ValueError: there is no optimizer, or one of them is something else.
    """
    found = list(optimizers.values()) if isinstance(optimizers, dict) else optimizers
    found = list(found) if isinstance(found, list | tuple) else [found]
    if not found or not all(isinstance(getattr(x, "param_groups", None), Iterable) for x in found):
        raise ValueError(
            f"optimizer = {short(optimizers)}: allowed are an optimizer, or several in a list, tuple or dict"
        )
    return found


def short(x: Any) -> str:
    """repr(x) for an error of one line; the name of its type where that is too long."""
    text = repr(x)
    return text if len(text) <= 60 and "\n" not in text else type(x).__name__
