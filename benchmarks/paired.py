"""Paired measurement: one after the other in every round, so that a machine that slows down slows all of them down."""

import argparse
import json
import logging
import math
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table


def arguments(module: str, doc: str, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark takes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    parser.add_argument("--device", type=device_named, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--out", type=Path, help="writes OUT.txt (tables), OUT.json (every number) and OUT.png (plot)")
    return parser


def device_named(name: str) -> torch.device:
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        allowed = "cpu or cuda" if torch.cuda.is_available() else "cpu; torch sees no GPU here"
        raise argparse.ArgumentTypeError(f"{name!r}: allowed are {allowed}")
    return torch.device(name)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """On a GPU between two of its events, the first of which it meets idle."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleave(
    work: dict[str, Callable[[], object]], rounds: int, device: torch.device, label: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of everything in `work`, in every round, after `warm_up` rounds that do not count."""
    times = {name: [] for name in work}
    for i in track(range(warm_up + rounds), label, console=Console(stderr=True)):
        for name, one in work.items():
            taken = seconds(one, device)
            if i >= warm_up:
                times[name].append(taken)
    return times


def interleave_within(
    work: dict[str, Callable[[], object]], budget: float, device: torch.device, least: float = 0.15
) -> dict[str, list[float]]:
    """Seconds a call, in as many rounds as `budget` seconds hold, from 5 to 30.

    In a round each is called as often as takes `least` seconds: a GPU works off a queue, which one call would find empty.
    """
    once = {name: [seconds(one, device) for _ in range(2)][1] for name, one in work.items()}  # the first warms up
    calls = {name: max(1, min(50, math.ceil(least / taken))) for name, taken in once.items()}
    rounds = max(5, min(30, int(budget / sum(calls[name] * taken for name, taken in once.items()))))

    def repeated(name: str) -> None:
        for _ in range(calls[name]):
            work[name]()

    times = {name: [] for name in work}
    for _ in range(rounds):
        for name, own in times.items():
            own.append(seconds(partial(repeated, name), device) / calls[name])
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, list[float]]:
    """Each to `base` of the same round."""
    return {name: [a / b for a, b in zip(own, times[base], strict=True)] for name, own in times.items()}


def quartiles(values: list[float]) -> tuple[float, float]:
    return tuple(statistics.quantiles(values, n=4, method="inclusive")[::2]) if len(values) > 1 else (values[0],) * 2


class Report:
    """Tables on the screen, and on disk with every number behind them and a plot of the ratios."""

    def __init__(self, what: str, device: torch.device) -> None:
        logging.getLogger().setLevel(logging.WARNING)  # fairseq asks every package for its debugging output
        self.what, self.machine = what, f"torch {torch.__version__}, {chip(device)}"
        self.console = Console(record=True, width=140)
        self.console.print(f"{what}; {self.machine}")
        self.rows: list[dict] = []

    def add(
        self,
        title: str,
        values: dict[str, list[float]],
        bases: list[str],
        unit: str,
        scale: float,
        more: dict[str, dict[str, float | str]] | None = None,
    ) -> None:
        """A table: the medians of `values` * `scale` in `unit`, and of their ratios to each of the bases, with quartiles.

        more: further columns, from the same names to what stands there.
        """
        more = more or {}
        table = Table("", unit, *(f"/ {base} (quartiles)" for base in bases), *more, title=title, title_justify="left")
        to = {base: ratios(values, base) for base in bases}
        for name, own in values.items():
            low_high = {base: quartiles(to[base][name]) for base in bases}
            cells = (
                f"{statistics.median(to[b][name]):.3f} ({low_high[b][0]:.3f} - {low_high[b][1]:.3f})" for b in bases
            )
            also = {column: given[name] for column, given in more.items() if name in given}
            table.add_row(name, f"{scale * statistics.median(own):.4g}", *cells, *(_cell(also.get(c)) for c in more))
            self.rows.append({"title": title, "name": name, "unit": unit, "values": [scale * x for x in own], **also})
            self.rows[-1] |= {f"/ {base}": to[base][name] for base in bases}
        self.console.print(table)

    def save(self, out: Path | None) -> None:
        if out is None:
            return
        out.with_suffix(".json").write_text(
            json.dumps(
                {"what": self.what, "machine": self.machine, "rows": [_rounded(row) for row in self.rows]}, indent=1
            )
        )
        self.plot().savefig(out.with_suffix(".png"), dpi=120)
        out.with_suffix(".txt").write_text(self.console.export_text(clear=False), encoding="utf-8")

    def plot(self) -> Figure:
        """Median and quartiles of every ratio to the first base."""
        rows = [(row, next((key for key in row if key.startswith("/ ")), None)) for row in self.rows]
        rows = [(row, key) for row, key in rows if key and key != f"/ {row['name']}"][::-1]
        figure = Figure(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, (row, key) in enumerate(rows):
            middle, (low, high) = statistics.median(row[key]), quartiles(row[key])
            colour = "C0" if re.search("σ|Stable", row["name"]) else "0.5"
            axes.plot([low, high], [y, y], color=colour, lw=2)
            axes.plot(middle, y, "o", color=colour)
        axes.set_yticks(range(len(rows)), [f"{row['title']}: {row['name']} {key}" for row, key in rows], fontsize=7)
        axes.axvline(1, color="0.7", lw=1, zorder=0)
        axes.set_xlabel("median and quartiles of the ratio of the same round; ours in blue")
        axes.set_title(f"{self.what}\n{self.machine}", fontsize=9)
        return figure


def _cell(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.5g}"


def _rounded(row: dict) -> dict:
    return {key: [float(f"{x:.5g}") for x in value] if isinstance(value, list) else value for key, value in row.items()}


def chip(device: torch.device) -> str:
    """What it ran on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, driver {_driver()}"
    return f"{_processor()}, {torch.get_num_threads()} thread(s)"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return f"{names[0].strip() if names else platform.processor()} ({platform.machine()} CPU)"
