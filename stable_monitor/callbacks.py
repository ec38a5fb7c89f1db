"""What the monitor's callbacks under trainers have in common: their settings, what an alarm does, what the trainer logs."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .alarm import Alarm, AlarmConfig
from .chosen import Chosen
from .monitor import Monitor
from .writers import headline

log = logging.getLogger("stable_monitor")
ON_ALARM = ("warn", "stop", "rescue")


class Watching:
    """A callback with a `Monitor`, which it makes when training begins. Trainers differ in `_rescue` and `_way_on`.

    Args:
        every: updates from one record to the next.
        on_alarm: one of `ON_ALARM`, or a function of the `Alarm`.
        alarm, writers, attention: as for `Monitor`.

    Raises:
        ValueError: every is no whole number from 1, or on_alarm is something else. What else `Monitor` refuses, it refuses when
            training begins.
    """

    def __init__(
        self,
        every: int = 100,
        on_alarm: str | Callable[[Alarm], Any] = "warn",
        *,
        alarm: AlarmConfig | None = None,
        writers: Iterable[Callable[[dict[str, Any]], None]] = (),
        attention: Chosen | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(every, int) or every < 1:  # the monitor would say so at the start of training
            raise ValueError(f"every = {every!r}: allowed are whole numbers from 1")
        if on_alarm not in ON_ALARM and not callable(on_alarm):
            raise ValueError(
                f"on_alarm = {on_alarm!r}: allowed are {', '.join(map(repr, ON_ALARM))} and functions of an Alarm"
            )
        self.every, self.on_alarm, self.alarm, self.writers = every, on_alarm, alarm, writers
        self.attention = attention
        self.monitor: Monitor | None = None
        self._stop = False  # whether an alarm asks for the end of training

    def _watch(self, model: nn.Module, **settings: Any) -> Monitor:
        """The monitor of a training that begins."""
        self._stop = False
        self.monitor = Monitor(
            model,
            self.every,
            alarm=self.alarm,
            on_alarm=self._on_alarm,
            writers=self.writers,
            attention=self.attention,
            **settings,
        )
        return self.monitor

    def _on_alarm(self, alarm: Alarm) -> Any:
        if callable(self.on_alarm):
            return self.on_alarm(alarm)
        if self.on_alarm == "rescue":
            return self._rescued(alarm)
        self._stop = self._stop or (self.on_alarm == "stop" and not alarm.again)
        return None

    def _rescued(self, alarm: Alarm) -> Any:
        """What was rescued; where that cannot be done, training stops with a checkpoint and a line that says how to go on."""
        try:
            return self._rescue(alarm)
        except Exception as error:  # whatever it is, a checkpoint is worth more than the next update
            checkpoint, way_on = self._way_on(alarm)
            log.error("not rescued: %s. The training stops with %s; to go on: %s", error, checkpoint, way_on)
            self._stop = True
            return None

    def _rescue(self, alarm: Alarm) -> Any:
        raise NotImplementedError

    def _way_on(self, alarm: Alarm) -> tuple[str, str]:
        """The checkpoint that the training will stop with, and what to do with it."""
        raise NotImplementedError


def logged(record: dict[str, Any]) -> dict[str, float]:
    """What a trainer logs of a record."""
    return {f"attention_{name}": value for name, value in headline(record).items()}
