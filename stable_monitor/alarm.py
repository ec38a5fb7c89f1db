"""The alarm: entropy that falls through a threshold set by how high the layer's has been and by how low it can get."""

import bisect
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from .optimizers import Optimizers, listed, short


@dataclass(frozen=True)
class AlarmConfig:
    """When a layer's attention entropy counts as collapsed.

    The entropy of a layer is that of its median head, so that half of the heads are enough. It has collapsed where it is below

        threshold = min(bound + fraction * (reference - bound), reference / 2)

    bound is the least entropy that logits of the present size allow [σ, Theorem 3.1]. reference is the highest that the median
    of the layer's earlier records has been, those below their threshold left out: the highest, because the median itself goes
    down in a collapse that takes several records. The threshold is at most half of it, because the bound of small logits is
    close to the entropy of uniform attention, which is no collapse. Entropy that is not a number counts as collapsed, too.

    A layer raises one alarm when it falls below the threshold, and none again before it has recovered: come back above twice
    the threshold, or above the middle between threshold and reference if that is lower. So one that hovers raises one alarm.

    Attributes:
        fraction: how much of the room between the bound and the past may be left, in (0, 1).
        patience: how many records a layer must have before it can raise an alarm.
    """

    fraction: float = 0.1
    patience: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction = {self.fraction!r}: allowed are numbers between 0 and 1")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience = {self.patience!r}: allowed are whole numbers from 1")


@dataclass(frozen=True)
class Alarm:
    """One layer's entropy has fallen through its threshold, or is not a number (NaN); entropies in nats.

    threshold and reference are NaN where the layer has never had an entropy.
    """

    step: int
    layer: str
    entropy: float
    threshold: float
    reference: float
    bound: float

    def __str__(self) -> str:
        if math.isnan(self.entropy):
            past = "" if math.isnan(self.reference) else f" (its highest median before: {self.reference:.3g})"
            return f"update {self.step}: entropy collapse in {self.layer}: not a number{past}"
        return (
            f"update {self.step}: entropy collapse in {self.layer}: {self.entropy:.3g} nats, below {self.threshold:.3g} "
            f"(its highest median before: {self.reference:.3g}; least possible for its logits: {self.bound:.3g})"
        )


class EntropyCollapse(RuntimeError):
    """Raised by `stop_training`; .alarm says where."""

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(str(alarm))
        self.alarm = alarm


def stop_training(alarm: Alarm) -> None:
    """An `on_alarm` that ends the run: raises EntropyCollapse out of `Monitor.step`."""
    raise EntropyCollapse(alarm)


class lower_learning_rate:  # an on_alarm with settings
    """An `on_alarm` that multiplies every learning rate by `factor`, once for each update with alarms.

    optimizer is one or several in a list, tuple or dict. Schedulers compute learning rates from those they started with: give
    the scheduler, and these are lowered too.

    Raises:
        ValueError: factor is not between 0 and 1; optimizer or scheduler are something else.
    """

    def __init__(self, optimizer: Optimizers, factor: float = 0.5, scheduler: Any = None) -> None:
        given: Any = factor  # numpy has real numbers that are no floats
        if not isinstance(given, Real) or not 0 < float(given) < 1:
            raise ValueError(f"factor = {factor!r}: allowed are numbers between 0 and 1")
        if not hasattr(scheduler, "get_last_lr") and scheduler is not None:
            raise ValueError(f"scheduler = {short(scheduler)}: allowed are None and torch's schedulers")
        self.optimizers, self.factor, self.scheduler = listed(optimizer), factor, scheduler
        self._last: int | None = None  # the last update with an alarm

    def __call__(self, alarm: Alarm) -> None:
        if alarm.step == self._last:
            return
        self._last = alarm.step
        lowered: set[int] = set()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():  # the last two are OneCycleLR's
                if id(group[name]) not in lowered:  # groups may share one tensor: it is lowered once
                    group[name] *= self.factor
                    lowered |= {id(group[name])} if isinstance(group[name], torch.Tensor) else set()
        for scheduler in _with_parts(self.scheduler):
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [lr * self.factor for lr in scheduler.base_lrs]


def _with_parts(scheduler: Any) -> list[Any]:
    """A scheduler and, where it is made of others, those."""
    parts = [part for inner in getattr(scheduler, "_schedulers", ()) for part in _with_parts(inner)]
    return parts if scheduler is None else [scheduler, *parts]


class Watch:
    """Goes over the records in order and says which alarms each one raises."""

    def __init__(self, config: AlarmConfig) -> None:
        self.config = config
        self._past: dict[str, list[float]] = defaultdict(list)  # sorted
        self._highest: dict[str, float] = defaultdict(float)
        self._records: dict[str, int] = defaultdict(int)
        self._collapsed: set[str] = set()

    def look(self, record: dict[str, Any]) -> list[Alarm]:
        """The alarms of one record, whose layers have lists of numbers, one for each head."""
        alarms = []
        for name, layer in record["layers"].items():
            if not layer.get("entropy") or layer.get("keys", 0) is None:  # no query had a key
                continue
            past, before = self._past[name], self._records[name]
            self._records[name] += 1
            entropy, bound = _median_head(layer["entropy"]), _median_head(layer.get("bound", []))
            bound = 0.0 if math.isnan(bound) else bound
            reference = threshold = math.nan
            if len(past) >= self.config.patience:
                reference = self._highest[name] = max(self._highest[name], past[(len(past) - 1) // 2])
                threshold = min(bound + self.config.fraction * (reference - bound), reference / 2)
            if entropy < threshold or (math.isnan(entropy) and before >= self.config.patience):
                if name not in self._collapsed:
                    alarms.append(Alarm(record["step"], name, entropy, threshold, reference, bound))
                self._collapsed.add(name)
                continue
            if not entropy <= min(2 * threshold, (threshold + reference) / 2):
                self._collapsed.discard(name)
            if not math.isnan(entropy):
                bisect.insort(past, entropy)
        return alarms


def _median_head(values: list[float | None]) -> float:
    """The lower median; NaN if one head's is null, because one such head makes everything after it not a number."""
    known = [value for value in values if value is not None]
    return statistics.median_low(known) if known and len(known) == len(values) else math.nan
