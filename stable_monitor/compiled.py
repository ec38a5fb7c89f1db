"""Sees attention in training where it is compiled, by an additional eager forward pass of the same batch, the probe.

What is compiled runs without hooks and modes, or is compiled again for them. The probe compiles nothing, and leaves compiled
code as it is. A custom operator in the graph would need none, but is called, if for nothing, in every update: that costs
more than a probe in 100 updates, and CUDA graphs would not ask it again whether to look.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters

from stable_core.interrupted import compiled_call

from .calls import Handler
from .interception import Interception
from .kernel_calls import Kernel


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers such as those of torch.compile, DistributedDataParallel and fairseq."""
    while len(model._modules) == 1 and (names := model._modules.keys() & {"_orig_mod", "module"}):
        inner: Any = model._modules[names.pop()]
        model = inner
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, a part of it, or a function that its classes call by name is compiled.

    Functions that others compile, as transformers' FlexAttention, are known only when they have run."""
    modules = list(model.modules())
    return any(
        isinstance(m, OptimizedModule) or compiled_call(m) is not None or _is_compiled_function(m.forward)
        for m in modules
    ) or any(_calls_compiled_function(kind) for kind in {type(m) for m in modules})


def _is_compiled_function(value: object) -> bool:
    compiled = isinstance(value, FunctionType | MethodType) and hasattr(value, "_torchdynamo_orig_callable")
    return compiled and not hasattr(value, "_torchdynamo_disable")


def _calls_compiled_function(kind: type) -> bool:
    methods = [value for value in vars(kind).values() if isinstance(value, FunctionType)]
    return any(_is_compiled_function(m.__globals__.get(name)) for m in methods for name in m.__code__.co_names)


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


class TrainingInterception(Interception):
    """An `Interception` of forward passes in training, with hooks where they run eagerly and by probes where not.

    Hooks are kept from compiled code that is known before it runs. Other code is compiled once more for them, by which it is
    noticed: then the pass is repeated by a probe, and all later ones are probed.

    Args:
        called: the module that the training loop calls.
        model, handler, finished, failed: as for `Interception`.
        unmeasured: called with the error of a probe that fails.
        allowed: asked before a probe whether it may run.
        every_call: probe before every call of an update, not only before the first.
        chosen: as for `Interception`.
        timed: makes a context in which hooks are installed and probes run.
    """

    def __init__(
        self,
        called: nn.Module,
        model: nn.Module,
        handler: Handler,
        *,
        finished: Callable[[Any], None] = lambda output: None,
        failed: Callable[[], None] = lambda: None,
        unmeasured: Callable[[Exception], None],
        allowed: Callable[[], bool] = lambda: True,
        every_call: bool = False,
        chosen: Mapping[str, str | Kernel] = types.MappingProxyType({}),
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        # order=1: it sees calls after other interceptions, such as attention_temperature, have changed them.
        super().__init__(model, handler, order=1, finished=finished, failed=failed, chosen=chosen)
        self._called, self._unmeasured, self._allowed, self._every_call = called, unmeasured, allowed, every_call
        self._timed = timed
        self._noticed = False  # compiled code, in a pass with hooks
        self._pass: tuple[tuple[Any, ...], dict[str, Any], int] | None = None  # arguments, graphs compiled before

    def needs_probe(self) -> bool:
        """Whether passes are probed, and have no hooks."""
        return self._noticed or is_compiled(self._called)

    @contextmanager
    def of_training(self) -> Iterator[None]:
        """A context in which passes in training mode are seen; a probe runs before the first of them, or each."""
        if self.needs_probe():
            with self._probed():
                yield
            return
        self.start_with_training()
        try:
            yield
        except GeneratorExit:
            self.abandon()
            raise
        finally:
            self.stop()

    @contextmanager
    def _probed(self) -> Iterator[None]:
        called, done = self._called, False

        def probe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal done
            if done or not (self._model.training and torch.is_grad_enabled()):
                return
            done = not self._every_call
            self.start()
            try:
                self._probe(args, kwargs)
            finally:
                self.stop()

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

    def _install(self) -> None:
        with self._timed():
            super()._install()

    def _probe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._timed():
            if not self._allowed():
                return
            try:
                with unnoticed(self._model):
                    self._model(*args, **kwargs)
            except Exception as error:  # the real forward pass may still succeed
                self._unmeasured(error)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._enter(module, args, kwargs)
        if module is self._model and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._pass = args, kwargs, _graphs()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._model and self._pass is not None and torch.is_grad_enabled():
            (given, named, before), self._pass = self._pass, None
            if output is not None and _graphs() != before:
                self._noticed = True
                self._probe(given, named)
        super()._leave(module, args, output)


def _graphs() -> int:
    """How many graphs were compiled in this process."""
    return counters["stats"]["unique_graphs"]
