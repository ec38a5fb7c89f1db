"""What the monitor adds to an update, in pairs of a plain and a recorded one."""

from collections.abc import Callable

from benchmarks.families import Step
from benchmarks.paired import seconds
from stable_monitor import Monitor

IDLE = 1000

Times = dict[str, list[float]]


def watching(step: Step, every: list[int], measure: Callable[[dict[str, Callable]], Times]) -> tuple[Times, float]:
    """Seconds of an update, plain, recorded and on average with a record every so many; and of `Monitor.step` between records.

    Between records there is nothing on the model but that call, timed by itself. The first record, which sets the hooks up,
    is not in it.
    """
    monitor = Monitor(step.model, 2)
    step()
    monitor.step(1.0)  # the first record; from here on the hooks are there only in `recorded`

    def recorded() -> None:
        monitor.step(1.0)  # puts the hooks in
        step()
        monitor.step(1.0)

    times = measure({"plain": step, "recorded": recorded})
    monitor.close()
    idle = Monitor(step.model, 10**9, step=1)
    between = seconds(lambda: [idle.step() for _ in range(IDLE)], step.device) / IDLE
    for n in every:
        pairs = zip(times["plain"], times["recorded"], strict=True)
        times[f"mean of {n} watched"] = [a + between + (b - a - between) / n for a, b in pairs]
    return times, between
