"""What kernels do to logits between q.k and softmax, as rules for `stable_core.attention_statistics`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from stable_core.attention_entropy import Rule

FAR_BELOW = -1e8  # what scores are set to that are hidden by a number, such as finfo.min


def in_order(*rules: Rule | None) -> Rule | None:
    """The rules one after the other; None where there is none."""
    some = [rule for rule in rules if rule is not None]
    if not some:
        return None

    def rule(logits: Tensor, *where: Tensor) -> Tensor:
        for one in some:
            logits = one(logits, *where)
        return logits

    return rule


def window(ahead: int, left: int | None, right: int | None) -> Rule | None:
    """Query i sees the keys from i + ahead - left to i + ahead + right. None: no limit."""
    if left is None and right is None:
        return None

    def rule(logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = key - query - ahead
        for hidden in (None if left is None else distance < -left, None if right is None else distance > right):
            logits = logits if hidden is None else logits.masked_fill(hidden, -math.inf)
        return logits

    return rule


def softcap(cap: float | None) -> Rule | None:
    """cap tanh(a / cap), as in Gemma 2; None and 0 mean none."""
    if not cap:
        return None
    limit = cap
    return lambda logits, *where: limit * torch.tanh(logits / limit)


def alibi(slopes: Tensor | None, ahead: int) -> Rule | None:
    """a - slope |i + ahead - j|, with slopes (heads,) or (batch, heads)."""
    if slopes is None:
        return None

    def rule(logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        slope = slopes[head] if slopes.ndim == 1 else slopes[batch, head]
        return logits - slope * (query + ahead - key).abs()

    return rule


def masked(mask: Tensor | None) -> Rule | None:
    """A mask of up to four dimensions: boolean, True where a query sees a key, or added to the logits."""
    if mask is None:
        return None
    whole = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)

    def rule(logits: Tensor, *where: Tensor) -> Tensor:
        part = whole[
            tuple(index if n > 1 else torch.zeros_like(index) for n, index in zip(whole.shape, where, strict=True))
        ]
        if part.dtype == torch.bool:
            return logits.masked_fill(~part, -math.inf)
        return _hidden_by_a_number(logits + part)

    return rule


def flex(score_mod: Callable[..., Any] | None, block_mask: Any) -> Rule | None:
    """FlexAttention's score_mod, then its BlockMask: blocks that it lists, and in them what its mask_mod lets through."""

    def score(logits: Tensor, *where: Tensor) -> Tensor:
        assert score_mod is not None
        return _hidden_by_a_number(_over_all(score_mod, first=True)(logits, *(x.flatten() for x in where)))

    def mask(logits: Tensor, *where: Tensor) -> Tensor:
        seen = _over_all(block_mask.mask_mod)(*(x.flatten() for x in where))
        listed = block_mask.to_dense()
        sizes = (1, 1, *block_mask.BLOCK_SIZE)
        blocks = [(x // size).clamp(max=n - 1) for x, size, n in zip(where, sizes, listed.shape, strict=True)]
        return logits.masked_fill(~seen | (listed[tuple(blocks)] == 0), -math.inf)

    return in_order(None if score_mod is None else score, None if block_mask is None else mask)


def with_sink(rule: Rule | None, sinks: Tensor) -> Rule:
    """A rule for logits whose last key is a sink: it has a logit of its own, (heads,), to which `rule` is not applied."""

    def sunk(logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        scores = logits[..., :-1]
        scores = scores if rule is None else rule(scores, batch, head, query, key[:-1])
        return torch.cat([scores, sinks[head].to(scores).expand(*scores.shape[:-1], 1)], -1)

    return sunk


def _over_all(function: Callable[..., Any], first: bool = False) -> Callable[..., Any]:
    """A function of single numbers, a score where `first`, then batch, head, query and key, as one of a chunk."""
    for place in (3, 2, 1, 0):
        where = [0 if i == place else None for i in range(4)]
        function = torch.vmap(function, in_dims=(0, *where) if first else tuple(where))

    def over_all(*args: Tensor) -> Any:
        with TransformGetItemToIndex():  # which torch itself needs for functions that index a tensor: table[head]
            return function(*args)

    return over_all


def _hidden_by_a_number(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores <= FAR_BELOW, -math.inf)
