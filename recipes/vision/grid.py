"""The robustness grid of the σReparam paper [σ, Section 4.1], small, on CIFAR-10, with StableViT beside it.

By default plain ViT, σReparam without and with LayerNorm, and StableViT train with the same learning rates, batch sizes and
warm-ups, each from several seeds. An interrupted grid goes on where it stopped.
"""

import json
import os
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from recipes.command import command
from recipes.runs import last_line, python, run_all
from recipes.small_data import ROOT
from stable_monitor.records import read

from .data import CLASSES
from .diverged import lost

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MONITOR_EVERY = 20
LR_BASE_SIZE = 128
WIDTH = ("embed_dim=64", "num_heads=4")
PATCH = {"cifar10": 8, "cifar100": 8, "digits": 2, "digits32": 8}  # 16 of an image
PLAIN = ("norm=layernorm", "attention=dot", "init=stock")  # of which stablevit_small is timm's ViT; later values win


@dataclass(frozen=True)
class Model:
    label: str
    name: str
    kwargs: tuple[str, ...]
    color: str


MODELS = {
    "vit": Model("ViT", "vit_small_patch16_224", WIDTH, "tab:red"),
    "sigma": Model("σReparam, no LayerNorm", "sigma_vit_small_patch16_224", WIDTH, "tab:blue"),
    "sigma_preln": Model("σReparam, pre-LN", "sigma_vit_small_patch16_224_preln", WIDTH, "tab:purple"),
    "stable": Model("StableViT", "stablevit_small", WIDTH, "tab:green"),
    "sn": Model("spectral norm", "sigma_vit_small_patch16_224", (*WIDTH, "reparam=spectral"), "tab:orange"),
    "wn": Model("weight norm", "sigma_vit_small_patch16_224", (*WIDTH, "reparam=weight"), "tab:olive"),
    "wn_preln": Model(
        "weight norm, pre-LN", "sigma_vit_small_patch16_224_preln", (*WIDTH, "reparam=weight"), "tab:brown"
    ),
    "stable_init": Model("ViT, StableInit", "stablevit_small", (*WIDTH, *PLAIN, "init=stable"), "tab:orange"),
    "stable_norm": Model("ViT, StableNorm", "stablevit_small", (*WIDTH, *PLAIN, "norm=stable"), "tab:purple"),
    "stable_atten": Model("ViT, StableAtten", "stablevit_small", (*WIDTH, *PLAIN, "attention=stable"), "tab:blue"),
}


@dataclass(frozen=True)
class Point:
    """Of the grid; lr is for 128 images and grows with the batch, as in the paper."""

    lr: float
    batch: int
    warmup: float  # epochs

    def __str__(self) -> str:
        return f"lr {self.lr:g}, batch {self.batch}, {'warm-up' if self.warmup else 'no warm-up'}"


@dataclass(frozen=True)
class Run:
    model: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.point.lr:g}-{self.point.batch}-{self.point.warmup:g}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the whole grid."""

    output: Path = ROOT / "runs" / "vision_grid"
    seeds: tuple[int, ...] = (1, 2, 3)
    models: tuple[Literal[*MODELS], ...] = ("vit", "sigma", "sigma_preln", "stable")
    depth: int = 8
    """blocks"""
    lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """of an update of 128 images"""
    batches: tuple[int, ...] = (128,)
    warmups: tuple[float, ...] = (0.25, 0.0)
    """epochs"""
    opt: str = "adamw"
    weight_decay: float = 0.05
    epochs: int = 1
    data: Literal[*PATCH] = "cifar10"
    data_dir: Path | None = None
    jobs: int = os.cpu_count() or 1
    """runs at a time, a thread each"""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 0), ("depth", 1), ("batches", 1), ("epochs", 1), ("jobs", 1)):
            given = getattr(self, name)
            if min(given if isinstance(given, tuple) else (given,), default=-1) < least:
                raise ValueError(f"{name} = {given!r}: allowed are whole numbers from {least}")

    @property
    def points(self) -> list[Point]:
        return [Point(*point) for point in product(self.lrs, self.batches, self.warmups)]


def train(run: Run, settings: Settings) -> dict:
    """Trains one model in a process of its own; a line of the grid's log."""
    model, directory = MODELS[run.model], settings.output / run.name
    arguments = {
        "output": directory,
        "model": model.name,
        "data": settings.data,
        "epochs": settings.epochs,
        "batch-size": run.point.batch,
        "lr": run.point.lr,
        "lr-base-size": LR_BASE_SIZE,
        "warmup-epochs": run.point.warmup,
        "opt": settings.opt,
        "weight-decay": settings.weight_decay,
        "smoothing": 0.1,
        "monitor-every": MONITOR_EVERY,
        "seed": run.seed,
    }
    if settings.data_dir is not None:
        arguments["data-dir"] = settings.data_dir
    kwargs = (f"patch_size={PATCH[settings.data]}", f"depth={settings.depth}", *model.kwargs)
    flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    status, output = python("-m", "recipes.vision.train", *flags, "--model-kwargs", *kwargs)
    rows = (
        [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()] if directory.exists() else []
    )
    if status and not (rows and "stopped" in rows[-1]):
        raise RuntimeError(f"{run.name}: {last_line(output)}")
    records = read(directory)
    return {
        "model": run.model,
        **asdict(run.point),
        "seed": run.seed,
        "top1": rows[-1].get("top1"),
        "test_loss": rows[-1].get("test_loss"),
        "stopped": rows[-1].get("stopped"),
        "steps": [record["step"] for record in records],
        "losses": [record["loss"] for record in records],
        # of the layer that attends to least, nats
        "entropy": [min(statistics.fmean(x["entropy"]) for x in record["layers"].values()) for record in records],
        "alarms": sum(len(record["alarms"]) for record in records),
    }


