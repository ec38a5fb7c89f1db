"""A user's word on which modules are attention, where that cannot be seen: `attention={"blocks.*.mix": "softmax"}`."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor, nn

from .compiled import unnoticed
from .interception import without_wrappers
from .kernel_calls import Arguments, Kernel, Scores
from .rules import masked

Chosen = Mapping[str, str | Callable[..., Any]]
ALLOWED = (
    'allowed is a dictionary of names of modules, with * for any part, to "softmax" (a softmax in it is attention\'s) or to a '
    "function (module, args, kwargs) -> (q, k, scale, mask)"
)


def choose(model: nn.Module, attention: Chosen | None) -> dict[str, str | Kernel]:
    """What `attention` says of each module of `model`, by name; of several names that match a module the first one counts.

    Raises:
        ValueError: `attention` is something else, or a name is that of no module.
    """
    if not isinstance(attention, Mapping | None):
        raise ValueError(f"attention = {attention!r}: {ALLOWED}")
    found: dict[str, str | Kernel] = {}
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    for pattern, how in (attention or {}).items():
        if how != "softmax" and not callable(how):
            raise ValueError(f"attention = {{{pattern!r}: {how!r}}}: {ALLOWED}")
        matching = [name for name in modules if fnmatchcase(name, str(pattern))]
        if not matching:
            some = ", ".join(name for name in list(modules)[1:9])
            raise ValueError(f"attention = {{{pattern!r}: ...}}: no module has that name; there are {some}, ...")
        for name in matching:
            found.setdefault(name, how if isinstance(how, str) else _kernel(how))
    return found


def _kernel(function: Callable[..., Any]) -> Kernel:
    return Kernel(partial(_read, function), _refuse)


def _read(function: Callable[..., Any], given: Arguments) -> list[Scores]:
    module = given["module"]
    with unnoticed(module):
        answer = function(module, given["args"], given["kwargs"])
    try:
        q, k, scale, mask = answer
        fits = q.ndim == k.ndim == 4 and isinstance(scale, Real) and isinstance(mask, Tensor | None)
    except (TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            "the function given for it in attention must return (q, k, scale, mask): q and k (batch, heads, tokens, head_dim), "
            "a number, and None or a mask as scaled_dot_product_attention takes it"
        )
    return [Scores(q, k, float(scale), masked(mask))]


def _refuse(given: Arguments, tau: float) -> Arguments:
    raise ValueError(
        f"{type(given['module']).__name__}: its attention is read by a function, and its temperature cannot be changed; "
        'name it as "softmax", if its softmax is written out'
    )
