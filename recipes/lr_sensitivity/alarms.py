"""What an alarm hears: every setting of it on the runs of the comparison, as a table and a ROC.

    python -m recipes.lr_sensitivity.alarms recipes/lr_sensitivity/results/*.jsonl

A run is lost where its rate is above the best one of its variant and seed, and its validation loss more than MARGIN above that
one's; it is sound where it is no more than MARGIN above. It is lost from the record on from which its loss stays more than
MARGIN above that of the best rate, on the same batches; an alarm at that record or before is in time.

An alarm rings where a layer's entropy is below `fraction` of the highest that it had, and its largest logit above `logit`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import tyro

from recipes.command import command
from stable_monitor import AlarmConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARGIN = 0.1  # nats
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LOGITS = (0.0, 10.0, 20.0, 30.0, 50.0, 100.0)

Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    logs: tyro.conf.Positional[tuple[Path, ...]]
    """files of recipes.lr_sensitivity.logs"""
    picture: Path = Path("alarms.png")


@dataclass(frozen=True)
class Labelled:
    """A run, and from which update on it is lost; None for a sound one."""

    line: Line
    lost: int | None


def rings(line: Line, fraction: float, logit: float) -> int | None:
    """The first update at which the alarm rings."""
    highest: dict[str, float] = defaultdict(float)
    for i, step in enumerate(line["steps"]):
        for name, layer in line["layers"].items():
            entropy, largest = layer["entropy"][i], layer["logit"][i]
            if entropy is None or largest is None:
                continue
            highest[name] = max(highest[name], entropy)
            if entropy < fraction * highest[name] and largest > logit:
                return step
    return None


def label(lines: list[Line]) -> list[Labelled]:
    """Those of the runs of one variant and seed that are lost or sound; the others learn too slowly, at a low rate."""
    best = min(lines, key=_final)
    found = []
    for line in lines:
        if _final(line) <= _final(best) + MARGIN:
            found.append(Labelled(line, None))
        elif line["lr"] > best["lr"]:
            found.append(Labelled(line, _lost(line, best)))
    return found


def _final(line: Line) -> float:
    return math.inf if line["final"] is None else line["final"]


def _lost(line: Line, best: Line) -> int:
    """The update from which on the loss stays above that of the best rate."""
    above = [a > b + MARGIN for a, b in zip(_losses(line), _losses(best), strict=False)]
    since = len(above)
    while since and above[since - 1]:
        since -= 1
    return line["steps"][min(since, len(above) - 1)]


def _losses(line: Line) -> list[float]:
    return [math.inf if loss is None else loss for loss in line["loss"]]


def tell(runs: list[Labelled], fraction: float, logit: float) -> tuple[int, int, int]:
    """(lost runs that were heard, that were heard in time, sound runs in which it rang)."""
    heard = in_time = false = 0
    for run in runs:
        step = rings(run.line, fraction, logit)
        if step is not None:
            heard += run.lost is not None
            in_time += run.lost is not None and step <= run.lost
            false += run.lost is None
    return heard, in_time, false


def read(log: Path) -> list[Labelled]:
    series: dict[tuple, list[Line]] = defaultdict(list)
    for line in map(json.loads, log.read_text().splitlines()):
        series[line["variant"], line["seed"]].append(line)
    return [run for lines in series.values() for run in label(lines)]


def by_log(logs: Iterable[Path]) -> str:
    """Markdown: what the alarm as it is by default hears in each log, and in all."""
    alarm, runs_of = AlarmConfig(), {log.stem: read(log) for log in logs}
    runs_of["all"] = [run for runs in runs_of.values() for run in runs]
    lines = ["| | lost runs | heard | in time | sound runs | false alarms |\n|---|---|---|---|---|---|\n"]
    for name, runs in runs_of.items():
        heard, in_time, false = tell(runs, alarm.fraction, alarm.logit)
        lost = sum(run.lost is not None for run in runs)
        lines.append(f"| {name} | {lost} | {heard} | {in_time} | {len(runs) - lost} | {false} |\n")
    return "".join(lines)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.lr_sensitivity.alarms", description=__doc__)
    print(by_log(settings.logs))
    runs = [run for log in settings.logs for run in read(log)]
    lost = sum(run.lost is not None for run in runs)
    sound = len(runs) - lost
    print(
        f"{lost} lost runs, {sound} sound ones\n\n| fraction | logit | heard | in time | false alarms |\n|---|---|---|---|---|"
    )
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for logit in LOGITS:
        points = []
        for fraction in FRACTIONS:
            heard, in_time, false = tell(runs, fraction, logit)
            print(f"| {fraction:g} | {logit:g} | {heard} | {in_time} | {false} |")
            points.append((false / max(sound, 1), in_time / max(lost, 1)))
        axes.plot(*zip(*points, strict=True), "o-", ms=3, label=f"{logit:g}")
    axes.set(xlabel="sound runs in which it rings", ylabel="lost runs in which it rings in time")
    axes.legend(title="largest logit above", fontsize=8, title_fontsize=8)
    figure.savefig(settings.picture, dpi=110)
    print(f"\nwrote {settings.picture}")
    return 0


if __name__ == "__main__":
    command(main)
