"""One computation of attention, seen before it runs: its inputs, the module that computes it, and its statistics."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stable_core.attention_entropy import (
    MASKED,
    AttentionStatistics,
    attention_statistics,
    largest_logits,
    logit_statistics,
)
from stable_core.layers import num_heads

SOURCES = ("key_value_states", "encoder_hidden_states", "encoder_output", "context", "memory")


@dataclass(frozen=True)
class Site:
    """The module that computes an attention, and the arguments of its forward pass."""

    name: str
    module: nn.Module
    parent: nn.Module | None  # the module that calls it
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def is_cross(self) -> bool:
        """Whether it is cross-attention: its keys come from other tokens than its queries."""
        return has_other_source(self.module, self.args, self.kwargs)

    def arguments(self) -> dict[str, object]:
        """The arguments of its forward pass by name."""
        return given(self.module, self.args, self.kwargs)


class Call(Protocol):
    """One computation of attention before it runs; `FusedCall`, `SoftmaxCall` and `KernelCall` are its kinds."""

    @property
    def site(self) -> Site: ...

    @property
    def tokens(self) -> tuple[int, int]:
        """Numbers of queries and keys."""

    @property
    def head_dim(self) -> int | None:
        """Size of a query vector; None where it is not known."""

    def at_temperature(self, tau: float) -> "Call":
        """The call with its logits divided by tau."""

    def statistics(self) -> AttentionStatistics:
        """The statistics of each row, (batch, heads, queries)."""

    def largest_logits(self, above: float) -> Tensor:
        """The largest scale * q.k of each query, (batch, heads, queries); heads that cannot exceed `above` may have -inf."""

    def visible(self) -> tuple[Tensor | None, bool]:
        """What queries see: (batch, heads or 1, keys), True for keys that no query sees, or None where that is not known; and
        whether no query sees a later key than itself."""


Handler = Callable[[Any], Any]  # is given a call, and returns it, or another of its type to be computed in its place


def is_self_attention(call: Call) -> bool:
    """Whether its queries and keys are of the same tokens."""
    queries, keys = call.tokens
    return queries == keys and not call.site.is_cross()


def padding(call: Call) -> Tensor | None:
    """True for queries that are padding, (batch, heads or 1, queries): in self-attention, positions that no query may see.

    None where no query is known to be padding.
    """
    return call.visible()[0] if is_self_attention(call) else None


@dataclass(frozen=True)
class FusedCall:
    """A call of `F.scaled_dot_product_attention`: q, k (..., tokens, head_dim), and its attn_mask, is_causal and scale."""

    site: Site
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
        q, k, mask = self._by_head()
        return attention_statistics(q, k, scale=self.scale, attn_mask=mask, is_causal=self.is_causal)

    def largest_logits(self, above: float) -> Tensor:
        """The largest scale * q.k of each query, (batch, heads, queries); heads that cannot exceed `above` may have -inf.

        A mask hides keys, but what an additive mask adds to the logits of visible keys is left out.
        """
        q, k, mask = self._by_head()
        if mask is not None and mask.dtype != torch.bool:
            mask = mask > MASKED
        return largest_logits(q, k, scale=self.scale, attn_mask=mask, is_causal=self.is_causal, above=above)

    @property
    def head_dim(self) -> int:
        """Size of a query vector."""
        return self.q.shape[-1]

    def visible(self) -> tuple[Tensor | None, bool]:
        """As `Call.visible`."""
        _, _, mask = self._by_head()
        if mask is None:
            return None, self.is_causal
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        hidden = ~mask if mask.dtype == torch.bool else mask <= MASKED
        return hidden.all(dim=2), self.is_causal or _hides_later(hidden[0, 0], self.q.shape[-2])

    def _by_head(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, k and the mask as (batch, heads, ..., ...)."""
        q, k, mask, heads = self.q, self.k, self.attn_mask, num_heads(self.site.module)
        dims = head_dims(heads, q, k)
        shape = list(q.shape[:-2])
        if len(dims) == 1 and 1 < k.shape[dims[0] - q.ndim] < shape[dims[0]]:  # grouped queries: keys have fewer heads
            shape[dims[0]] = k.shape[dims[0] - q.ndim]
        k = k.expand(*shape, *k.shape[-2:])
        if mask is not None and (q.ndim, dims) != (4, (1,)):
            mask = with_heads(mask.expand(*q.shape[:-1], k.shape[-2]), heads, dims)
        return with_heads(q, heads, dims), with_heads(k, heads, dims), mask


