"""Intercepts every computation of softmax attention in a model, without a change to the model's code.

A `TorchFunctionMode` sees `F.scaled_dot_product_attention`, `F.multi_head_attention_forward` (torch's and fairseq's attention)
and the softmax of attention that is written out. Stand-ins see the kernels that torch does not dispatch, such as flash-attn's,
FlexAttention's, and what is registered with transformers. Hooks on the modules record which of them are running, and so which
one computes the attention. All of them are installed only while an `Interception` is started.
"""

import functools
import re
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from stable_core.interrupted import Handle, on_error
from stable_core.layers import find_projections

from .calls import FusedCall, Handler, Site, SoftmaxCall
from .interfaces import INTERFACE
from .kernel_calls import Arguments, Kernel, KernelCall
from .kernels import NESTED
from .references import Reference, StandIn, hold, leave, release, renew

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
UNSEEN = (
    "no attention was seen: what is seen is scaled_dot_product_attention, nn.MultiheadAttention, flash-attn, xformers, "
    "FlexAttention, transformers' attention interface, and a softmax in a module with known names for its projections, such as "
    "q_proj, query, to_q or qkv; Monitor(..., attention={...}) names others"
)
ATTENTION_CLASS = re.compile("attention|attn", re.IGNORECASE)
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def without_wrappers(name: str) -> str:
    """A module's name without the parts that wrappers, such as torch.compile's and FSDP1's, add to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


Running = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a module that is being run, and its arguments


class Interception:
    """Calls `handler(call) -> call` for each attention in forward passes of a model, from `start` to `stop`.

    Args:
        model: the model; attention in it is seen where it, or a part of it, is called.
        handler: gets a FusedCall or SoftmaxCall and returns it, or another one to be computed in its place.
        order: where several interceptions see a call, those of lower order are asked first.
        finished: called with the output at the end of each forward pass of `model`.
        failed: called where a forward pass of `model` ends in an error.
        alone: whether other interceptions see nothing while this one is started.
        chosen: what `stable_monitor.chosen` makes of a user's `attention`: modules, by name, of which "softmax" says that a
            softmax in them is attention's, and a Kernel how their arguments are read.
    """

    def __init__(
        self,
        model: nn.Module,
        handler: Handler,
        order: int = 0,
        finished: Callable[[Any], None] = lambda output: None,
        failed: Callable[[], None] = lambda: None,
        alone: bool = False,
        chosen: Mapping[str, str | Kernel] = types.MappingProxyType({}),
    ) -> None:
        self.handler, self.order, self._finished, self._model = handler, order, finished, model
        self._failed, self._waits, self.alone, self.chosen = failed, False, alone, chosen
        self._names: dict[nn.Module, str] = {}
        self._handles: list[RemovableHandle | Handle] = []
        self._references: list[Reference] = []
        self._ran: dict[str, nn.Module] = {}  # the modules of the last pass
        self._seen: set[str] = set()  # those of them whose attention was seen
        self._looks: dict[nn.Module, bool] = {}
        self.count = 0  # calls seen so far

    def __reduce__(self) -> tuple[Any, ...]:
        return Interception, (None, None)  # in a copied or pickled module the hooks do nothing

    def start_with_training(self) -> None:
        """Like `start`, but installs the hooks only when a forward pass in training mode begins.

        Until then only the model itself has a hook, so that validation between two updates runs without them."""
        self._waits = True
        self._handles.append(on_error(self._model, self._undo))
        self._handles.append(self._model.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trains = model.training and torch.is_grad_enabled()
        if model is self._model and trains and not self._names and not torch.compiler.is_compiling():
            self._install()
            self._enter(model, args, kwargs)  # the model's own new hook is not called in this pass

    def _undo(self, error: BaseException) -> None:
        """Cleans up after a forward pass that ended in an error, also one for which torch calls no hooks, such as Ctrl-C."""
        _thread.remove(self)
        if self._waits:
            self.stop()
            self.start_with_training()
        self._failed()

    def start(self) -> None:
        """Installs the hooks."""
        self._handles.append(on_error(self._model, self._undo))
        self._install()

    def _install(self) -> None:
        self._references += hold(self._model, _run)
        for name, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # these take no hooks
                self._names[module] = without_wrappers(name)
                self._handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(self._leave, always_call=True),
                ]

    def stop(self) -> None:
        """Removes the hooks. The rest of a forward pass that is running is not seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        release(self._references)
        self._references.clear()
        self._names.clear()
        self._waits = False
        _thread.remove(self)

    def abandon(self) -> None:
        """Like `stop`, where nobody called it and this is being collected as garbage."""
        leave(self._references)
        self._references = []
        self.stop()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Nothing is recorded while code is compiled, in which attention could not be seen anyway.
        if not torch.compiler.is_compiling() and module in self._names and not _thread.in_kernel:
            if module is self._model:
                _thread.remove(self)  # entries left by an interrupted call of a part of the model
                self._ran, self._seen = {}, set()
            _thread.push(self, module, args, kwargs)
            name = self._names[module]
            self._ran[name] = module
            if isinstance(kernel := self.chosen.get(name), Kernel):
                stack = _thread.running[self]
                site = self.site(stack, len(stack) - 1)
                with _thread.inside_a_kernel():
                    self.ask(KernelCall(site, kernel, {"module": module, "args": args, "kwargs": kwargs}))

    def ask(self, call: Any) -> Any:
        """The handler's answer to a call."""
        self.count += 1
        self._seen.add(call.site.name)
        return self.handler(call)

    def unseen(self) -> list[str]:
        """Modules that look like attention, by their projections or by the name of their class, and of which the last pass ran
        no attention that was seen: not in them, nor in an attention that they are a part of."""
        done = {outer for name in self._seen for outer in _around(name)}
        attentions = {name for name in self._seen & self._ran.keys() if self._looks_like_attention(name)}
        found: list[str] = []
        for name in reversed(self._ran):  # inner ones first
            around = _around(name)
            if name not in done and attentions.isdisjoint(around) and self._looks_like_attention(name):
                found.append(name)
                done.update(around)
        return found[::-1]

    def _looks_like_attention(self, name: str) -> bool:
        module = self._ran[name]
        if module not in self._looks:
            usual = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)
            by_class = ATTENTION_CLASS.search(type(module).__name__) and next(module.parameters(), None) is not None
            self._looks[module] = name in self.chosen or (not usual and bool(by_class or find_projections(module)))
        return self._looks[module]

    def site(self, stack: list[Running], depth: int) -> Site:
        """The Site of the module at `depth` in the stack of running modules."""
        module, args, kwargs = stack[depth]
        parent = stack[depth - 1][0] if depth else None
        return Site(self._names[module], module, parent, args, kwargs)

    def softmax_of(self, stack: list[Running]) -> int | None:
        """Where in the stack the module is that a softmax is the attention of; None if it is no attention's."""
        for depth in reversed(range(len(stack))):
            module = stack[depth][0]
            if self.chosen.get(self._names[module]) == "softmax":
                return depth
            # The caller may be an nn.Softmax inside the attention.
            if depth >= len(stack) - 2 and find_projections(module):
                return depth
        return None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and module in self._names and not _thread.in_kernel:
            _thread.pop(self, module)
            if module is self._model and output is not None:  # None after an error
                self._finished(output)


