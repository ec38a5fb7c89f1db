"""One attention as it is about to be computed: what it is made of, whose it is, and its statistics."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

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
    """The module that computes an attention."""

    name: str
    module: nn.Module
    parent: nn.Module | None  # the module that calls it
    args: tuple[Any, ...]  # of its forward pass
    kwargs: dict[str, Any]

    def is_cross(self) -> bool:
        """Whether its keys and queries are of different tokens."""
        return has_other_source(self.module, self.args, self.kwargs)

    def arguments(self) -> dict[str, object]:
        """Of its forward pass, by name."""
        return given(self.module, self.args, self.kwargs)


@dataclass(frozen=True)
class FusedCall:
    """One `F.scaled_dot_product_attention`. q, k: (..., tokens, head_dim); attn_mask and scale as torch takes them."""

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
        """The largest q.k of each row, (batch, heads, queries); -inf in heads that have none above `above`.

        What a mask adds to the logits of keys that it leaves visible does not count.
        """
        q, k, mask = self._by_head()
        if mask is not None and mask.dtype != torch.bool:
            mask = mask > MASKED
        return largest_logits(q, k, scale=self.scale, attn_mask=mask, is_causal=self.is_causal, above=above)

    @property
    def head_dim(self) -> int:
        """Features of a query."""
        return self.q.shape[-1]

    def hidden(self) -> Tensor | None:
        """Where the mask hides a key, broadcastable to (batch, heads, queries, keys); None without a mask."""
        _, _, mask = self._by_head()
        if mask is None:
            return None
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        return ~mask if mask.dtype == torch.bool else mask <= MASKED

    def _by_head(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, k and the mask in four dimensions, heads second."""
        q, k, mask, heads = self.q, self.k, self.attn_mask, num_heads(self.site.module)
        dims = head_dims(heads, q, k)
        shape = list(q.shape[:-2])
        if len(dims) == 1 and 1 < k.shape[dims[0] - q.ndim] < shape[dims[0]]:  # a key head for several query heads
            shape[dims[0]] = k.shape[dims[0] - q.ndim]
        k = k.expand(*shape, *k.shape[-2:])
        if mask is not None and (q.ndim, dims) != (4, (1,)):
            mask = with_heads(mask.expand(*q.shape[:-1], k.shape[-2]), heads, dims)
        return with_heads(q, heads, dims), with_heads(k, heads, dims), mask


@dataclass(frozen=True)
class SoftmaxCall:
    """One softmax of attention logits, (batch, heads, queries, keys) or with heads and batch in other dimensions."""

    site: Site
    logits: Tensor
    is_causal = False  # the mask is in the logits

    @property
    def tokens(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.logits.shape[-2], self.logits.shape[-1]

    def at_temperature(self, tau: float) -> "SoftmaxCall":
        """The call with its logits divided by tau.

        Where a mask wrote finfo.min they must not become -inf, of which a row of nothing else would be NaN.
        """
        return replace(self, logits=(self.logits / tau).clamp(min=torch.finfo(self.logits.dtype).min))

    def statistics(self) -> AttentionStatistics:
        """The statistics of each row, (batch, heads, queries)."""
        logits = self._by_head()
        return logit_statistics(logits.masked_fill(self._never(logits), -torch.inf))

    def largest_logits(self, above: float) -> Tensor:
        """The largest logit of each row, (batch, heads, queries), whatever `above` is: they are there."""
        return self._by_head().amax(-1).float()

    head_dim = None  # not to be seen here

    def hidden(self) -> Tensor:
        """Where a key is hidden, (batch, 1, queries, keys): of one head, as masks are the same for all."""
        logits = self._by_head()[:, :1]
        return (logits - logits.amax(-1, keepdim=True) <= MASKED) | self._never(logits)

    def _by_head(self) -> Tensor:
        logits, heads = self.logits.detach(), num_heads(self.site.module)
        return with_heads(logits, heads, head_dims(heads, logits))

    def _never(self, logits: Tensor) -> Tensor:
        """Where a logit is so low that a mask must have made it, be it half of finfo.min: some models scale masks, too."""
        return logits <= max(torch.finfo(logits.dtype).min / 2, -1e8)


def head_dims(heads: int | None, x: Tensor, *others: Tensor) -> tuple[int, ...]:
    """Which dimensions of x, that is q or logits (..., m, n), are the heads'; () if heads are folded into the batch.

    Usually it is the second of four. Else it is one as large as the number of heads, if that is known, or two side by side
    whose product is (key heads, and the queries of each). Where several are as large, as windows of an image may be, it is the
    one with the shortest stride in x, or in others of its layout: heads lie within a token, and tokens, windows and batches
    around that.
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
    if last < 2:  # of some of the heads, as under tensor parallelism, or of the whole batch's
        return (last,) if last and before[1] % heads else ()
    pair = next((i for i in reversed(range(last)) if before[i] * before[i + 1] == heads), None)
    return (last,) if pair is None else (pair, pair + 1)


def with_heads(x: Tensor, heads: int | None, dims: tuple[int, ...]) -> Tensor:
    """(..., m, n) as (batch, heads, m, n). Heads are in those dimensions, or folded into the batch; unknown: all as one."""
    last = x.ndim - 2
    if not dims:
        x = x.flatten(0, last - 1)
        heads = heads if heads and x.shape[0] % heads == 0 else 1
        return x.unflatten(0, (x.shape[0] // heads, heads))
    first = last - len(dims)
    x = x.movedim(dims, tuple(range(first, last))).flatten(first, last - 1)
    return x.flatten(0, first - 1) if first else x.unsqueeze(0)


AttentionCall = FusedCall | SoftmaxCall
Call = TypeVar("Call", FusedCall, SoftmaxCall)


class Handler(Protocol):
    """What is shown a call, and returns it, or another of its kind to be computed in its place."""

    def __call__(self, call: Call) -> Call: ...


def padding(call: AttentionCall, hidden: Tensor | None) -> Tensor | None:
    """Which queries are padding, (batch, heads or 1, queries): in self-attention those of positions that no query may see.

    hidden: the call's. None: nothing is known to be padding.
    """
    queries, keys = call.tokens
    return None if hidden is None or queries != keys or call.site.is_cross() else hidden.all(dim=2)


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, object]:
    """A module's arguments by name."""
    return {**dict(zip(_parameter_names(type(module).forward), args, strict=False)), **kwargs}


def has_other_source(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module's arguments give it keys of other tokens than its queries."""
    arguments = given(module, args, kwargs)
    if any(isinstance(arguments.get(name), Tensor) for name in SOURCES):
        return True
    query, key = arguments.get("query"), arguments.get("key")
    if query is None or key is None:
        query, key = (*args, None, None)[:2]
        # A second sequence: of vectors of the same size, but not as many.
        return (
            isinstance(query, Tensor)
            and isinstance(key, Tensor)
            and query.ndim == key.ndim == 3
            and query.shape[::2] == key.shape[::2]
            and query.shape[1] != key.shape[1]
        )
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or key.ndim != query.ndim:
        return False
    # Not by identity alone: where they are one tensor, a wrapper may have cast each by itself, into two.
    return key is not query and (key.shape != query.shape or not torch.equal(key, query))
