"""What came of the runs of a sweep: by variant and learning rate, as a table and as the paper's figure."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from .plots import STYLE
from .sensitivity import bounded, learning_rate_sensitivity


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        initial, final: losses; `final` is NaN where the run diverged.
        died: why the run ended early, or "".
    """

    variant: str
    lr: float
    seed: int
    initial: float
    final: float
    died: str = ""


@dataclass(frozen=True)
class Row:
    """A variant: its losses by rate, its best loss and sensitivity by seed, and the rates at which a seed diverged."""

    variant: str
    losses: dict[float, dict[int, float]]
    best: dict[int, float]
    sensitivity: dict[int, float]
    diverged: set[float]


def summarise(outcomes: list[Outcome]) -> list[Row]:
    """A row a variant, in the order in which they come. A seed without all of the rates has no sensitivity."""
    rows = []
    rates = sorted({outcome.lr for outcome in outcomes})
    for variant in dict.fromkeys(outcome.variant for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.variant == variant]
        losses: dict[float, dict[int, float]] = {lr: {} for lr in rates}
        best, sensitivity = {}, {}
        for outcome in own:
            losses[outcome.lr][outcome.seed] = bounded(outcome.final, outcome.initial)
        for seed in sorted({outcome.seed for outcome in own}):
            final = {outcome.lr: outcome.final for outcome in own if outcome.seed == seed}
            initial = fmean(outcome.initial for outcome in own if outcome.seed == seed)
            best[seed] = min(bounded(loss, initial) for loss in final.values())
            if len(final) == len(rates) > 1:
                sensitivity[seed] = learning_rate_sensitivity(final, initial)
        diverged = {outcome.lr for outcome in own if not math.isfinite(outcome.final)}
        rows.append(Row(variant, losses, best, sensitivity, diverged))
    return rows


def table(rows: list[Row]) -> str:
    """In Markdown: mean losses by rate, the best in bold, a star where a seed diverged; best and sensitivity by seed."""
    rates = list(rows[0].losses)
    lines = [["", *(f"{lr:g}" for lr in rates), "best", "sensitivity"], ["---"] * (len(rates) + 3)]
    for row in rows:
        means = {lr: fmean(losses.values()) if losses else math.nan for lr, losses in row.losses.items()}
        least = min((mean for mean in means.values() if not math.isnan(mean)), default=math.nan)
        cells = (
            "-"
            if math.isnan(mean)
            else (f"**{mean:.3f}**" if mean == least else f"{mean:.3f}") + "*" * (lr in row.diverged)
            for lr, mean in means.items()
        )
        seeds = (" / ".join(f"{x:.3f}" for x in by_seed.values()) or "-" for by_seed in (row.best, row.sensitivity))
        lines.append([row.variant, *cells, *seeds])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: list[Row], path: Path) -> None:
    """The paper's figure: loss over log(rate), a line a variant, between the least and the largest of its seeds."""
    style: Any = STYLE
    with rc_context(style):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes: Any = figure.subplots()
        for index, row in enumerate(rows):
            points = {lr: list(losses.values()) for lr, losses in row.losses.items() if losses}
            color = colormaps["tab10"](index % 10)
            number = f", {fmean(row.sensitivity.values()):.3f}" if row.sensitivity else ""
            axes.plot(
                list(points), list(map(fmean, points.values())), "o-", color=color, ms=3, label=f"{row.variant}{number}"
            )
            axes.fill_between(
                list(points),
                [min(x) for x in points.values()],
                [max(x) for x in points.values()],
                color=color,
                alpha=0.15,
            )
            axes.plot(gone := sorted(row.diverged), [fmean(points[lr]) for lr in gone], "x", color=color, ms=9, mew=2)
        axes.set_xscale("log")
        rates = list(rows[0].losses)
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axes.minorticks_off()
        axes.set(xlabel="learning rate", ylabel="final loss")
        axes.legend(title="sensitivity", fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(path, dpi=120)
