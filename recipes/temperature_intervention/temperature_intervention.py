"""Attention made ten times sharper in the middle of training: Figures 2, 8 and 9 of the σReparam paper, small, on the CPU.

A small Vision Transformer learns the handwritten digits of scikit-learn. At an intervention epoch the temperature of all its
attention goes from 1 to tau. An interrupted command goes on after its last finished run.
"""

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stable_monitor import Monitor, adamw_stability_threshold, attention_temperature, sharpness

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from recipes.command import command

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 1797  # to train on: all of them, as the paper looks at training performance
HESSIAN_IMAGES = 128
BATCH = 64
LR, BETAS, WEIGHT_DECAY = 1e-2, (0.9, 0.95), 0.2
EPOCHS = 30
WARMUP = 0.3  # of all epochs
FIRST_BLOCK = "blocks.0.attn"


@dataclass(frozen=True)
class Setting:
    at: float  # intervention epoch, as a part of all epochs; 1: none
    tau: float


NONE = Setting(1, 1)
FIGURES = {
    2: (NONE, Setting(0.2, 0.1), Setting(0.5, 0.1)),
    8: (NONE, *(Setting(at, 0.1) for at in (0.1, 0.2, 0.3, 0.5, 0.7))),
    9: (NONE, *(Setting(0.2, tau) for tau in (0.05, 0.1, 0.16, 0.3, 100))),
}


