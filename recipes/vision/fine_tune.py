"""Fine-tunes a small ViT on other classes, plain and with σReparam at gamma = sigma, at several learning rates.

timm's ViT is trained on the first half of the classes, and then on a few images of the others by timm's optimizer, layer decay
and schedule. A line of JSON a run; an interrupted command goes on after the last whole run, or begins the first training again.
"""

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from recipes.command import command
from recipes.small_data import ROOT
from stable_core import SigmaReparamConfig, sigma_layers, sigma_reparam
from stable_core.targets import layers

from .data import CLASSES, SIZES, Arrays, load

LABELS = {
    "plain": "plain",
    "sigma": "σReparam",
    "sigma_body": "σReparam, not of the head",
    "sigma_one": "σReparam, gamma = 1",
}
HEADS = {"new": 0.02, "tiny": 2e-5, "kept": None}  # standard deviation
SHAPE = {"embed_dim": 128, "depth": 6, "num_heads": 4}
PATCH = {"cifar10": 8, "digits": 2}  # 16 of an image
WARMUP, WEIGHT_DECAY = 0.1, 0.05
TESTED = 2000  # images

Images = tuple[Tensor, Tensor]  # and their labels


@dataclass(frozen=True)
class Run:
    """What differs from one run to the next; layer_decay = 1 is none."""

    opt: str
    variant: str
    head: str
    layer_decay: float
    lr: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    output: Path = ROOT / "runs" / "vision_fine_tune"
    """folder for log.jsonl, to which runs are added, and the pretrained model"""
    data: Literal[*PATCH] = "cifar10"
    data_dir: Path | None = None
    variants: tuple[Literal[*LABELS], ...] = ("plain", "sigma")
    opt: str = "adamw"
    """an optimizer of timm's"""
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    layer_decays: tuple[float, ...] = (1.0, 0.8, 0.65)
    """1 is none"""
    heads: tuple[Literal[*HEADS], ...] = ("new",)
    """drawn as timm does or as MAE and BEiT do, at a standard deviation of 2e-5; or that of the first classes"""
    seeds: tuple[int, ...] = (1, 2, 3)
    pretraining: int = 4000
    """updates on the first half of the classes, of 64 images"""
    updates: int = 100
    batch_size: int = 16
    images: int = 500
    """to fine-tune on"""

    def __post_init__(self) -> None:
        if self.opt not in list_optimizers():
            raise ValueError(f"opt = {self.opt!r}: allowed are timm's: timm.optim.list_optimizers()")
        for name in ("lrs", "layer_decays", "pretraining", "updates", "batch_size", "images"):
            given = getattr(self, name)
            if min(given if isinstance(given, tuple) else (given,), default=0) <= 0:
                raise ValueError(f"{name} = {given!r}: allowed are positive numbers")

    @property
    def runs(self) -> list[Run]:
        grid = itertools.product(self.seeds, self.heads, self.layer_decays, self.lrs, self.variants)
        return [Run(self.opt, variant, head, decay, lr, seed) for seed, head, decay, lr, variant in grid]

    @property
    def shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("data", "pretraining", "updates", "batch_size", "images")}


def half(part: Arrays, first: int, classes: int) -> Images:
    """Images and labels of so many classes from the first on."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    labels = torch.as_tensor(np.asarray(part.labels, dtype=np.int64))
    own = (labels >= first) & (labels < first + classes)
    images = torch.from_numpy(part.images[own.numpy()]).permute(0, 3, 1, 2)
    return (images / 255 - mean) / std, labels[own] - first


def build(settings: Settings) -> nn.Module:
    sizes = {"img_size": SIZES[settings.data], "patch_size": PATCH[settings.data]}
    return timm.create_model("vit_small_patch16_224", num_classes=CLASSES[settings.data] // 2, **sizes, **SHAPE)


def train(
    model: nn.Module,
    data: Images,
    run: Run,
    updates: int,
    batch_size: int,
    mirrored: bool,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """A cosine after a warm-up. Returns the mean training loss of each tenth, and the head's gamma, if any, at its end."""
    images, labels = data
    decay = None if run.layer_decay == 1 else run.layer_decay
    optimizer = create_optimizer_v2(model, run.opt, lr=run.lr, weight_decay=WEIGHT_DECAY, layer_decay=decay)
    # timm's, which alone applies the layer decay to the rate
    schedule, _ = create_scheduler_v2(optimizer, "cosine", updates, warmup_epochs=round(WARMUP * updates))
    generator, losses = torch.Generator().manual_seed(run.seed), []
    gammas, found = [], [sigma.gamma for name, sigma in sigma_layers(model) if name == "head"]
    model.train()
    for update in range(updates):
        schedule.step(update)
        picked = torch.randint(len(images), (batch_size,), generator=generator)
        batch = images[picked]
        if mirrored:
            batch = torch.where(torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5, batch.flip(3), batch)
        loss = F.cross_entropy(model(batch), labels[picked])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        gammas += [gamma.item() for gamma in found]
        advance()
    tenths = min(10, updates)
    return {
        "losses": [round(float(part.mean()), 4) for part in np.array_split(losses, tenths)],
        "gamma": [round(float(part[-1]), 4) for part in np.array_split(gammas, tenths) if len(part)],
    }


