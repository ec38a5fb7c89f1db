"""What the monitor's callbacks under trainers have in common: their settings, what an alarm does, what the trainer logs."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .alarm import Alarm, AlarmConfig
from .chosen import Chosen
from .monitor import Monitor
from .writers import headline


class Watching:
    """A callback with a `Monitor`, which it makes when training begins.

    Args:
        every: updates from one record to the next.
        on_alarm: one of `on_alarms`, or a function of the `Alarm`.
        alarm, writers, attention: as for `Monitor`.

    Raises:
        ValueError: every is no whole number from 1, or on_alarm is something else. What else `Monitor` refuses, it refuses when
            training begins.
    """

    on_alarms: tuple[str, ...] = ("warn", "stop")

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
        if on_alarm not in self.on_alarms and not callable(on_alarm):
            raise ValueError(
                f"on_alarm = {on_alarm!r}: allowed are {', '.join(map(repr, self.on_alarms))} and functions of an Alarm"
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
        self._stop = self.on_alarm == "stop"
        return None


def logged(record: dict[str, Any]) -> dict[str, float]:
    """What a trainer logs of a record."""
    return {f"attention_{name}": value for name, value in headline(record).items()}
