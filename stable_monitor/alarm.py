"""The alarm for attention entropy collapse: a layer's entropy falls below a threshold set by its own past and lower bound."""

import bisect
import math
from collections import defaultdict
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from .optimizers import Optimizers, listed, short, with_parts
from .verdicts import LARGE, LOW, Examination, largest_logit, median_head


@dataclass(frozen=True)
class AlarmConfig:
    """When a layer's attention entropy counts as collapsed.

    The entropy of a layer, in nats, is that of its median head, so that half of the heads suffice. It has collapsed where it is
    below fraction * reference while the layer's largest attention logit is above `logit`. reference is the highest value so far
    of the median of the layer's earlier records, without collapsed ones; the highest, because the median itself falls in a
    collapse that takes several records. Low entropy at small logits is attention that works. Entropy that is NaN counts as
    collapsed. The defaults hear most in time with one false alarm in 85 sound runs
    (recipes/lr_sensitivity).

    A layer raises one alarm when it falls below the threshold, and no other before it has recovered: above twice the
    threshold, or above the middle between threshold and reference if that is lower. So a layer that stays near its threshold
    raises one alarm.

    Attributes:
        fraction: the part of the reference below which entropy has collapsed, in (0, 1).
        logit: the largest attention logit that is no collapse, whatever the entropy.
        patience: number of records that a layer must have before it can raise an alarm, from 1.

    Raises:
        ValueError: a value is not allowed.
    """

    fraction: float = LOW
    patience: int = 1
    logit: float = LARGE

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction = {self.fraction!r}: allowed are numbers between 0 and 1")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience = {self.patience!r}: allowed are whole numbers from 1")
        if not self.logit >= 0:
            raise ValueError(f"logit = {self.logit!r}: allowed are numbers from 0")


@dataclass(frozen=True)
class Alarm:
    """The entropy of a layer fell below its threshold, or is NaN. All entropies are in nats, as `AlarmConfig` defines them.

    bound is the least entropy that logits of their size allow [σ, Theorem 3.1], logit the largest. threshold and reference are
    NaN where the layer has too few earlier records for them. `blowup` says that the loss had blown up before, so that the
    entropy fell with it: no rescue helps there. `again` says that the layer had collapsed before the run was resumed, and has
    not been rescued: a rescue acts on that, `stop_training` and `lower_learning_rate` do not.
    """

    step: int
    layer: str
    entropy: float
    threshold: float
    reference: float
    bound: float
    blowup: bool = False
    again: bool = False
    logit: float = math.inf

    def __str__(self) -> str:
        if math.isnan(self.entropy):
            past = "" if math.isnan(self.reference) else f" (its highest median before: {self.reference:.3g})"
            return f"update {self.step}: {self._what} in {self.layer}: not a number{past}"
        return (
            f"update {self.step}: {self._what} in {self.layer}: {self.entropy:.3g} nats, below {self.threshold:.3g} "
            f"(its highest median before: {self.reference:.3g}; largest logit: {self.logit:.3g})"
        )

    @property
    def _what(self) -> str:
        if self.again:
            return "entropy had collapsed before the run was resumed"
        return "entropy falls after the loss blew up" if self.blowup else "entropy collapse"


class EntropyCollapse(RuntimeError):
    """Raised by `stop_training`; its attribute `alarm` is the Alarm."""

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(str(alarm))
        self.alarm = alarm


def stop_training(alarm: Alarm) -> None:
    """For `Monitor(on_alarm=stop_training)`: ends the run by raising EntropyCollapse from `Monitor.step`."""
    if not alarm.again:
        raise EntropyCollapse(alarm)


class lower_learning_rate:  # a class, but used like the function `stop_training`
    """For `Monitor(on_alarm=...)`: multiplies every learning rate by `factor`, once for each update with alarms.

    Args:
        optimizer: one, or several in a list, tuple or dict.
        factor: between 0 and 1.
        scheduler: torch's learning rate scheduler, if there is one. It computes learning rates from its base rates, which are
            lowered, too; else it would undo the change.

    Raises:
        ValueError: factor is not between 0 and 1; optimizer or scheduler are of another type.
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
        if alarm.again or alarm.step == self._last:
            return
        self._last = alarm.step
        lowered: set[int] = set()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():  # the last two are OneCycleLR's
                if id(group[name]) not in lowered:  # groups may share one tensor: it is lowered once
                    group[name] *= self.factor
                    lowered |= {id(group[name])} if isinstance(group[name], torch.Tensor) else set()
        for scheduler in with_parts(self.scheduler):
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [lr * self.factor for lr in scheduler.base_lrs]


class Watch:
    """Finds the alarms of records, which it must be shown in order."""

    def __init__(self, config: AlarmConfig) -> None:
        self.config, self.examination = config, Examination()
        self._past: dict[str, list[float]] = defaultdict(list)  # sorted
        self._highest: dict[str, float] = defaultdict(float)
        self._records: dict[str, int] = defaultdict(int)
        self.collapsed: set[str] = set()
        self._answered: set[str] = set()  # since their last alarm: rescued, or not to be rescued
        self._again: set[str] = set()
        self._late = False
        self._uniform: dict[str, float] = {}  # log(keys), of layers whose past is not known

    def resume(self) -> None:
        """What was shown, if anything, was of before the run was resumed: tells again what has collapsed unanswered.

        Where nothing was shown, a layer's first record is held against log(keys), the entropy of attention to all keys alike.
        """
        self._again, self._late = self.collapsed - self._answered, not self._records

    def look(self, record: dict[str, Any]) -> list[Alarm]:
        """The alarms that this record of the monitor raises."""
        alarms = []
        self.examination.look(record)
        blowup = self.examination.blew_up
        for name, layer in record["layers"].items():
            if not layer.get("entropy") or layer.get("keys", 0) is None:  # every query had all keys masked
                continue
            past, before = self._past[name], self._records[name]
            self._records[name] += 1
            entropy, bound = median_head(layer["entropy"]), median_head(layer.get("bound", []))
            bound = 0.0 if math.isnan(bound) else bound
            reference, logit, again = math.nan, largest_logit(layer), name in self._again
            if len(past) >= self.config.patience:
                reference = self._highest[name] = max(self._highest[name], past[(len(past) - 1) // 2])
            elif self._late and layer.get("keys", 0) > 1:
                reference, again = math.log(layer["keys"]), True
                self._uniform[name] = reference
            else:
                reference = self._uniform.get(name, math.nan)
            threshold = self.config.fraction * reference
            self._again.discard(name)
            if (entropy < threshold and logit > self.config.logit) or (
                math.isnan(entropy) and before >= self.config.patience
            ):
                if name not in self.collapsed or again:
                    step = record["step"]
                    alarms.append(Alarm(step, name, entropy, threshold, reference, bound, blowup, again, logit))
                    (self._answered.add if blowup else self._answered.discard)(name)
                self.collapsed.add(name)
                continue
            if not entropy <= min(2 * threshold, (threshold + reference) / 2):
                self.collapsed.discard(name)
            if not math.isnan(entropy):
                bisect.insort(past, entropy)
        self._late = self._late and not record["layers"]
        self._answered.update(rescued["layer"] for rescued in record.get("rescues", ()))
        return alarms