def same_settings(settings: Settings) -> None:
    """Keeps apart in two directories what a run's name does not tell."""
    path = settings.output / "settings.json"
    given = {name: getattr(settings, name) for name in ("depth", "opt", "weight_decay", "epochs", "data")}
    kept = json.loads(path.read_text()) if path.exists() else given
    for name, value in given.items():
        if kept[name] != value:
            raise ValueError(
                f"{name} = {value!r}: {settings.output} holds runs with {kept[name]!r}; give another --output"
            )
    path.write_text(json.dumps(given))


def train_all(settings: Settings, console: Console) -> list[dict]:
    """The log of the grid; trains what it does not hold yet."""
    settings.output.mkdir(parents=True, exist_ok=True)
    same_settings(settings)
    runs = [
        Run(model, point, seed) for seed in settings.seeds for point in settings.points for model in settings.models
    ]

    def describe(line: dict) -> str:
        result = line["stopped"] or f"{line['top1']:.1f} %"
        return f"{MODELS[line['model']].label}, {point_of(line)}, seed {line['seed']}: {result}"

    jobs = {run.name: partial(train, run, settings) for run in runs}
    return run_all(jobs, settings.output / "log.jsonl", settings.jobs, describe, console)


def point_of(line: dict) -> Point:
    return Point(line["lr"], line["batch"], line["warmup"])


def points_of(log: list[dict]) -> list[Point]:
    return list(dict.fromkeys(map(point_of, log)))


def accuracies(log: list[dict], model: str, point: Point) -> list[float]:
    """By seed, percent; 0 of a run that became NaN."""
    return [line["top1"] or 0.0 for line in log if line["model"] == model and point_of(line) == point]


def rows(log: list[dict], classes: int = 10) -> list[tuple[str, ...]]:
    """Accuracies by point, a column a model, the seeds in order; what became of all of a model's runs."""
    models, points = list(dict.fromkeys(line["model"] for line in log)), points_of(log)
    every = [[x for point in points for x in accuracies(log, model, point)] for model in models]
    best = max(line["top1"] or 0.0 for line in log)
    of = [[line for line in log if line["model"] == model] for model in models]
    gone = [sum(lost(line["top1"], best, classes) for line in runs) for runs in of]
    rang = [sum(line["alarms"] > 0 for line in runs) for runs in of]
    last = [[line["entropy"] for line in log if (line["model"], point_of(line)) == (m, points[-1])] for m in models]
    return [
        *(
            (str(point), *(" / ".join(f"{x:.1f}" for x in accuracies(log, model, point)) for model in models))
            for point in points
        ),
        ("mean ± deviation", *(f"{np.mean(x):.1f} ± {np.std(x):.1f}" for x in every)),
        ("least", *(f"{min(x):.1f}" for x in every)),
        ("runs that diverged", *(f"{n} of {len(runs)}" for n, runs in zip(gone, of, strict=True))),
        ("runs in which the alarm rang", *(f"{n} of {len(runs)}" for n, runs in zip(rang, of, strict=True))),
        (
            f"least entropy, nats, at lr {points[-1].lr:g}",
            *(" / ".join(f"{min(x):.2f}" for x in runs) for runs in last),
        ),
    ]


def table(log: list[dict], classes: int) -> Table:
    models = dict.fromkeys(line["model"] for line in log)
    result = Table("", *(MODELS[model].label for model in models), title="test accuracy, %")
    for row in rows(log, classes):
        result.add_row(*row)
    return result


def picture(log: list[dict], path: Path, classes: int) -> None:
    """Accuracy at each point of the grid, a mark a seed; training loss and entropy at its last point, a line a seed."""
    models, points = list(dict.fromkeys(line["model"] for line in log)), points_of(log)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained", width_ratios=[3, 2, 2])
    for offset, model in zip(np.linspace(-0.25, 0.25, len(models)), models, strict=True):
        style = {"color": MODELS[model].color, "label": MODELS[model].label}
        marks = [(index + offset, x) for index, point in enumerate(points) for x in accuracies(log, model, point)]
        axes[0].plot(*zip(*marks, strict=True), "o", markersize=5, **style)
        for line in (line for line in log if line["model"] == model and point_of(line) == points[-1]):
            axes[1].plot(line["steps"], line["losses"], linewidth=1, **style)
            axes[2].plot(line["steps"], line["entropy"], linewidth=1, **style)
    axes[0].set_xticks(range(len(points)), [str(point).replace(", ", "\n") for point in points])
    axes[0].set(title="test accuracy, %", ylim=(0, None))
    axes[0].axhline(100 / classes, color="gray", linestyle=":", label="chance")
    axes[0].legend(fontsize=8)
    top = max(line["losses"][0] for line in log)  # a run that diverges would leave the others a flat line
    axes[1].set(xlabel="update", title=f"training loss, nats, {points[-1]}", ylim=(None, 1.5 * top))
    axes[2].set(xlabel="update", title="entropy of the layer where it is least, nats", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.vision.grid", description=__doc__)
    console = Console()
    log = train_all(settings, console)
    classes = CLASSES[settings.data]
    picture(log, settings.output / "grid.png", classes)
    console.print(table(log, classes))
    console.print(f"log and picture: {settings.output}/log.jsonl, {settings.output}/grid.png")
    return 0


if __name__ == "__main__":
    command(main, errors=(RuntimeError, ValueError))
