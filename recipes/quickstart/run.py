"""A GPT whose attention collapses: left alone, rescued by one switch, and with σReparam from the start: `make quickstart`.

A run that is whole is left alone, so that the same command goes on where it was stopped.
"""

import argparse
import math
import os
import shutil
import sys
import time
import webbrowser
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from recipes.command import command
from recipes.gpt.prepare import shakespeare, write
from recipes.quickstart.train import EVERY, LR, RUNS
from recipes.side_by_side import Job, Progressed, side_by_side, start
from stable_monitor.diagnose import diagnose
from stable_monitor.records import load
from stable_monitor.report import report
from stable_monitor.verdicts import median_head

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
LABELS = {
    "alone": ("left alone", "tab:red"),
    "rescued": ("rescued at the alarm", "tab:blue"),
    "sigma": ("σReparam from the start", "tab:green"),
}
Records = list[dict[str, Any]]
Result = tuple[Records, float | None]  # and the validation loss, of a run that is whole


def records_of(folder: Path) -> Result:
    """Of a run so far."""
    try:
        records, validations = load(folder)
    except (FileNotFoundError, ValueError):  # not begun
        return [], None
    return records, validations[-1]["validation"]["loss"] if validations else None


def train(name: str, data: Path, out: Path, updates: int, seed: int, progressed: Progressed) -> Result:
    """Trains what is not whole yet, from the start."""
    folder = out / f"{name}-{seed}"
    records, loss = records_of(folder)
    if loss is None or records[-1]["step"] != updates - EVERY:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        words = ["-m", "recipes.quickstart.train", name, "--data", data, "--out", folder]
        with (folder / "output.txt").open("w") as output:
            process = start(*words, "--updates", updates, "--seed", seed, cwd=ROOT, stdout=output, stderr=output)
            while process.poll() is None:
                time.sleep(0.5)
                show(records_of(folder)[0], progressed)
        if process.returncode:
            raise RuntimeError(f"{name}: {(folder / 'output.txt').read_text().strip().splitlines()[-1]}")
        records, loss = records_of(folder)
    show(records, progressed)
    return records, loss


def show(records: Records, progressed: Progressed) -> None:
    if records:
        last = records[-1]
        progressed(last["step"] + EVERY, f"loss {last['loss']:.2f}, entropy {least_entropy(last):.2f}")


def least_entropy(record: dict[str, Any]) -> float:
    """Of the median head of each layer, as a part of log(keys)."""
    return min(median_head(layer["entropy"]) / math.log(layer["keys"]) for layer in record["layers"].values())


def table(runs: dict[tuple[str, int], Path]) -> Table:
    """Of whole runs, by name and seed."""
    table = Table("", "validation loss", "least entropy", "alarms", "diagnosis")
    table.title = f"learning rate {LR:g}, loss in nats, entropy / log(keys)"
    seeds = list(dict.fromkeys(seed for _, seed in runs))
    if len(seeds) > 1:
        table.title += f", seeds {', '.join(map(str, seeds))}"
    for name in RUNS:
        own = [records_of(runs[name, seed]) for seed in seeds]
        alarms = [sum(len(record["alarms"]) for record in records) for records, _ in own]
        table.add_row(
            LABELS[name][0],
            " / ".join(f"{loss:.3f}" for _, loss in own),
            " / ".join(f"{least_entropy(records[-1]):.2f}" for records, _ in own),
            " / ".join(map(str, alarms)),
            " / ".join(diagnose(runs[name, seed])[0].verdict for seed in seeds),
        )
    return table


def plot(found: dict[tuple[str, int], Result], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    first = min(seed for _, seed in found)
    for (name, seed), (records, _) in found.items():
        label, color = LABELS[name]
        steps = [record["step"] for record in records]
        for panel, values in zip(
            axes, ([record["loss"] for record in records], [*map(least_entropy, records)]), strict=True
        ):
            panel.plot(steps, values, color=color, linewidth=1.2, label=label if seed == first else None)
    axes[0].set(xlabel="update", title="training loss, nats per character", ylim=(2.3, 3.6))
    axes[1].set(xlabel="update", title="least attention entropy / log(keys)", ylim=(0, 1))
    axes[0].legend(fontsize=8)
    for panel in axes:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m recipes.quickstart.run")
    parser.add_argument("--updates", type=int, default=280, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="(default: 1; README.md's figure: 1 2 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart", help="(default: runs/quickstart)")
    args = parser.parse_args()
    if args.updates < EVERY or args.updates % EVERY:
        parser.error(f"--updates {args.updates}: allowed are multiples of {EVERY}")
    console = Console()
    console.print(f"[bold]A GPT of 0.8M parameters on Shakespeare's characters[/]; everything goes to {args.out}")
    data = args.out / "text"
    if not (data / "meta.pkl").exists():
        write(shakespeare(), data)
    jobs = {
        (name, seed): Job(
            f"{LABELS[name][0]}, seed {seed}", args.updates, partial(train, name, data, args.out, args.updates, seed)
        )
        for seed in args.seeds
        for name in RUNS
    }
    found = side_by_side(jobs, console)
    console.print(table({(name, seed): args.out / f"{name}-{seed}" for name, seed in found}))
    picture, page = args.out / "quickstart.png", args.out / "report.html"
    plot(found, picture)
    report([args.out / f"{name}-{args.seeds[0]}" for name in RUNS], page)
    console.print(
        f"\nThe picture: {picture}\nEntropy, logits, spectral norms and gradients of every layer, and what was done: {page}"
        "\nNext: README.md puts the same lines into your own training; docs/README.md has the papers' settings."
    )
    if sys.stdout.isatty() and (os.environ.get("DISPLAY") or sys.platform == "darwin"):
        webbrowser.open(page.resolve().as_uri())
    return 0


if __name__ == "__main__":
    command(main, errors=(OSError, ValueError, RuntimeError))
