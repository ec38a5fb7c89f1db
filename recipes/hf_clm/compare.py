"""Lays finished runs side by side: a line of JSON for each, a plot, and a table.

Runs whose names differ in the last part alone, as those of stablegpt.sh do by their seeds, are one group.
"""

import json
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib
import tyro
from rich.console import Console
from rich.table import Column, Table

from stable_monitor.records import read

from .curves import series

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Settings:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """directories of recipes.hf_clm.train"""
    output: Path
    """NAME.jsonl and NAME.png are written"""

    def __post_init__(self) -> None:
        for run in self.runs:
            if not (run / "model").is_dir():
                raise ValueError(f"runs = {run}: allowed are directories of finished runs of recipes.hf_clm.train")


def summary(run: Path) -> dict:
    """Settings and losses, and what the monitor saw."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    settings = json.loads((run / "settings.json").read_text())
    return {
        "run": run.name,
        "settings": {name: value for name, value in settings.items() if name not in ("output", "data")},
        "loss": series(log, "loss"),
        "eval_loss": series(log, "eval_loss"),
        **worst(run),
    }


def worst(run: Path) -> dict:
    """Of the layer where it is worst, the mean attention entropy (nats) and the largest logit, by update; and the alarms."""
    records = read(run)
    seen = {
        "entropy": [min(sum(x["entropy"]) / len(x["entropy"]) for x in r["layers"].values()) for r in records],
        "max_logit": [max(max(x["max_logit"]) for x in r["layers"].values()) for r in records],
    }
    return {
        "monitored": [r["step"] for r in records],
        **{name: [round(value, 4) for value in values] for name, values in seen.items()},
        "alarms": [{"step": r["step"], "layer": alarm["layer"]} for r in records for alarm in r["alarms"]],
    }


def write(rows: list[dict], output: Path) -> None:
    """NAME.jsonl, NAME.png and the table on the screen."""
    rows = sorted(rows, key=lambda row: (group_of(row), row["run"]))
    output.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, output.with_suffix(".png"))
    Console().print(table(rows))
    print(f"log and plot: {output}.jsonl, {output}.png")


def group_of(row: dict) -> str:
    return row["run"].rpartition("-")[0]


def table(rows: list[dict]) -> Table:
    result = Table(Column("runs", no_wrap=True), "validation loss", "entropy at the end", "largest logit", "alarms")
    for name, group in groupby(rows, group_of):
        each = list(group)
        result.add_row(
            name,
            " / ".join(f"{row['eval_loss'][1][-1]:.3f}" for row in each),
            " / ".join(f"{row['entropy'][-1]:.2f}" for row in each),
            " / ".join(f"{max(row['max_logit']):.0f}" for row in each),
            " / ".join(str(len(row["alarms"])) for row in each),
        )
    return result


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    names = list(dict.fromkeys(map(group_of, rows)))
    for row in rows:
        style = {"color": f"C{names.index(group_of(row))}", "linewidth": 1}
        axes[0].plot(*row["loss"], label=group_of(row), **style)
        axes[1].plot(row["monitored"], row["entropy"], **style)
        axes[2].semilogy(row["monitored"], row["max_logit"], **style)
    titles = ("training loss, nats a token", "least entropy of a layer, nats", "largest attention logit")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="update", title=title)
        axis.grid(alpha=0.3)
    legend = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))  # one line of each group
    figure.legend(legend.values(), legend.keys(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.hf_clm.compare", description=__doc__)
    write(list(map(summary, settings.runs)), settings.output)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"compare: {error}")