@dataclass(frozen=True)
class SoftmaxCall:
    """A softmax of attention logits (batch, heads, queries, keys), or with batch and heads in other leading dimensions."""

    site: Site
    logits: Tensor

    @property
    def tokens(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.logits.shape[-2], self.logits.shape[-1]

    def at_temperature(self, tau: float) -> "SoftmaxCall":
        """The call with its logits divided by tau.

        Masked logits of finfo.min are kept from becoming -inf, because a row with all keys masked would then be NaN.
        """
        return replace(self, logits=(self.logits / tau).clamp(min=torch.finfo(self.logits.dtype).min))

    def statistics(self) -> AttentionStatistics:
        """The statistics of each row, (batch, heads, queries)."""
        logits = self._by_head()
        return logit_statistics(logits.masked_fill(self._never(logits), -torch.inf))

    def largest_logits(self, above: float) -> Tensor:
        """The largest logit of each row, (batch, heads, queries). `above` is not used, as all logits are known."""
        return self._by_head().amax(-1).float()

    head_dim = None  # logits do not show it

    def visible(self) -> tuple[Tensor | None, bool]:
        """As `Call.visible`, read off the first head, as masks are the same for all."""
        logits = self._by_head()[:, :1]
        hidden = (logits - logits.amax(-1, keepdim=True) <= MASKED) | self._never(logits)
        return hidden.all(dim=2), _hides_later(hidden[0, 0], hidden.shape[2])

    def _by_head(self) -> Tensor:
        logits, heads = self.logits.detach(), num_heads(self.site.module)
        return with_heads(logits, heads, head_dims(heads, logits))

    def _never(self, logits: Tensor) -> Tensor:
        """True where a logit is so low that it must be masked: half of finfo.min is enough, as some models scale masks."""
        return logits <= max(torch.finfo(logits.dtype).min / 2, -1e8)


def _hides_later(hidden: Tensor, queries: int) -> bool:
    """Whether a mask, True where (queries or 1, keys) is hidden, hides all later keys of each query, but not all keys."""
    if queries == 1 or hidden.shape != (queries, queries):
        return False
    later = torch.ones_like(hidden).triu(1)
    return bool((hidden | ~later).all() and not hidden.all())


def head_dims(heads: int | None, x: Tensor, *others: Tensor) -> tuple[int, ...]:
    """The dimensions of x, which is q or logits (..., m, n), that count heads; () if heads are folded into the batch.

    Usually it is the second of four. Otherwise it is the one whose size is `heads`, if that is known, or two neighbours whose
    product is `heads` (key heads, queries of each). Several may have that size, such as the windows of an image: it is then the
    one with the smallest stride in x or in `others`, tensors of the same layout, because the features of a token are split into
    heads, while windows and batches are made of tokens.
    """
    before = x.shape[:-2]
    last = len(before) - 1
    if heads is None or (last == 1 and before[1] in (1, heads)):
        return (last,) if last else ()

    def step(i: int) -> float:
        return min(y.stride(i) or math.inf for y in (x, *others) if y.ndim == x.ndim)

    found = [i for i in reversed(range(last + 1)) if before[i] == heads]
    if found:
        return (min(found, key=step),)
    if last < 2:  # a part of the heads, as under tensor parallelism, or batch * heads
        return (last,) if last and before[1] % heads else ()
    pair = next((i for i in reversed(range(last)) if before[i] * before[i + 1] == heads), None)
    return (last,) if pair is None else (pair, pair + 1)


def with_heads(x: Tensor, heads: int | None, dims: tuple[int, ...]) -> Tensor:
    """x (..., m, n) as (batch, heads, m, n), with heads in `dims`, or folded into the batch; one head if that does not fit."""
    last = x.ndim - 2
    if not dims:
        x = x.flatten(0, last - 1)
        heads = heads if heads and x.shape[0] % heads == 0 else 1
        return x.unflatten(0, (x.shape[0] // heads, heads))
    first = last - len(dims)
    x = x.movedim(dims, tuple(range(first, last))).flatten(first, last - 1)
    return x.flatten(0, first - 1) if first else x.unsqueeze(0)


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, object]:
    """A module's arguments by name, where its `forward` names them."""
    return {**dict(zip(_parameter_names(type(module).forward), args, strict=False)), **kwargs}


def has_other_source(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module is given a second sequence for its keys, judged by names, shapes and values of its arguments."""
    arguments = given(module, args, kwargs)
    if any(isinstance(arguments.get(name), Tensor) for name in SOURCES):
        return True
    query, key = arguments.get("query"), arguments.get("key")
    if query is None or key is None:
        query, key = (*args, None, None)[:2]
        # A second sequence: as wide as the first, but of another length.
        return (
            isinstance(query, Tensor)
            and isinstance(key, Tensor)
            and query.ndim == key.ndim == 3
            and query.shape[::2] == key.shape[::2]
            and query.shape[1] != key.shape[1]
        )
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or key.ndim != query.ndim:
        return False
    # Values are compared, too: a wrapper may have cast one tensor twice, to two equal ones.
    return key is not query and (key.shape != query.shape or not torch.equal(key, query))
