"""Puts a claim of the σReparam paper to the test: short trainings of several models on the same data, with several seeds.

An interrupted command goes on with the run that it was at; finished runs are in the log, and left alone.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import matplotlib
import tyro
from rich.console import Console
from rich.table import Table

from recipes.command import command
from recipes.runs import run_all

from .experiments import EXPERIMENTS, ROOT, Experiment, Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which experiment, and how much of it."""

    experiment: tyro.conf.Positional[Literal[*EXPERIMENTS]]
    """translation (18L-18L), depth (100L-100L), speech (CTC) or simclr"""
    output: Path = ROOT / "runs" / "evidence"
    """the experiment's is a folder in it"""
    seeds: tuple[int, ...] = (1, 2, 3)
    length: int | None = None
    """updates of each run, epochs of simclr; the experiment's own by default"""
    jobs: int = os.cpu_count() or 1
    """runs at a time, a thread each"""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 0), ("length", 1), ("jobs", 1)):
            given = getattr(self, name)
            if given is not None and min(given if isinstance(given, tuple) else (given,), default=-1) < least:
                raise ValueError(f"{name} = {given!r}: allowed are whole numbers from {least}")


def run(settings: Settings, console: Console) -> list[dict]:
    experiment, out = EXPERIMENTS[settings.experiment], settings.output / settings.experiment
    out.mkdir(parents=True, exist_ok=True)
    experiment.prepare(out)

    def job(run: Run) -> dict:
        folder = out / run.name
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run; these are too short to go on within one
        folder.mkdir()
        return {**asdict(run), **experiment.train(experiment.models[run.model], run, out)}

    def describe(line: dict) -> str:
        return f"{experiment.models[line['model']].label}, lr {line['lr']:g}, seed {line['seed']}: {shown(line)}"

    length = settings.length or experiment.length
    runs = [
        Run(model, lr, seed, length) for seed, lr, model in product(settings.seeds, experiment.lrs, experiment.models)
    ]
    return run_all({r.name: lambda r=r: job(r) for r in runs}, out / "log.jsonl", settings.jobs, describe, console)


def shown(line: dict) -> str:
    return "NaN" if line["result"] is None else f"{line['result']:.3g}"


def halved(line: dict) -> str:
    """The update at which the least entropy was first seen below half of log(keys)."""
    return next((str(step) for step, share in zip(line["recorded"], line["entropy"], strict=True) if share < 0.5), "-")


def rows(experiment: Experiment, log: list[dict]) -> list[tuple[str, ...]]:
    """Model, learning rate, result, least entropy, when it was halved, alarms; the seeds in order."""
    result = []
    for lr, (name, model) in product(experiment.lrs, experiment.models.items()):
        lines = [line for line in log if line["model"] == name and line["lr"] == lr]
        entropy = (f"{min(line['entropy']):.2f}" for line in lines)
        alarms = (str(line["alarms"]) for line in lines)
        cells = (map(shown, lines), entropy, map(halved, lines), alarms)
        result.append((model.label, f"{lr:g}", *map(" / ".join, cells)))
    return result


def table(experiment: Experiment, log: list[dict]) -> Table:
    columns = ("", "learning rate", experiment.result, "least entropy / log(keys)", "below half at update", "alarms")
    result = Table(*columns, title=experiment.title)
    for row in rows(experiment, log):
        result.add_row(*row)
    return result


def picture(experiment: Experiment, log: list[dict], path: Path) -> None:
    """A row a learning rate: training loss, least entropy, and the result; a line or a mark a seed."""
    rows = len(experiment.lrs)
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.6 * rows), squeeze=False, layout="constrained")
    first = [max(line["losses"][0] for line in log if line["lr"] == lr) for lr in experiment.lrs]
    for (loss, entropy, result), lr, top in zip(axes, experiment.lrs, first, strict=True):
        for index, (name, model) in enumerate(experiment.models.items()):
            for line in (line for line in log if line["model"] == name and line["lr"] == lr):
                label = model.label if line["seed"] == log[0]["seed"] else None
                style = {"color": model.color, "linewidth": 1}
                loss.plot(line["steps"], line["losses"], label=label, **style)
                entropy.plot(line["recorded"], line["entropy"], **style)
                if line["result"] is not None:
                    result.plot(line["result"], index, "o", color=model.color)
        loss.set(xlabel="update", title=f"{experiment.loss}, lr {lr:g}", ylim=(0, 1.1 * top))
        entropy.set(xlabel="update", title="least layer's entropy / log(keys)", ylim=(0, 1.05))
        result.set(title=experiment.result)
        result.set_yticks(range(len(experiment.models)), [model.label for model in experiment.models.values()])
        result.invert_yaxis()
        for axis in (loss, entropy, result):
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(experiment.title)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.evidence.run", description=__doc__)
    console = Console()
    log, experiment = run(settings, console), EXPERIMENTS[settings.experiment]
    path = settings.output / settings.experiment / "picture.png"
    picture(experiment, log, path)
    console.print(table(experiment, log))
    console.print(f"log and picture: {path.with_name('log.jsonl')}, {path}")
    return 0


if __name__ == "__main__":
    command(main, errors=(RuntimeError, ValueError), name="evidence")
