"""What the monitor adds to training, on a ViT-S and on a 6L-6L translation model: `python -m benchmarks.monitor`.

One process; in every round one plain update and one recorded update of the same model on the same batch, so that a machine
that slows down slows both. Between records there is nothing on the model but the call of `Monitor.step`, timed by itself.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.step_time import Step, Task, build, chip, save
from stable_monitor import Monitor


class ImageStep(Step):
    """One update of a vision transformer with torch's Adam on a fixed batch."""

    def __init__(self, model: nn.Module, images: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        self.images = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
        self.target = torch.arange(images, device=device)

    def logits(self) -> torch.Tensor:
        return self.model(self.images)


def seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(step: Step, rounds: int, label: str) -> tuple[float, list[float], list[float], float]:
    """Seconds of the first recorded update, of plain and of recorded ones in turn, and of Monitor.step between records."""
    monitor = Monitor(step.model, 2)
    first = seconds(lambda: (step(), monitor.step(1.0)))
    plain, recorded = [], []
    for _ in track(range(rounds), label, console=Console(stderr=True)):
        plain.append(step())
        recorded.append(seconds(lambda: (monitor.step(1.0), step(), monitor.step(1.0))))  # the first puts the hooks in
    monitor.close()
    idle = Monitor(step.model, 10**9, step=1)
    return first, plain, recorded, seconds(lambda: [idle.step() for _ in range(1000)]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="a step of the ViT-S (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="target tokens a step (default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="updates from record to record (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the table to this file too")
    args = parser.parse_args()
    device = torch.device(args.device)
    for i in range(8000 - len(Task.source_dictionary)):
        Task.source_dictionary.add_symbol(str(i))
    steps = {
        f"ViT-S/16, {args.images} images": ImageStep(
            timm.create_model("vit_small_patch16_224").to(device).train(), args.images, device
        ),
        f"6L-6L, width 512, {args.tokens} tokens": Step(
            build("post-LN", 6, 512, device), max(1, args.tokens // 25), 25, device
        ),
    }
    console = Console(record=True, width=140)
    table = Table(
        "", "ms a plain update", "recorded", "the first record", "Monitor.step between", f"cost, {args.every}"
    )
    table.title = f"the monitor; torch {torch.__version__}, {chip(device)}"
    for label, step in steps.items():
        step()
        first, plain, recorded, between = measure(step, args.rounds, label)
        costs = [((args.every - 1) * between + b - a) / (args.every * a) for a, b in zip(plain, recorded, strict=True)]
        ms = (f"{1000 * x:.0f}" for x in (statistics.median(plain), statistics.median(recorded), first))
        table.add_row(
            label,
            *ms,
            f"{1e6 * between:.1f} us",
            f"{100 * statistics.median(costs):.2f} % ({100 * min(costs):.2f} - {100 * max(costs):.2f})",
        )
    console.print(table)
    save(console, args.out)


if __name__ == "__main__":
    main()
