"""Every softmax attention of a model as it is about to be computed, however the model spells it, with no edit to the model.

A `TorchFunctionMode` sees `F.scaled_dot_product_attention`, `F.multi_head_attention_forward` (torch's and fairseq's
attention) and the softmax of attention written out by hand. Hooks on the modules tell whose call it is. Both are there only
while somebody is listening.
"""

import functools
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from stable_core.attention_entropy import MASKED, AttentionStatistics, attention_statistics, row_statistics

from .projections import find_projections, num_heads

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class FusedCall:
    """One `F.scaled_dot_product_attention`. q, k: (batch, heads, tokens, head_dim); attn_mask, scale as torch takes them."""

    name: str  # of the module that computes it
    module: nn.Module
    is_cross: bool
    q: Tensor
    k: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float

    @property
    def tokens(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.q.shape[-2], self.k.shape[-2]

    def at_temperature(self, tau: float) -> "FusedCall":
        """The call with its logits divided by tau."""
        mask = self.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = (mask / tau).clamp(min=torch.finfo(mask.dtype).min)
        return replace(self, scale=self.scale / tau, attn_mask=mask)

    def statistics(self) -> AttentionStatistics:
        """The statistics of each row, (batch, heads, queries)."""
        q, k, mask = self.q, self.k, self.attn_mask
        if q.ndim != 4:  # (batch, tokens, head_dim), or windows before the heads
            heads = q.shape[-3] if q.ndim > 4 else 1
            if mask is not None:
                mask = mask.expand(*q.shape[:-1], k.shape[-2]).reshape(-1, heads, q.shape[-2], k.shape[-2])
            q, k = (x.reshape(-1, heads, *x.shape[-2:]) for x in (q, k))
        return attention_statistics(q, k, scale=self.scale, attn_mask=mask, is_causal=self.is_causal)

    def hidden(self) -> Tensor | None:
        """Where the mask hides a key, broadcastable to (batch, heads, queries, keys); None without a mask."""
        mask = self.attn_mask
        if mask is None or mask.ndim > 4:
            return None
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        return ~mask if mask.dtype == torch.bool else mask <= MASKED


@dataclass(frozen=True)
class SoftmaxCall:
    """One softmax of attention logits, (batch, heads, queries, keys) or (batch * heads, queries, keys)."""

    name: str
    module: nn.Module
    is_cross: bool
    logits: Tensor
    is_causal = False  # the mask is in the logits

    @property
    def tokens(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.logits.shape[-2], self.logits.shape[-1]

    def at_temperature(self, tau: float) -> "SoftmaxCall":
        """The call with its logits divided by tau; a mask that wrote finfo.min must not become -inf, which is NaN in a
        row of nothing else."""
        return replace(self, logits=(self.logits / tau).clamp(min=torch.finfo(self.logits.dtype).min))

    def statistics(self) -> AttentionStatistics:
        """The statistics of each row, (batch, heads, queries)."""
        logits = self._by_head()
        rows = logits.flatten(0, -2)
        masked = torch.finfo(rows.dtype).min / 2
        chunks = [
            row_statistics(some.float().masked_fill(some <= masked, -torch.inf))
            for some in rows.split(max(1, (1 << 20) // rows.shape[-1]))
        ]
        return AttentionStatistics(*(torch.cat(parts).view(logits.shape[:-1]) for parts in zip(*chunks, strict=True)))

    def hidden(self) -> Tensor:
        """Where a key is hidden, (batch, heads, queries, keys); of one head, as masks are the same for all."""
        return self._by_head()[:, :1] <= torch.finfo(self.logits.dtype).min / 2

    def _by_head(self) -> Tensor:
        if self.logits.ndim == 4:
            return self.logits.detach()
        heads = num_heads(self.module)
        heads = heads if self.logits.shape[0] % heads == 0 else 1
        return self.logits.detach().unflatten(0, (-1, heads))


AttentionCall = FusedCall | SoftmaxCall


class Interception:
    """Hands the attention calls of a model's forward passes to `handler(call) -> call`, until it is stopped.

    The handler may return another call, which is computed in its place. Where several interceptions see a call, those with
    a lower `order` are asked first. finished(output) is called at the end of each forward pass of the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        handler: Callable[[AttentionCall], AttentionCall],
        order: int = 0,
        finished: Callable[[Any], None] = lambda output: None,
    ) -> None:
        self.handler, self.order, self._finished, self._model = handler, order, finished, model
        self._names: dict[nn.Module, str] = {}
        self._handles: list[RemovableHandle] = []

    def __reduce__(self):
        return Interception, (None, None)  # the hooks of a module that is copied or pickled meanwhile do nothing there

    def start(self) -> None:
        """Installs the hooks."""
        for name, module in self._model.named_modules():
            self._names[module] = name.replace("_orig_mod.", "")
            self._handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def stop(self) -> None:
        """Takes the hooks out again; a forward pass that is under way goes on unseen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._names.clear()
        _thread.remove(self)

    def _enter(self, module: nn.Module, args, kwargs) -> None:
        # Compiled code does without, as it could not be seen anyway.
        if not torch.compiler.is_compiling() and module in self._names:
            _thread.push(self, (self._names[module], module, _has_other_source(args, kwargs)))

    def _leave(self, module: nn.Module, args, output) -> None:
        if not torch.compiler.is_compiling() and module in self._names:
            _thread.pop(self)
            if module is self._model and output is not None:  # which it is after an error
                self._finished(output)


class _Thread(threading.local):
    """Which modules are being run, by interception. Backward passes that recompute activations have threads of their own."""

    def __init__(self) -> None:
        self.running: dict[Interception, list[tuple[str, nn.Module, bool]]] = {}
        self.mode: _Mode | None = None

    def push(self, interception: Interception, entry: tuple[str, nn.Module, bool]) -> None:
        self.running.setdefault(interception, []).append(entry)
        if self.mode is None:
            self.mode = _Mode()
            self.mode.__enter__()

    def pop(self, interception: Interception) -> None:
        stack = self.running.get(interception)
        if stack:
            stack.pop()
            if not stack:
                self.remove(interception)

    def remove(self, interception: Interception) -> None:
        self.running.pop(interception, None)
        if not self.running and self.mode is not None:
            mode, self.mode = self.mode, None
            mode.__exit__(None, None, None)


_thread = _Thread()


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
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
def _open_multi_head_attention() -> Callable:
    """`F.multi_head_attention_forward` that does not ask for modes, which would show it whole, but whose calls are seen."""
    whole = F.multi_head_attention_forward
    names = {**whole.__globals__, "has_torch_function": lambda tensors: False}
    return types.FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__, whole.__closure__)


def _fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = None
    for interception, stack in _asked():
        if query.is_nested:
            break
        name, module, is_cross = stack[-1]
        before = call or FusedCall(name, module, is_cross, query, key, attn_mask, is_causal, scale)
        call = interception.handler(replace(before, name=name, module=module, is_cross=is_cross))
    if call is not None:
        attn_mask, scale = call.attn_mask, call.scale
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _softmax_input(input, dim=None, *_, **__) -> Tensor:
    """What to take the softmax of: the input, or what handlers make of it where it is an attention's logits."""
    if input.ndim not in (3, 4) or dim not in (-1, input.ndim - 1):
        return input
    for interception, stack in _asked():
        for name, module, is_cross in stack[:-3:-1]:  # a nn.Softmax is called by the attention around it
            if find_projections(module):
                input = interception.handler(SoftmaxCall(name, module, is_cross, input)).logits
                break
    return input


def _asked() -> list[tuple[Interception, list]]:
    return sorted(_thread.running.items(), key=lambda item: item[0].order)


def _has_other_source(args, kwargs) -> bool:
    """Whether a module's arguments give it keys from elsewhere than its queries."""
    for name in ("key_value_states", "encoder_hidden_states"):
        if isinstance(kwargs.get(name), Tensor):
            return True
    query, key = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in enumerate(("query", "key")))
    return isinstance(query, Tensor) and isinstance(key, Tensor) and key is not query and key.ndim == query.ndim
