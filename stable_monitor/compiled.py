"""Measures compiled models, whose attention cannot be seen, by an additional eager forward pass of the same batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from stable_core.interrupted import compiled_call

from .interception import Interception


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers such as those of torch.compile, DistributedDataParallel and fairseq."""
    while len(model._modules) == 1 and (names := model._modules.keys() & {"_orig_mod", "module"}):
        inner: Any = model._modules[names.pop()]
        model = inner
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled."""
    return any(isinstance(m, OptimizedModule) or compiled_call(m) is not None for m in model.modules())


@contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """For forward passes of the model that training does not know of: eager, without gradient, and afterwards random numbers
    and buffers are what they were; what the model keeps elsewhere, such as a counter in Python, is not."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, before in buffers:
            module._buffers.update(before)
        for buffer, value in values:
            buffer.copy_(value)


@contextmanager
def probe_before_forward(
    called: nn.Module,
    model: nn.Module,
    interception: Interception,
    failed: Callable[[Exception], None],
    allowed: Callable[[], bool] = lambda: True,
    every_call: bool = False,
) -> Iterator[None]:
    """A context in which an eager forward pass of `model`, the probe, runs `unnoticed` before the first call of `called`.

    `interception` sees the attention of the probe.

    Args:
        called: the module that the training loop calls.
        model: the model inside it, in training mode; there is no probe in evaluation.
        interception: started for the probe alone.
        failed: called with the error of a probe that fails.
        allowed: asked before a probe whether it may run.
        every_call: probe before every call, not only before the first.
    """
    done = False

    def probe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal done
        if done or not (model.training and torch.is_grad_enabled()):
            return
        done = not every_call
        if not allowed():
            return
        interception.start()
        try:
            with unnoticed(model):
                model(*args, **kwargs)
        except Exception as error:  # the real forward pass may still succeed
            failed(error)
        finally:
            interception.stop()

    usual_call = called._compiled_call_impl
    if usual_call is not None:  # after model.compile(), which would compile a hook, too

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