def _around(name: str) -> list[str]:
    """The names of a module and of those that it is a part of."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def unseen_warning(names: list[str]) -> str:
    """What to do about modules whose attention was not seen, though that of others was."""
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"no attention was seen in {some}: if it is softmax attention, name it, Monitor(..., attention={{{names[0]!r}: how}}); "
        'how is "softmax" where it is written out, else a function (docs/monitor.md, "What it sees, and what it does not")'
    )


class _Thread(threading.local):
    """For each interception, the modules that are running in this thread, outermost first.

    It is kept for each thread because activation checkpointing runs modules again in the threads of the backward pass.
    """

    def __init__(self) -> None:
        self.running: dict[Interception, list[Running]] = {}
        self.mode: _Mode | None = None
        self.handling = False  # whether a call is being handled, while torch has disabled the mode
        self.in_kernel = False  # what a kernel does inside is not looked at

    def push(self, interception: Interception, *entry: Any) -> None:
        if self.mode is not None and not self.handling and self.mode not in _get_current_function_mode_stack():
            self.running.clear()  # an interrupted backward pass: torch has restored the modes of before
            self.mode = None
        self.running.setdefault(interception, []).append(entry)
        if self.mode is None:
            self.mode = _Mode()
            self.mode.__enter__()

    def pop(self, interception: Interception, module: nn.Module) -> None:
        """Removes a module from the stack, and modules that it called and that ended in an error; it may not be there."""
        stack = self.running.get(interception, [])
        depth = next((i for i in reversed(range(len(stack))) if stack[i][0] is module), None)
        if depth is not None:
            del stack[depth:]
            if not stack:
                self.remove(interception)

    def remove(self, interception: Interception) -> None:
        self.running.pop(interception, None)
        if not self.running and self.mode is not None:
            mode, self.mode = self.mode, None
            if mode in _get_current_function_mode_stack()[-1:]:
                mode.__exit__(None, None, None)

    @contextmanager
    def inside_a_kernel(self) -> Iterator[None]:
        """A context without the mode, for which torch.compile would compile a compiled kernel anew."""
        mode, before = self.mode, (self.in_kernel, self.handling)
        on_top = mode is not None and mode in _get_current_function_mode_stack()[-1:]
        self.in_kernel = self.handling = True
        if mode is not None and on_top:
            mode.__exit__(None, None, None)
        try:
            yield
        finally:
            self.in_kernel, self.handling = before
            if mode is not None and on_top:
                mode.__enter__()


_thread = _Thread()


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # what is compiled is not seen, and handlers do not compile
            return function(*args, **(kwargs or {}))
        before, _thread.handling = _thread.handling, True
        try:
            return self._handle(function, args, kwargs or {})
        finally:
            _thread.handling = before

    def _handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _thread.in_kernel:
            return function(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            with self:
                return _open_multi_head_attention()(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        if function in SOFTMAX:
            args = (_softmax_input(*args, **kwargs), *args[1:])
            kwargs.pop("input", None)
        return function(*args, **kwargs)


@functools.cache
def _open_multi_head_attention() -> Callable[..., Any]:
    """A copy of `F.multi_head_attention_forward` that skips its own dispatch to the mode, which then sees the calls inside."""
    whole = F.multi_head_attention_forward
    names = {**whole.__globals__, "has_torch_function": lambda tensors: False}
    return types.FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__, whole.__closure__)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.is_nested:
        scale = _asked_of(NESTED, {"query": query, "key": key, "is_causal": is_causal, "scale": scale})["scale"]
    elif query.ndim >= 3:
        for interception, stack in _asked():
            usual = query.shape[-1] ** -0.5
            before = FusedCall(
                _owner(interception, stack), query, key, attn_mask, is_causal, usual if scale is None else scale
            )
            call = interception.ask(before)
            if call is not before:
                attn_mask, scale = call.attn_mask, call.scale
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _owner(interception: Interception, stack: list[Running]) -> Site:
    """The innermost running module with known projections; where there is none, the innermost."""
    known = (depth for depth in reversed(range(len(stack))) if find_projections(stack[depth][0]))
    return interception.site(stack, next(known, len(stack) - 1))


def _asked_of(kernel: Kernel, given: Arguments) -> Arguments:
    """The arguments of a kernel's call, as the handlers return them; the same object if they are not changed."""
    for interception, stack in _asked():
        given = interception.ask(KernelCall(_owner(interception, stack), kernel, given)).arguments
    return given


