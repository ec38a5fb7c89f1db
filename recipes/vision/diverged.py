"""Which of several runs beside each other diverged, as the paper means it [σ, Section 4.1]: a run whose accuracy is lost.

The monitor's alarm is told beside it and decides nothing: entropy may fall and come back.
"""

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from stable_monitor.records import read

from .data import CLASSES


@dataclass(frozen=True)
class Settings:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """directories of recipes.vision.train"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs = (): allowed are directories of recipes.vision.train, one or more")
        for run in self.runs:
            if not (run / "log.jsonl").is_file():
                raise ValueError(f"runs = {run}: allowed are directories of recipes.vision.train with a whole epoch")


@dataclass(frozen=True)
class Run:
    """What the log of a run says; accuracies are of its epochs, percent."""

    name: str
    epochs: int
    ended: bool
    accuracies: tuple[float, ...]
    became_nan: bool
    classes: int
    alarm: str

    @property
    def final(self) -> float | None:
        """None where the run was lost to NaN, or has no epoch yet."""
        return None if self.became_nan or not self.accuracies else self.accuracies[-1]


def lost(final: float | None, best: float, classes: int) -> bool:
    """Whether a run ended as NaN, or with at most half of the best accuracy (percent) of those beside it, or twice chance."""
    return final is None or final <= max(best / 2, 200 / classes)


def look(directory: Path) -> Run:
    settings = json.loads((directory / "settings.json").read_text())
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    became_nan = not math.isfinite(rows[-1]["train_loss"])
    alarms = [f"update {x['step']}, {alarm['layer']}" for x in read(directory) for alarm in x["alarms"]]
    return Run(
        directory.name,
        rows[-1]["epoch"],
        became_nan or (rows[-1]["epoch"] == settings["epochs"] and "top1" in rows[-1]),
        tuple(row["top1"] for row in rows if "top1" in row),
        became_nan,
        CLASSES.get(settings["data"], settings["num_classes"]),
        alarms[0] if alarms else "-",
    )


def verdicts(runs: list[Run]) -> list[str]:
    """ "NaN", "accuracy lost" or "no"; of a run that has not ended "-"."""
    best = max((accuracy for run in runs for accuracy in run.accuracies), default=0.0)

    def verdict(run: Run) -> str:
        if not run.ended:
            return "-"
        if run.became_nan:
            return "NaN"
        return "accuracy lost" if lost(run.final, best, run.classes) else "no"

    return [verdict(run) for run in runs]


def summary(runs: list[Run]) -> str:
    """How many diverged of those that ended, and the mean and deviation of the others' accuracies."""
    told = verdicts(runs)
    kept = [run.final for run, verdict in zip(runs, told, strict=True) if verdict == "no"]
    ended = len(runs) - told.count("-")
    others = f"; top-1 of the others {statistics.fmean(kept):.2f} ± {statistics.pstdev(kept):.2f} %" if kept else ""
    left = f"; {told.count('-')} have not ended" if "-" in told else ""
    return f"{ended - len(kept)} of {ended} diverged{others}; the alarm rang in {sum(run.alarm != '-' for run in runs)}{left}"


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.vision.diverged", description=__doc__)
    runs = [look(directory) for directory in settings.runs]
    table = Table("run", "epochs", "top-1, %", "diverged", "first alarm")
    for run, verdict in zip(runs, verdicts(runs), strict=True):
        table.add_row(run.name, str(run.epochs), "-" if run.final is None else f"{run.final:.2f}", verdict, run.alarm)
    console = Console()
    console.print(table)
    console.print(summary(runs), highlight=False)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"diverged: {error}")
