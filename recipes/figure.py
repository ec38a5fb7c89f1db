"""Draws monitored runs over each other, of any stack: the papers' figures that `stable_monitor.report` does not lay out.

Runs whose names differ in the last part alone, as the recipes' do by their seeds, are one group and one colour. What is drawn
is written beside the picture, a line of JSON for each curve. A quantity is of the model: "loss", "lr", "grad_l2", "grad_linf";
of its validations: "validation.loss", "validation.top1", or what else the stack found; or of one attention layer: "entropy",
"entropy_min", "max_logit", "sigma", "grad_l2" or "grad_linf" with ":KIND.INDEX", as "sigma:encoder.0" (INDEX counts from the
first layer; -1 is the last).

The papers' figures, by what is to be shown:

    σ 3                  validation.top1 entropy:encoder.0 sigma:encoder.0 --trials extremes --by validation.top1
    σ 4, 10 (a)          validation.probe_top1 entropy:encoder.0 sigma:encoder.0 grad_linf:encoder.0 --trials extremes
                         --by validation.probe_top1
    σ 5, 10 (b)          validation.probe_top1
    σ 6, 11              validation.top1 --trials ranked, of RUN/probe
    σ 7                  loss entropy:encoder.94 entropy:cross.94
    ST 1 left, 6, 7, 11, 14        validation.loss; of nanoGPT with --monitor_every=1000
    ST 1 right, 8                  validation.top1
    ST 2, 3, 4, 9, 10, 13          loss validation.loss

`stable report` draws σ 1, 12, 14, 15 and 16 to 20, the temperature recipe σ 2, 8 and 9, recipes.librispeech.wer σ 13.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stable_monitor.curves import number, over_heads
from stable_monitor.records import Run, load
from stable_monitor.report import unique_names

OF_MODEL = ("loss", "lr", "grad_l2", "grad_linf")
OF_LAYER = {  # of the record of a layer
    "entropy": over_heads(fmean, "entropy"),
    "entropy_min": over_heads(min, "entropy_min"),
    "max_logit": over_heads(max, "max_logit"),
    # the largest of the query, key and value weights
    "sigma": lambda layer: max(
        (x for role, x in layer["sigma"].items() if role != "out" and x is not None), default=None
    ),
    "grad_l2": number("grad_l2"),
    "grad_linf": number("grad_linf"),
}
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Settings:
    """Which runs, and what of them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """directories with monitor.jsonl, or such files"""
    output: Path
    """NAME.png and NAME.jsonl are written"""
    show: tuple[str, ...] = ("loss",)
    """quantities, a panel each"""
    trials: Literal["all", "extremes", "ranked"] = "all"
    """of each group: all runs; the best, solid, and the worst, dashed; or all by their last numbers, ordered"""
    by: str = "validation.loss"
    """the quantity whose last number says which run is best: least is, where its name holds "loss"; else largest"""

    def __post_init__(self) -> None:
        for name in self.show if self.trials != "extremes" else (*self.show, self.by):
            check(name)


def check(name: str) -> None:
    """Raises ValueError for what is no quantity."""
    quantity, colon, place = name.partition(":")
    kind, _, index = place.partition(".")
    right = kind and index.removeprefix("-").isdecimal() and quantity in OF_LAYER if colon else quantity in OF_MODEL
    if not right and not (name.startswith("validation.") and not colon):
        layers = ", ".join(f"{quantity}:KIND.INDEX" for quantity in OF_LAYER)
        raise ValueError(f"show = {name!r}: allowed are {', '.join(OF_MODEL)}, validation.NAME, {layers}")


