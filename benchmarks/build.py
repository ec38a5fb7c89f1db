"""Build time of σReparam ViT-H against timm's ViT-H: `python -m benchmarks.build`.

One process; in every round timm's model and then ours is built anew and deleted. Prints the median over rounds, and the
median of the ratios of the same round.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import timm_stable  # noqa: F401  registers the models
from benchmarks.step_time import chip, save


def seconds(model: str) -> float:
    start = time.perf_counter()
    built = timm.create_model(model)
    taken = time.perf_counter() - start
    del built
    gc.collect()  # parametrised modules are in reference cycles, and models of 2.5 GB would pile up
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.build", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="huge_patch14", help="of the ViT, as timm names it (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the table to this file too")
    args = parser.parse_args()
    models = [f"{family}_{args.size}_224" for family in ("vit", "sigma_vit")]
    times = {model: [] for model in models}
    for _ in track(range(args.rounds), "building", console=Console(stderr=True)):
        for model, own in times.items():
            own.append(seconds(model))
    console = Console(record=True, width=120)
    table = Table("", "seconds", "min and max", f"/ {models[0]}", "min and max")
    table.title = f"build; torch {torch.__version__}, {chip(torch.device('cpu'))}"
    for model, own in times.items():
        ratios = [a / b for a, b in zip(own, times[models[0]], strict=True)]
        row = (f"{statistics.median(x):.2f}; {min(x):.2f} - {max(x):.2f}".split("; ") for x in (own, ratios))
        table.add_row(model, *(cell for pair in row for cell in pair))
    console.print(table)
    save(console, args.out)


if __name__ == "__main__":
    main()
