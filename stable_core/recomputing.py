"""No copy of the weights in training: W_hat is made again for the backward pass instead of being kept for it.

Autograd keeps a layer's weight for the backward pass. A plain weight is a parameter, which is there anyway (and which FSDP2
frees in between), but W_hat is one more tensor of its size, for every weight and on every process. (Activation checkpointing
does not keep it either.)
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .targets import Model

# Of every forward pass under way, innermost last: where a W_hat lies -> (its storage, how to make it).
_made: list[dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]]] = []


def recompute(model: Model) -> Model:
    """From now on the forward passes of `model` keep no W_hat for their backward passes, and it returns the model.

    The gradients are bit for bit the same. It costs one more scaling of every weight a step, and saves a copy of them: the
    price of σReparam in memory. Call it on what is called in training, so after `fully_shard`, or on the model inside of DDP.
    A compiled model decides for itself what it keeps.

    Raises:
        ValueError: it was called on `model` before.
    """
    if hasattr(model, "_recomputed"):
        raise ValueError(f"{type(model).__name__}: its W_hat is recomputed already")
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        with _recomputing():
            return cls.forward(self, *args, **kwargs)

    # The model gets a class of its own, as FSDP2 does it. A hook after the forward pass would not be called if Ctrl-C ends it.
    model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "_recomputed": cls, "__module__": cls.__module__})
    return model


def keep(model: nn.Module) -> None:
    """Takes `recompute` back, in the model and whatever is in it."""
    for module in model.modules():
        if "_recomputed" in type(module).__dict__:
            module.__class__ = type(module).__dict__["_recomputed"]


@contextmanager
def _recomputing() -> Iterator[None]:
    made: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] = {}

    def pack(x: Tensor) -> Any:
        storage, make = made.get(x.untyped_storage().data_ptr(), (None, None))
        if storage is None or storage.expired():  # expired: x lies where a W_hat was that is gone
            return x
        return make, (x.shape, x.stride(), x.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        make, view = kept
        with torch.no_grad():
            return make().as_strided(*view)

    _made.append(made)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _made.pop()


def remember(W_hat: Tensor, make: Callable[[], Tensor]) -> None:
    """Notes that `make()` makes this W_hat again."""
    if _made and not torch.compiler.is_compiling():
        storage = W_hat.untyped_storage()
        _made[-1][storage.data_ptr()] = StorageWeakRef(storage), make