def _run(stand_in: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the function that a stand-in stands for, after the handlers have seen the call."""
    if torch.compiler.is_compiling() or _thread.in_kernel or not _thread.running:
        return stand_in.function(*args, **kwargs)
    if stand_in.kernel is INTERFACE:
        return _run_registered(stand_in, args, kwargs)
    with _thread.inside_a_kernel():
        given = stand_in.arguments(args, kwargs)
        changed = _asked_of(stand_in.kernel, given)
        return stand_in.function(*args, **kwargs) if changed is given else stand_in.function(**changed)


def _run_registered(stand_in: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a function registered with transformers. What it ends in says more than its arguments, if that is seen."""
    before = {interception: interception.count for interception in _thread.running}
    output = stand_in.function(*args, **kwargs)
    renew(stand_in)
    given = stand_in.arguments(args, kwargs)
    for interception, stack in _asked():
        if interception.count == before.get(interception):
            depth = next((i for i in reversed(range(len(stack))) if stack[i][0] is given["module"]), len(stack) - 1)
            with _thread.inside_a_kernel():
                interception.ask(KernelCall(interception.site(stack, depth), INTERFACE, given))
    return output


def _softmax_input(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    """The input of a softmax; if it is the logits of an attention, as the handlers return them."""
    if input.is_nested or input.ndim < 3 or dim not in (-1, input.ndim - 1):
        return input
    for interception, stack in _asked():
        depth = interception.softmax_of(stack)
        if depth is not None:
            input = interception.ask(SoftmaxCall(interception.site(stack, depth), input)).logits
    return input


def _asked() -> list[tuple[Interception, list[Running]]]:
    """The interceptions that see calls in this thread, with their running modules, by `order`."""
    running = sorted(_thread.running.items(), key=lambda item: item[0].order)
    return [item for item in running if item[0].alone] or running