def points(name: str, run: Run) -> Points:
    """Updates and values, without those that were not measured.

    Raises:
        ValueError: the run holds none; says what it does hold.
    """
    quantity, _, place = name.partition(":")
    if quantity.startswith("validation."):
        found = [
            (line["step"], line["validation"].get(quantity.removeprefix("validation."))) for line in run.validations
        ]
        held = {f"validation.{key}" for line in run.validations for key in line["validation"]}
    elif place:
        kind, _, index = place.partition(".")
        layers = dict(enumerate(run.layers.get(kind, [])))
        layer = layers.get(int(index) % max(len(layers), 1)) if -len(layers) <= int(index) < len(layers) else None
        found = [(r["step"], OF_LAYER[quantity](r["layers"][layer])) for r in run.records if layer in r["layers"]]
        held = {f"{kind}.0 to {len(names) - 1}" for kind, names in run.layers.items()}
    else:
        found, held = [(r["step"], r[quantity]) for r in run.records], set()
    known = [(step, value) for step, value in found if value is not None]
    if not known:
        there = f"; it has {', '.join(sorted(held))}" if held else ""
        raise ValueError(
            f"{run.name}: nothing of {name} is in its {'validations' if 'valid' in name else 'records'}{there}"
        )
    return known


def group_of(name: str) -> str:
    """Of a run's name, or of that of a folder in it."""
    head, _, tail = name.rpartition("-")
    seed, slash, folder = tail.partition("/")
    return head + slash + folder if head and seed.isdecimal() else name


def groups(runs: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(group_of(run.name), []).append(run)
    return found


def ordered(runs: list[Run], by: str) -> list[Run]:
    """The best first."""
    return sorted(runs, key=lambda run: points(by, run)[-1][1], reverse="loss" not in by)


def curves(runs: list[Run], settings: Settings) -> list[dict]:
    """What is drawn: quantity, group, run, style, x and y of each curve."""
    drawn = []
    for group, members in groups(runs).items():
        for name in settings.show:
            if settings.trials == "ranked":
                best_first = [(rank, points(name, run)[-1][1]) for rank, run in enumerate(ordered(members, name), 1)]
                drawn.append(curve(name, group, group, "o-", best_first))
                continue
            chosen = [(run, "-") for run in members]
            if settings.trials == "extremes":
                best_first = ordered(members, settings.by)
                chosen = [(best_first[0], "-"), *((run, "--") for run in best_first[1:][-1:])]
            drawn += [curve(name, group, run.name, style, points(name, run)) for run, style in chosen]
    return drawn


def curve(quantity: str, group: str, run: str, style: str, known: Points) -> dict:
    x, y = zip(*known, strict=True)
    return {"quantity": quantity, "group": group, "run": run, "style": style, "x": x, "y": y}


def write(drawn: list[dict], output: Path, xlabel: str) -> None:
    """NAME.jsonl, and NAME.png: a panel each quantity, a colour each group."""
    output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in drawn))
    names, colours = (list(dict.fromkeys(line[key] for line in drawn)) for key in ("quantity", "group"))
    figure = Figure(figsize=(1 + 4 * len(names), 3.4), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
    for line in drawn:
        style = {"color": f"C{colours.index(line['group'])}", "linewidth": 1.1, "markersize": 4}
        panels[line["quantity"]].plot(line["x"], line["y"], line["style"], label=line["group"], **style)
    for name, panel in panels.items():
        panel.set(xlabel=xlabel, title=name)
        panel.grid(alpha=0.3)
        if xlabel == "rank":
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name.startswith("grad"):
            panel.set_yscale("log")
        if xlabel == "lr":
            panel.set_xscale("log")
    lines, labels = next(iter(panels.values())).get_legend_handles_labels()
    legend = dict(zip(reversed(labels), reversed(lines), strict=True))  # the first, solid line of each group
    figure.legend([legend[group] for group in colours], colours, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(f"{output}.png", dpi=80)
    print(f"{output}.png and what it shows, {output}.jsonl")


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.figure", description=__doc__)
    runs = [Run(name, *load(path)) for name, path in zip(unique_names(list(settings.runs)), settings.runs, strict=True)]
    write(curves(runs, settings), settings.output, "rank" if settings.trials == "ranked" else "update")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"figure: {error}")