def train(setting: Setting, seed: int, epochs: int) -> Iterator[dict]:
    """Trains one model and yields a row for each epoch.

    `epoch` is how many came before. Temperature, learning rate, entropy (nats, mean over heads) and spectral norm of the
    query projection in the first block, and the eigenvalues are those at its beginning, after an intervention; loss (nats)
    and accuracy are the means over its batches. Eigenvalues are there for every tenth of the training.
    """
    digits = load_digits()
    images = torch.tensor(digits.images[:IMAGES], dtype=torch.float32).unsqueeze(1)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(digits.target[:IMAGES])
    subset = [(images[:HESSIAN_IMAGES], labels[:HESSIAN_IMAGES])]
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    batches_per_epoch = len(images) // BATCH
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min(1, (update + 1) / (WARMUP * epochs * batches_per_epoch))
    )
    model.train()
    with Monitor(model, batches_per_epoch, optimizer=optimizer) as monitor, attention_temperature(model) as temperature:
        for epoch in range(epochs):
            temperature.tau = setting.tau if epoch >= round(setting.at * epochs) else 1
            spectra = {}
            if epoch and epoch % (epochs // 10) == 0:
                spectra = {
                    "hessian": sharpness(model, batch_loss, subset),
                    "preconditioned": sharpness(model, batch_loss, subset, optimizer=optimizer),
                }
            losses, right = [], []
            for batch in torch.randperm(len(images))[: batches_per_epoch * BATCH].split(BATCH):
                logits = model(images[batch])
                loss = F.cross_entropy(logits, labels[batch])
                loss.backward()
                monitor.step(loss)
                optimizer.step()
                warmup.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                right.append((logits.argmax(1) == labels[batch]).float().mean().item())
            block = monitor.last["layers"][FIRST_BLOCK]
            yield {
                "epoch": epoch,
                "loss": round(statistics.fmean(losses), 5),
                "accuracy": round(statistics.fmean(right), 4),
                "entropy": round(statistics.fmean(block["entropy"]), 4),
                "sigma_q": block["sigma"]["q"],
                "lr": monitor.last["lr"],
                "tau": temperature.tau,
                "alarms": [alarm["layer"] for alarm in monitor.last["alarms"]],
                **{name: [float(f"{value:.4g}") for value in values] for name, values in spectra.items()},
            }


def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@dataclass(frozen=True)
class Run:
    setting: Setting
    seed: int
    epochs: int


Logs = dict[Run, list[dict]]


def read(log: Path) -> Logs:
    """The finished runs, a line each, and their rows."""
    logs = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        run = json.loads(line)
        logs[Run(Setting(run["at"], run["tau"]), run["seed"], run["epochs"])] = run["rows"]
    return logs


def train_all(runs: list[Run], log: Path, console: Console) -> Logs:
    """Trains what the log does not hold yet."""
    logs = read(log)
    columns = ("{task.description:24}", BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(run.epochs for run in runs))
        for run in runs:
            if run in logs:
                progress.advance(task, run.epochs)
                continue
            progress.update(task, description=f"seed {run.seed}, {label(run.setting, run.epochs)}")
            rows = []
            for row in train(run.setting, run.seed, run.epochs):
                rows.append(row)
                progress.advance(task)
            logs[run] = rows
            line = json.dumps({"seed": run.seed, "epochs": run.epochs, **asdict(run.setting), "rows": rows})
            whole = log.with_suffix(".part")  # renamed when it is whole, so that no line of the log is ever cut short
            whole.write_text((log.read_text() if log.exists() else "") + line + "\n")
            whole.replace(log)
    return {run: logs[run] for run in runs}


def label(setting: Setting, epochs: int) -> str:
    return "no intervention" if setting == NONE else f"τ = {setting.tau:g} at epoch {round(setting.at * epochs)}"


# --------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Panel:
    title: str
    value: Callable[[dict], float]  # of a row; KeyError where it was not measured
    log_scale: bool = False
    with_threshold: bool = False
    drawstyle: str = "default"


ACCURACY = Panel("training accuracy", lambda row: row["accuracy"])
ENTROPY = Panel("attention entropy of block 1, nats", lambda row: row["entropy"])
PRECONDITIONED = Panel("|λ1|, preconditioned Hessian", lambda row: abs(row["preconditioned"][0]), True, True)
HESSIAN = [Panel(f"|λ{i + 1}|, Hessian", lambda row, i=i: abs(row["hessian"][i]), True, True) for i in range(5)]
LEFT = (
    Panel("training loss, nats", lambda row: row["loss"], log_scale=True),
    ACCURACY,
    Panel("spectral norm of W_Q, block 1", lambda row: row["sigma_q"]),
    ENTROPY,
    Panel("learning rate", lambda row: row["lr"]),
    Panel("temperature τ", lambda row: row["tau"], log_scale=True, drawstyle="steps-post"),
)
FULL = list(zip(LEFT, (*HESSIAN, PRECONDITIONED), strict=True))
LAYOUTS = {2: [(ACCURACY, ENTROPY, HESSIAN[0], PRECONDITIONED)], 8: FULL, 9: FULL}


def threshold(row: dict) -> float:
    return adamw_stability_threshold(row["lr"], BETAS[0])


def curve(rows: list[dict], value: Callable[[dict], float]) -> dict[int, float]:
    """By epoch, where it was measured."""
    points = {}
    for row in rows:
        with suppress(KeyError):
            points[row["epoch"]] = value(row)
    return points


def draw(panel: Panel, axes: plt.Axes, logs: Logs) -> None:
    """Medians over the seeds; from the least to the largest is shaded."""
    first = next(iter(logs))
    settings = list(dict.fromkeys(run.setting for run in logs))
    colors = ["black", *plt.get_cmap("turbo")(np.linspace(0.08, 0.9, len(settings) - 1))]
    for setting, color in zip(settings, colors, strict=True):
        curves = [curve(rows, panel.value) for run, rows in logs.items() if run.setting == setting]
        epochs, values = list(curves[0]), np.array([list(points.values()) for points in curves])
        style = {"color": color, "drawstyle": panel.drawstyle, "marker": "." if panel.with_threshold else None}
        name = label(setting, first.epochs)
        axes.plot(epochs, np.median(values, 0), linewidth=1.3, label=name, **style)
        axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    if panel.with_threshold:
        limits = curve(logs[first], threshold)
        limits.pop(0)  # the first update's learning rate is next to nothing
        axes.plot(limits.keys(), limits.values(), "k--", linewidth=1.2, label="threshold, 38 / learning rate")
    axes.set_title(panel.title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if panel.log_scale:
        axes.set_yscale("log")


def picture(layout: list[tuple[Panel, ...]], logs: Logs, path: Path) -> None:
    size = (11, 1.1 + 1.7 * len(layout))
    canvas, grid = plt.subplots(len(layout), len(layout[0]), figsize=size, sharex=True, squeeze=False)
    canvas.set_layout_engine("constrained")
    for panels, axes_row in zip(layout, grid, strict=True):
        for panel, axes in zip(panels, axes_row, strict=True):
            draw(panel, axes, logs)
    for axes in grid[-1]:
        axes.set_xlabel("epoch", fontsize=9)
    canvas.legend(*grid[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    canvas.set_dpi(90)
    canvas.canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(128).save(path)  # a palette: half the bytes
    plt.close(canvas)


def table(logs: Logs) -> Table:
    """What the pictures show, in numbers; the seeds in order."""
    result = Table(title="Before, at and after the intervention: entropy of block 1; loss; sharpness / threshold")
    for name in ("", "entropy", "at", "least", "last", "loss", "worst", "last", "|λ1|", "preconditioned", "times over"):
        result.add_column(name)
    for setting in dict.fromkeys(run.setting for run in logs):
        runs = [run for run in logs if run.setting == setting]
        cells = zip(*(numbers(run, logs[run]) for run in runs), strict=True)
        row = (" / ".join(f"{x:.2g}" for x in of_seeds) for of_seeds in cells)
        result.add_row(label(setting, runs[0].epochs), *row)
    return result


def numbers(run: Run, rows: list[dict]) -> list[float]:
    start = 1 if run.setting == NONE else round(run.setting.at * run.epochs)
    before, since = rows[start - 1], rows[start:]
    losses = [row["loss"] for row in since]
    raw = curve(since, lambda row: abs(row["hessian"][0]) / threshold(row)).values()
    # The threshold is derived for positive curvature: an eigenvalue below zero does not count, however large.
    preconditioned = curve(since, lambda row: max(row["preconditioned"]) / threshold(row)).values()
    entropies = [row["entropy"] for row in (before, since[0], min(since, key=lambda row: row["entropy"]), since[-1])]
    over = sum(x > 1 for x in preconditioned)
    return [*entropies, before["loss"], max(losses), losses[-1], max(raw), max(preconditioned), over]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m recipes.temperature_intervention.temperature_intervention"
    )
    parser.add_argument("--figure", choices=[*map(str, FIGURES), "all"], default="all", help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="(default: 1; README.md's figures: 1 2 3)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="a multiple of 10 (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "runs" / "temperature_intervention",
        help="(default: runs/temperature_intervention)",
    )
    args = parser.parse_args(arguments)
    if args.epochs < 10 or args.epochs % 10:
        parser.error(f"--epochs {args.epochs}: allowed are multiples of 10")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: allowed are whole numbers from 0, each once")
    torch.set_num_threads(1)
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    figures = list(FIGURES) if args.figure == "all" else [int(args.figure)]
    settings = {setting for figure in figures for setting in FIGURES[figure]}
    settings = sorted(settings, key=lambda setting: (setting != NONE, setting.at, setting.tau))  # as colours go
    runs = [Run(setting, seed, args.epochs) for seed in args.seeds for setting in settings]
    logs = train_all(runs, args.output / "log.jsonl", console)
    for figure in figures:
        shown = {run: rows for run, rows in logs.items() if run.setting in FIGURES[figure]}
        path = args.output / f"figure{figure}.png"
        picture(LAYOUTS[figure], shown, path)
        console.print(f"Figure {figure}: {path}")
    console.print(table(logs))
    return 0


if __name__ == "__main__":
    logging.getLogger("stable_monitor").setLevel(logging.ERROR)  # alarms are what is expected here; the log holds them
    command(main, "; the same command goes on after the last finished run", (RuntimeError, ValueError))
