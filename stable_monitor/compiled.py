"""Compiled models cannot be looked into: a second, eager forward pass of the same batch can."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from stable_core.interrupted import compiled_call

from .interception import Interception


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel, fairseq's wrappers and the like."""
    while len(model._modules) == 1 and (names := model._modules.keys() & {"_orig_mod", "module"}):
        inner: Any = model._modules[names.pop()]
        model = inner
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled."""
    return any(isinstance(m, OptimizedModule) or compiled_call(m) is not None for m in model.modules())


@contextmanager
def probe_before_forward(
    called: nn.Module,
    model: nn.Module,
    interception: Interception,
    failed: Callable[[Exception], None],
    allowed: Callable[[], bool] = lambda: True,
    every_call: bool = False,
) -> Iterator[None]:
    """Within it, the first call of `called` in training mode, or every call, is preceded by an eager one of `model`, the model
    inside, without gradient, that `interception` sees, if that is allowed. Random numbers and buffers are then as if it had not
    been; what a forward pass keeps elsewhere, such as a counter in Python, is not."""
    done = False

    def probe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal done
        if done or not model.training:
            return
        done = not every_call
        if not allowed():
            return
        buffers = [(module, dict(module._buffers)) for module in model.modules()]
        values = [(buffer, buffer.clone()) for buffer in model.buffers()]
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        interception.start()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
                model(*args, **kwargs)
        except Exception as error:  # the real forward pass may still go well
            failed(error)
        finally:
            interception.stop()
            for module, before in buffers:
                module._buffers.update(before)
            for buffer, value in values:
                buffer.copy_(value)

    usual_call = called._compiled_call_impl
    if usual_call is not None:  # model.compile(): hooks would be part of what is compiled

        def call(*args: Any, **kwargs: Any) -> Any:
            probe(args, kwargs)
            return usual_call(*args, **kwargs)

        called._compiled_call_impl = call
        try:
            yield
        finally:
            called._compiled_call_impl = usual_call
    else:
        hook = called.register_forward_pre_hook(lambda _, args, kwargs: probe(args, kwargs), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
