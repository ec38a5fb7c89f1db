"""A call of an attention kernel, read from its arguments, and changed by way of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stable_core.attention_entropy import (
    AttentionStatistics,
    Rule,
    attention_statistics,
    largest_logits,
    what_a_rule_hides,
)

from .calls import Site
from .rules import with_sink

Arguments = dict[str, Any]  # of a call, by name


@dataclass(frozen=True)
class Scores:
    """Logits of sequences of one length: `rule` of scale * q.k, q (batch, heads, queries, head_dim), k (batch, key_heads, ...).

    `sinks` (heads,) are the logits of one more key, which every query sees.
    """

    q: Tensor
    k: Tensor
    scale: float
    rule: Rule | None = None
    sinks: Tensor | None = None

    def statistics(self) -> AttentionStatistics:
        k, rule = self.k, self.rule
        if self.sinks is not None:
            k, rule = torch.cat([k, torch.zeros_like(k[:, :, :1])], 2), with_sink(rule, self.sinks)
        return attention_statistics(self.q, k, scale=self.scale, rule=rule)

    def largest_logits(self, above: float) -> Tensor:
        return largest_logits(self.q, self.k, scale=self.scale, rule=self.rule, above=above)

    @property
    def tokens(self) -> tuple[int, int]:
        return self.q.shape[2], self.k.shape[2]

    def visible(self) -> tuple[Tensor | None, bool]:
        if self.rule is None:
            return None, False
        hidden, causal = what_a_rule_hides(self.rule, self.q.shape[0], *self.tokens, self.q.device)
        return hidden[:, None], causal and self.tokens[0] > 1


@dataclass(frozen=True)
class Kernel:
    """How the arguments of a function that computes attention are read, and changed so that its logits are divided by tau."""

    read: Callable[[Arguments], list[Scores]]  # sequences of different lengths are one Scores each
    at_temperature: Callable[[Arguments, float], Arguments]


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel. Its arguments are read when they are asked for, and an error in reading them is raised there."""

    site: Site
    kernel: Kernel
    arguments: Arguments

    @cached_property
    def _scores(self) -> list[Scores]:
        with torch.no_grad():
            return self.kernel.read(self.arguments)

    @property
    def tokens(self) -> tuple[int, int]:
        """Numbers of queries and keys, of all sequences together."""
        queries, keys = zip(*(scores.tokens for scores in self._scores), strict=True)
        return sum(queries), sum(keys)

    @property
    def head_dim(self) -> int:
        """Size of a query vector."""
        return self._scores[0].q.shape[-1]

    def at_temperature(self, tau: float) -> "KernelCall":
        """The call with its logits divided by tau."""
        return replace(self, arguments=self.kernel.at_temperature(self.arguments, tau))

    def statistics(self) -> AttentionStatistics:
        """The statistics of each row, (batch, heads, queries); those of sequences of different lengths one after the other."""
        rows = [scores.statistics() for scores in self._scores]
        return AttentionStatistics(*(torch.cat(one, dim=-1) for one in zip(*rows, strict=True)))

    def largest_logits(self, above: float) -> Tensor:
        """The largest scale * q.k of each query, as `Call.largest_logits`."""
        return torch.cat([scores.largest_logits(above) for scores in self._scores], dim=-1)

    def visible(self) -> tuple[Tensor | None, bool]:
        """As `Call.visible`. Sequences of their own lengths have no padding."""
        hidden, causal = zip(*(scores.visible() for scores in self._scores), strict=True)
        return hidden[0] if len(hidden) == 1 else None, any(causal)