@torch.no_grad()
def evaluate(model: nn.Module, data: Images) -> dict[str, float]:
    images, labels = (x[:TESTED] for x in data)
    model.eval()
    logits = torch.cat([model(part) for part in images.split(500)])
    top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
    return {"top1": round(top1, 2), "test_loss": round(F.cross_entropy(logits, labels).item(), 4)}


@torch.no_grad()
def norms(model: nn.Module) -> dict[str, float]:
    """The spectral norm of each layer's effective weight."""
    return {layer.name: torch.linalg.matrix_norm(layer.matrix, 2).item() for layer in layers(model)}


def pretrained(settings: Settings, train_on: Images, test_on: Images, mirrored: bool, bar: Progress) -> dict[str, Any]:
    """The plain model's state dict and its accuracy, out of a file once it is there."""
    path = settings.output / f"pretrained-{settings.data}-{settings.pretraining}.pt"
    if not path.exists():
        torch.manual_seed(0)
        model, run = build(settings), Run("adamw", "plain", "new", 1.0, 1e-3, 0)
        task = bar.add_task("pretraining", total=settings.pretraining)
        train(model, train_on, run, settings.pretraining, 64, mirrored, lambda: bar.advance(task))
        part = path.with_suffix(".part")
        torch.save({"model": model.state_dict(), **evaluate(model, test_on)}, part)
        part.replace(path)
    return torch.load(path)


def fine_tune(
    run: Run, settings: Settings, given: dict[str, Any], train_on: Images, test_on: Images, mirrored: bool
) -> dict[str, Any]:
    """A line of the log."""
    torch.manual_seed(run.seed)
    model = build(settings)
    model.load_state_dict(given["model"])
    if run.head != "kept":
        nn.init.normal_(model.head.weight, std=HEADS[run.head])
        nn.init.zeros_(model.head.bias)
    if run.variant != "plain":
        config = SigmaReparamConfig(gamma_init="one" if run.variant == "sigma_one" else "spectral")
        sigma_reparam(model, config, lambda module, name: run.variant != "sigma_body" or name != "head")
    before = norms(model)
    picked = torch.randperm(len(train_on[1]), generator=torch.Generator().manual_seed(run.seed))[: settings.images]
    few = train_on[0][picked], train_on[1][picked]
    trained = train(model, few, run, settings.updates, settings.batch_size, mirrored)
    after = norms(model)
    body = [after[name] / before[name] for name in before if name != "head"]
    return {
        **asdict(run),
        **settings.shared,
        "pretrained": given["top1"],
        **evaluate(model, test_on),
        **trained,
        # spectral norms: of the head at first and last; of the other layers, how many times the first, least, median, most
        "head_norm": [round(x, 5) for x in (before["head"], after["head"])],
        "grown": [round(x, 3) for x in (min(body), statistics.median(body), max(body))],
    }


def table(lines: list[dict]) -> Table:
    """By optimizer, head and layer decay a row for each variant: mean accuracy by rate, the seeds at the best.

    A mean of fewer seeds than the row's others has their number in brackets, and is not its best.
    """
    rates, seeds = sorted({line["lr"] for line in lines}), defaultdict(dict)
    for line in sorted(lines, key=lambda line: line["seed"]):
        row = line["opt"], list(HEADS).index(line["head"]), -line["layer_decay"], list(LABELS).index(line["variant"])
        seeds[row].setdefault(line["lr"], []).append(line["top1"])
    found = Table("", "layer decay", *(f"{lr:g}" for lr in rates), "seeds at the best")
    for (opt, head, decay, variant), own in sorted(seeds.items()):
        most = max(map(len, own.values()))
        best = max((x for x in own.values() if len(x) == most), key=statistics.mean)
        means = {lr: f"{statistics.mean(x):.1f}" + f" ({len(x)})" * (len(x) < most) for lr, x in own.items()}
        what = [list(LABELS.values())[variant], *[f"{list(HEADS)[head]} head"] * (head > 0), *[opt] * (opt != "adamw")]
        by_rate = (means.get(lr, "") for lr in rates)
        best = " / ".join(f"{x:.1f}" for x in best)
        found.add_row(", ".join(what), "none" if decay == -1 else f"{-decay:g}", *by_rate, best)
    return found


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.vision.fine_tune", description=__doc__)
    data, classes = load(settings.data, settings.data_dir), CLASSES[settings.data] // 2
    settings.output.mkdir(parents=True, exist_ok=True)
    log = settings.output / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in lines if settings.shared.items() <= line.items()]
    there = {Run(**{name: line[name] for name in Run.__match_args__}) for line in lines}
    missing = [run for run in settings.runs if run not in there]
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        first = (half(part, 0, classes) for part in (data.train, data.test))
        given = pretrained(settings, *first, data.mirrored, bar)
        others = [half(part, classes, classes) for part in (data.train, data.test)]
        task = bar.add_task("runs", total=len(settings.runs), completed=len(settings.runs) - len(missing))
        for run in missing:
            line = fine_tune(run, settings, given, *others, data.mirrored)
            with log.open("a") as file:
                file.write(f"{json.dumps(line)}\n")
            lines.append(line)
            bar.advance(task)
    console.print("test accuracy, %, by learning rate")
    console.print(table(lines))
    console.print(f"log: {log}")
    return 0


if __name__ == "__main__":
    command(main)
