"""Calls a clean-up function where a forward pass ends in an error of any kind.

A forward hook with always_call=True is not enough: torch does not call it for KeyboardInterrupt (Ctrl-C) and others that are no
`Exception`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Undo = Callable[[BaseException], None]


class _Guarded:
    """Replaces a model's `_call_impl`, which torch calls for a forward pass, and calls it with clean-up.

    It is set as `_compiled_call_impl`, as `model.compile()` does, because torch leaves that out of copies and pickles.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.compiled = model, model._compiled_call_impl
        self.undo: dict[int, Undo] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.model._call_impl(*args, **kwargs)
        # Replicas of nn.DataParallel share this object: the called module is read off the caller, `_wrapped_call_impl`.
        module = sys._getframe(1).f_locals.get("self", self.model)
        if module is not self.model:
            return module._call_impl(*args, **kwargs)
        try:
            return (self.compiled or self.model._call_impl)(*args, **kwargs)
        except BaseException as error:
            for undo in list(self.undo.values()):
                undo(error)
            raise


def on_error(model: nn.Module, undo: Undo) -> "Handle":
    """Calls undo(error) where a call of the model ends in an error, until the returned handle is removed."""
    guard = model._compiled_call_impl
    if not isinstance(guard, _Guarded):
        guard = model._compiled_call_impl = _Guarded(model)
    return Handle(guard, undo)


def compiled_call(model: nn.Module) -> Callable[..., Any] | None:
    """The compiled call that `model.compile()` made; None if the model is not compiled."""
    call = model._compiled_call_impl
    return call.compiled if isinstance(call, _Guarded) else call


class Handle:
    """Returned by `on_error`; `remove` ends its effect."""

    def __init__(self, guard: _Guarded, undo: Undo) -> None:
        self._guard, self._key = guard, id(self)
        guard.undo[self._key] = undo

    def remove(self) -> None:
        guard = self._guard
        guard.undo.pop(self._key, None)
        if not guard.undo and guard.model._compiled_call_impl is guard:
            del guard.model._compiled_call_impl
            if guard.compiled is not None:
                guard.model._compiled_call_impl = guard.compiled
