"""The figures of the report: a row of panels per quantity and kind of attention, a column per run, a curve per layer."""

import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter, SymmetricalLogLocator

from .curves import FIGURES, WHOLE_MODEL, Curve, Quantity, ceiling, curves, validation
from .records import Run

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.edgecolor": "0.4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # the name of a run may hold dollar signs
    "path.simplify": False,  # `curves` has thinned them
    "svg.fonttype": "none",
}
DEPTH = ListedColormap(colormaps["viridis"](np.linspace(0, 0.93, 256)))  # yellow is hard to see on white
ALARM = "#d7191c"
VALIDATION = "#2457a6"
RESCUE = "#1a9641"
GAP = 0.2  # between panels, inches
LEFT, RIGHT, TOP, BOTTOM = 0.95, 0.85, 0.7, 0.5  # margins of a figure, inches


def curve_id(run: str, panel: str, layer: str) -> str:
    """The id of a curve in the SVG: `run/panel/layer`, each percent-encoded."""
    return "/".join(quote(part, safe="") for part in (run, panel, layer))


def draw(name: str, runs: list[Run], png: Path) -> str | None:
    """Draws one of FIGURES, a column per run, into the file `png`, and returns it as an <svg> element for a page.

    Where no run recorded any of its quantities, it returns None and writes no file.
    """
    style: Any = {**STYLE, "svg.hashsalt": name}  # makes ids of clip paths unique on a page of several figures
    with rc_context(style):
        figure = draw_figure(name, runs)
        if figure is None:
            return None
        figure.savefig(png, dpi=110)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r' id="([\w.]+_\d+|image\w+)"', "", svg[svg.index("<svg") :])  # axes_1, ...: not unique, and not used
    return re.sub(r'(?<= d=")[^"]+', lambda path: short(path[0]), svg)


def short(path: str) -> str:
    """An SVG path rounded to tenths of a point, less than a pixel, without needless blanks; this halves the page's size."""
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path))


def draw_figure(name: str, runs: list[Run]) -> Figure | None:
    title, quantities = FIGURES[name]
    kinds = list(dict.fromkeys([WHOLE_MODEL, *(kind for run in runs for kind in run.layers)]))
    rows = [
        (quantity, kind, [curves(quantity, run, kind) for run in runs]) for quantity in quantities for kind in kinds
    ]
    rows = [row for row in rows if any(row[2])]
    if not rows:
        return None
    figure, axes = grid(len(rows), len(runs))
    for (quantity, kind, found), line in zip(rows, axes, strict=True):
        depth = max(len(run.layers.get(kind, [])) for run in runs)
        for panel, run, run_curves in zip(line, runs, found, strict=True):
            fill(panel, quantity, run, kind, run_curves, depth)
        scale(line[0], quantity.scale, np.concatenate([y for each in found for _, y in each.values()]))
        line[0].set_ylabel(quantity.label if name == "loss" else f"{quantity.label}\n{kind}")
        if depth > 1:
            depth_bar(figure, line[-1], depth)
    headings(figure, axes, title, [run.name for run in runs])
    return figure


def grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns). Sizes are in inches, so that the columns of all figures of a page line up."""
    panel_width = min(9, max(3.2, 12.2 / columns))
    panel_height = min(2.6, max(1.4, 7 / rows))
    width = LEFT + columns * (panel_width + GAP) - GAP + RIGHT
    height = TOP + rows * (panel_height + GAP) - GAP + BOTTOM
    figure = Figure((width, height))
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - RIGHT / width,
        top=1 - TOP / height,
        bottom=BOTTOM / height,
        wspace=GAP / panel_width,
        hspace=GAP / panel_height,
    )
    return figure, axes


def fill(panel: Axes, quantity: Quantity, run: Run, kind: str, found: dict[str, Curve], depth: int) -> None:
    """Draws the curves of one run into a panel, deeper layers in lighter colours, and marks its alarms."""
    if not found:
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", color="0.4")
    layers = run.layers.get(kind, [])
    least = min((y[y > 0].min() for _, y in found.values() if (y > 0).any()), default=1)
    for name, (x, y) in found.items():
        panel.plot(
            x,
            y.clip(least) if quantity.scale == "log" else y,  # a zero is drawn at the smallest positive value
            gid=curve_id(run.name, quantity.panel, name),
            color=DEPTH(layers.index(name) / max(depth - 1, 1)) if layers else "black",
            linewidth=1.2 if depth <= 24 else 0.7,
            marker="." if len(x) == 1 else None,
        )
    if quantity.panel == "loss" and len((seen := validation(run))[0]):
        style: dict[str, Any] = {"color": VALIDATION, "marker": "." if len(seen[0]) == 1 else None, "linewidth": 1.2}
        panel.plot(*seen, "-.", **style, gid=curve_id(run.name, "validation loss", kind), label="validation")
    if quantity.panel == "entropy":
        x, y = ceiling(run, kind)
        gid = curve_id(run.name, "ceiling", kind)
        panel.plot(x, y, "--", color="0.3", linewidth=0.9, gid=gid, label="log(keys)")
        marks = [(alarm["step"], alarm.get("entropy")) for alarm in run.alarms if alarm["layer"] in layers]
        cross: dict[str, Any] = {"marker": "x", "linestyle": "", "color": ALARM, "markersize": 5, "zorder": 3}
        if known := [mark for mark in marks if mark[1] is not None]:
            gid = curve_id(run.name, "alarms", kind)
            panel.plot(*zip(*known, strict=True), **cross, gid=gid, label="alarm")
        if lost := [step for step, entropy in marks if entropy is None]:  # on the lower edge
            gid, cross = curve_id(run.name, "not a number", kind), {**cross, "transform": panel.get_xaxis_transform()}
            panel.plot(lost, [0] * len(lost), **cross, clip_on=False, gid=gid, label="alarm: not a number")
    for step in {rescue["step"] for rescue in run.rescues}:
        panel.axvline(step, color=RESCUE, linewidth=0.9, linestyle="-.", zorder=3, label="rescue")
    if run.alarms:
        first = run.alarms[0]["step"]
        panel.axvline(first, color=ALARM, linewidth=0.9, linestyle=":", zorder=3, label="first alarm")


def scale(panel: Axes, name: str, values: np.ndarray) -> None:
    """Sets the y scale of a panel and, as they share the axis, of its row; `values` are all values in the row."""
    if name == "log":
        panel.set_yscale("log")
        values = values[values > 0]
        if len(values) and values.max() / values.min() < 100:
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    elif name == "wide" and abs(values).max() > 20:
        panel.set_yscale("symlog", linthresh=1)
        panel.autoscale(axis="y")
        subs = (1, 3) if abs(values).max() < 1000 else (1,)
        panel.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=subs))
    elif name == "zero":
        top = panel.get_ylim()[1]
        panel.set_ylim(-0.03 * top, top)  # a curve at 0 stays clear of the axis
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def depth_bar(figure: Figure, panel: Axes, depth: int) -> None:
    """Draws the colour bar beside a row: the colour of each layer, 0 for the first."""
    box = panel.get_position()
    width = figure.get_figwidth()
    bar = figure.add_axes((box.x1 + 0.15 / width, box.y0, 0.12 / width, box.height))
    bar.imshow(np.arange(depth)[:, None], cmap=DEPTH, aspect="auto", origin="lower", interpolation="nearest")
    bar.grid(False)
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.set_ylabel("layer")


def headings(figure: Figure, axes: np.ndarray, title: str, names: list[str]) -> None:
    """Writes the title, the names of the runs above their columns, the x label and the legend."""
    width, height = figure.get_size_inches()
    figure.text(LEFT / width, 1 - 0.1 / height, title, fontsize=12, weight="bold", va="top")
    room = int(11 * axes[0, 0].get_position().width * width)  # letters
    for panel, name in zip(axes[0], names, strict=True):
        panel.set_title(name if len(name) <= room else "…" + name[1 - room :], loc="left")
    for panel in axes[-1]:
        panel.set_xlabel("updates")
        panel.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    figure.align_ylabels(axes[:, 0])
    legend: dict[str, Any] = {}
    for panel in axes.flat:
        lines, labels = panel.get_legend_handles_labels()
        legend |= dict(zip(labels, lines, strict=True))
    place = (1 - RIGHT / width, 1)
    figure.legend(list(legend.values()), list(legend), loc="upper right", bbox_to_anchor=place, ncol=4, frameon=False)
