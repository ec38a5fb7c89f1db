"""Undoes what was begun for a forward pass, where that ends in an error of any kind.

A forward hook with always_call=True is not enough: torch does not call it for Ctrl-C and the like, which are no `Exception`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Undo = Callable[[BaseException], None]


class _Guarded:
    """What torch calls for a model in place of its `_call_impl`.

    It is put where `model.compile()` puts the compiled call, an attribute that torch leaves out of copies and pickles.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.compiled = model, model._compiled_call_impl
        self.undo: dict[int, Undo] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.model._call_impl(*args, **kwargs)
        # Replicas of nn.DataParallel share this object; which module is called stands in its caller, `_wrapped_call_impl`.
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
    """Has undo(error) called where a call of the model ends in an error, until the handle is removed."""
    guard = model._compiled_call_impl
    if not isinstance(guard, _Guarded):
        guard = model._compiled_call_impl = _Guarded(model)
    return Handle(guard, undo)


def compiled_call(model: nn.Module) -> Callable[..., Any] | None:
    """What `model.compile()` made, if it was called."""
    call = model._compiled_call_impl
    return call.compiled if isinstance(call, _Guarded) else call


class Handle:
    """What `on_error` gives."""

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
