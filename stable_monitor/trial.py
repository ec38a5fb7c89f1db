"""Forward passes that try out what a model does, with weights that are changed for their length, and leave no trace."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from stable_core.sigma_layers import sigma_layers
from stable_core.watching import versions

from .calls import Call
from .compiled import unnoticed
from .interception import Interception
from .promises import Input, Promise, promise
from .row_order import RowOrder

Forward = Callable[[], Any]
SAME = 1e-5  # of outputs, relative
UNIFORM = 1e30  # a temperature at which attention is uniform
UNSTEADY = (
    "forward: it differs from call to call; give it one batch, and where layers are skipped at random call model.eval()"
)


@dataclass(frozen=True)
class Attention:
    """One attention in one forward pass: the largest logit of each head, what its remedy promised, and `RowOrder.error`."""

    module: nn.Module
    logits: Tensor
    promise: Promise
    order: str

    @property
    def largest(self) -> float:
        """The largest logit."""
        return self.logits.max().item()


class Trial:
    """One forward pass: the model's outputs, which modules were called with which input, and its attentions by name.

    Args:
        model: what `forward` runs, without wrappers.
        uniform: attention weights are the same for all keys, so that inputs do not change with W_q and W_k.
        graph: the outputs have one, for gradients.
    """

    def __init__(self, model: nn.Module, forward: Forward, uniform: bool = False, graph: bool = False) -> None:
        self.inputs: dict[nn.Module, Input] = {}
        self.attentions: dict[str, Attention] = {}
        self._uniform = uniform
        found: list[Any] = []
        interception = Interception(model, self._see, finished=found.append, alone=True)
        self._rows = RowOrder(model.modules())
        with ExitStack() as stack:
            stack.callback(self._rows.close)
            handles = [
                module.register_forward_pre_hook(self._note, with_kwargs=True)
                for module in model.modules()
                if not isinstance(module, torch.jit.ScriptModule)
            ]
            if (
                graph
            ):  # inside of the model only: where it begins, a monitor of the run would take it for a pass of training
                handles.append(model.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None))
                handles.append(model.register_forward_hook(lambda *_: torch.set_grad_enabled(False) and None))
            for handle in handles:
                stack.callback(handle.remove)
            stack.callback(interception.stop)
            interception.start()
            with unnoticed(model):
                found.append(forward())
        self.outputs = [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]

    def same(self, other: "Trial") -> bool:
        """Whether the outputs are those of another pass, up to rounding."""
        if [x.shape for x in self.outputs] != [y.shape for y in other.outputs]:
            return False
        scales = [SAME * x.nan_to_num(0, 0, 0).abs().max().item() for x in self.outputs]
        pairs = zip(self.outputs, other.outputs, scales, strict=True)
        return all(torch.allclose(x, y, rtol=0, atol=scale) for x, y, scale in pairs)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is not None and x.is_floating_point() and x.numel() and x.ndim:
            self.inputs[module] = Input.of(x)

    @torch.no_grad()
    def _see(self, call: Call) -> Call:
        name, logits = call.site.name, call.largest_logits(above=-math.inf).amax((0, 2))
        new = Attention(call.site.module, logits, promise(call, self.inputs), self._rows.error(call))
        old = self.attentions.get(name)
        if old is None or old.largest / old.promise.bound < new.largest / new.promise.bound:
            self.attentions[name] = new
        return call.at_temperature(UNIFORM) if self._uniform else call


@contextmanager
def as_it_was(model: nn.Module, inner: nn.Module) -> Iterator[None]:
    """A context after which the model is what it was: buffers, random numbers, and what σReparam and DDP remember.

    Within it, each process runs its own copy of a model in DDP, and waits for no other."""
    before = []
    for _, sigma in sigma_layers(inner):
        current = sigma.watch._seen == versions(sigma.originals())
        before.append((sigma, dict(vars(sigma)), dict(vars(sigma.watch)), current))
    wrappers: list[Any] = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    flags = [(wrapper, wrapper.require_forward_param_sync) for wrapper in wrappers]
    for wrapper in wrappers:
        wrapper.require_forward_param_sync = False
    try:
        with unnoticed(inner):
            yield
    finally:
        for wrapper, flag in flags:
            wrapper.require_forward_param_sync = flag
        for sigma, own, watch, current in before:
            vars(sigma).update(own)
            vars(sigma.watch).clear()
            vars(sigma.watch).update(watch)
            if current:  # QK-clip moves version counters
                sigma.watch.rebind(sigma.originals())


def look_away(model: nn.Module) -> None:
    """From now on, until `as_it_was` ends, no forward pass checks whether u belongs to its weights, nor puts it right."""
    for _, sigma in sigma_layers(model):
        vars(sigma.watch)["is_due"] = lambda originals: False


@contextmanager
def put_back(weights: Iterable[Any]) -> Iterator[None]:
    """A context after which the weights have their values again, without a trace in their version counters."""
    before = [(W, W.detach().clone()) for W in {id(W): W for W in weights}.values()]
    try:
        yield
    finally:
        for W, value in before:
            W.data.copy_(value)
