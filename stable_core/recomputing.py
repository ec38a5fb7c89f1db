"""Saves the memory of W_hat in training, by computing it again for the backward pass.

Autograd keeps each layer's weight for the backward pass. A plain weight takes no more memory by it, as it is a parameter (which
FSDP2 frees in between), but W_hat is one more tensor of the same size for every weight, on every process. Activation
checkpointing does not keep W_hat either.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .targets import Model

# One dict for each running forward pass, innermost last: address of a W_hat -> (its storage, a function that makes it).
_made: list[dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]]] = []


def recompute(model: Model) -> Model:
    """Makes `model` compute each W_hat again in the backward pass instead of keeping it, and returns the model.

    Gradients are bitwise the same. It saves one copy of all reparametrised weights, and costs one more scaling of each in a
    step. Call it on the module that the training loop calls, after `fully_shard`; with DDP, on the model inside it. It has no
    effect in compiled code, where the compiler chooses what is kept.

    Raises:
        ValueError: `recompute` was called on `model` before.
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

    # The model gets a class of its own, as under FSDP2. A forward hook would not be called where Ctrl-C ends the pass.
    model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "_recomputed": cls, "__module__": cls.__module__})
    return model


def keep(model: nn.Module) -> None:
    """Undoes `recompute` in the model and all of its submodules."""
    for module in model.modules():
        if "_recomputed" in type(module).__dict__:
            module.__class__ = type(module).__dict__["_recomputed"]


@contextmanager
def _recomputing() -> Iterator[None]:
    made: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] = {}

    def pack(x: Tensor) -> Any:
        storage, make = made.get(x.untyped_storage().data_ptr(), (None, None))
        if storage is None or storage.expired():  # expired: the W_hat at this address was freed
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
    """Registers `make`, which computes this W_hat again, with the innermost forward pass under `recompute`, if any."""
    if _made and not torch.compiler.is_compiling():
        storage = W_hat.untyped_storage()
        _made[-1][storage.data_ptr()] = StorageWeakRef(storage), make
