"""The figures of the report as PNG: a row of panels per quantity and kind of attention, a column per run, a curve per layer."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import layout
from .axis import evenly
from .svg import MANY, run_color

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
}
DEPTH = ListedColormap(colormaps["viridis"](np.linspace(0, 0.93, 256)))  # yellow is hard to see on white
ALARM = "#d7191c"
CROSS = {"marker": "x", "linestyle": "", "color": ALARM, "markersize": 5, "zorder": 3}
LINES: dict[str, dict[str, Any]] = {
    "layer": {},
    "model": {"color": "black"},
    "run": {},
    "run validation": {"linestyle": "-."},
    "validation": {"color": "#2457a6", "linestyle": "-.", "label": "validation"},
    "ceiling": {"color": "0.3", "linestyle": "--", "linewidth": 0.9, "label": "log(keys)"},
    "alarm": {**CROSS, "label": "alarm"},
    "lost": {**CROSS, "label": "alarm: not a number"},
}
MARKS: dict[str, dict[str, Any]] = {
    "rescue": {"color": "#1a9641", "linestyle": "-."},
    "first alarm": {"color": ALARM, "linestyle": ":"},
}
GAP = 0.2  # between panels, inches
LEFT, RIGHT, TOP, BOTTOM = 0.95, 0.85, 0.7, 0.5  # margins of a figure, inches


def draw(figure: layout.Figure, png: Path) -> None:
    """Draws a figure of the report, a column per run, into the file `png`."""
    style: Any = STYLE
    with rc_context(style):
        drawn = draw_figure(figure)
        drawn.savefig(png, dpi=100)


def draw_figure(figure: layout.Figure) -> Figure:
    columns = max(len(row.panels) for row in figure.rows)
    drawn, axes = grid(len(figure.rows), columns)
    for row, line in zip(figure.rows, axes, strict=True):
        for panel, axis in zip(row.panels, line, strict=False):
            fill(axis, row, panel, figure.span)
        for axis in line[len(row.panels) :]:
            axis.set_axis_off()
        line[0].set_ylabel(row.label if figure.name == "loss" else f"{row.label}\n{row.kind}")
        depth = max(panel.depth for panel in row.panels)
        if row.panels[0].heat is not None or any(panel.heat is not None for panel in row.panels):
            heat_bar(drawn, line[-1], row)
        elif depth > 1:
            depth_bar(drawn, line[-1], depth)
    names = [panel.run for panel in max((row.panels for row in figure.rows), key=len)]
    headings(drawn, axes, figure.title, names, figure.rows[0].across)
    return drawn


def grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns). Sizes are in inches, so that the columns of all figures line up."""
    panel_width = min(9, max(3.2, 12.2 / columns))
    panel_height = min(2.6, max(1.4, 7 / rows))
    width = LEFT + columns * (panel_width + GAP) - GAP + RIGHT
    height = TOP + rows * (panel_height + GAP) - GAP + BOTTOM
    figure = Figure((width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - RIGHT / width,
        top=1 - TOP / height,
        bottom=BOTTOM / height,
        wspace=GAP / panel_width,
        hspace=GAP / panel_height,
    )
    for panel in axes[:, 1:].flat:
        panel.tick_params(labelleft=False)
    for panel in axes[:-1].flat:
        panel.tick_params(labelbottom=False)
    return figure, axes


def fill(axes: Axes, row: layout.Row, panel: layout.Panel, span: tuple[int, int]) -> None:
    """Draws a panel: the curves of one run, deeper layers in lighter colours, and its alarms; or a heat map."""
    margin = 0.02 * (span[1] - span[0]) or 0.5
    axes.set_xlim(span[0] - margin, span[1] + margin)
    ticks = evenly(*span, 6, whole=True) if span[0] < span[1] else [span[0]]
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    if panel.heat is not None:
        colors: Any = row.axis.place(panel.heat)
        extent = (span[0], span[1] if span[1] > span[0] else span[0] + 1, -0.5, panel.depth - 0.5)
        options: Any = {"cmap": "magma", "vmin": 0, "vmax": 1, "interpolation": "nearest", "origin": "lower"}
        axes.imshow(colors, aspect="auto", extent=extent, **options)
        axes.set_yticks(evenly(0, panel.depth - 1, 4, whole=True))
        axes.grid(False)
        return
    if not panel.lines:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="0.4")
    axes.set_yscale(row.axis.kind, **({"linthresh": 1} if row.axis.kind == "symlog" else {}))
    axes.set_ylim(row.axis.low, row.axis.high)
    axes.set_yticks(row.axis.ticks, [f"{x:g}" for x in row.axis.ticks])
    axes.set_yticks([], minor=True)
    for line in panel.lines:
        positive = line.y[line.y > 0]
        y = line.y.clip(positive.min() if len(positive) else 1) if row.axis.kind == "log" else line.y
        style: dict[str, Any] = {"linewidth": 1.2 if panel.depth <= MANY else 0.7, **LINES[line.style]}
        if line.style == "layer":
            style["color"] = DEPTH(line.place)
        elif line.style.startswith("run"):
            style |= {"color": run_color(line)}
            # matplotlib leaves names that begin with an underscore out of its legends.
            style |= {"label": line.name.replace("_", "\u200b_", 1)} if line.style == "run" else {}
        elif line.style == "lost":  # on the lower edge
            style |= {"transform": axes.get_xaxis_transform(), "clip_on": False}
        if len(line.x) == 1 and "marker" not in style:
            style["marker"] = "."
        axes.plot(line.x, y, **style)
    for step, what in panel.marked:
        axes.axvline(step, **MARKS[what], linewidth=0.9, zorder=3, label=what)


def depth_bar(figure: Figure, panel: Axes, depth: int) -> None:
    """Draws the colour bar beside a row: the colour of each layer, 0 for the first."""
    bar = side_bar(figure, panel, DEPTH, min(depth, 256), depth)
    bar.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.set_ylabel("layer")


def heat_bar(figure: Figure, panel: Axes, row: layout.Row) -> None:
    """Draws the colour bar beside a row of heat maps: the value of each colour."""
    bar = side_bar(figure, panel, colormaps["magma"], 256, 1)
    places = row.axis.place(np.array(row.axis.ticks)) - 0.5
    bar.set_yticks(places.tolist(), [f"{x:g}" for x in row.axis.ticks])


def side_bar(figure: Figure, panel: Axes, colors: Any, count: int, top: float) -> Axes:
    box = panel.get_position()
    width = figure.get_figwidth()
    bar = figure.add_axes((box.x1 + 0.15 / width, box.y0, 0.12 / width, box.height))
    extent = (0, 1, -0.5, top - 0.5)
    bar.imshow(
        np.arange(count)[:, None], cmap=colors, aspect="auto", origin="lower", interpolation="nearest", extent=extent
    )
    bar.grid(False)
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    return bar


def headings(figure: Figure, axes: np.ndarray, title: str, names: list[str], across: bool) -> None:
    """Writes the title, below it the legend, the names of the runs above their columns, and the x label."""
    width, height = figure.get_size_inches()
    figure.text(LEFT / width, 1 - 0.1 / height, title, fontsize=12, weight="bold", va="top")
    room = int(11 * axes[0, 0].get_position().width * width)  # letters
    for panel, name in zip(axes[1 if across else 0], names, strict=True):
        panel.set_title(name if len(name) <= room else "…" + name[1 - room :], loc="left", pad=2 if across else None)
    for panel in axes[-1]:
        panel.set_xlabel("updates")
    figure.align_ylabels(axes[:, 0])
    if across:  # the names of the runs, in the place beside their panel
        lines, labels = axes[0, 0].get_legend_handles_labels()
        labels = [label if len(label) <= room else "…" + label[1 - room :] for label in labels]
        axes[0, 1].legend(lines, labels, loc="upper left", frameon=False, fontsize=min(9, 150 / max(len(labels), 1)))
    legend: dict[str, Any] = {}
    for panel in axes[1 if across else 0 :].flat:
        lines, labels = panel.get_legend_handles_labels()
        legend |= dict(zip(labels, lines, strict=True))
    place = (1 - RIGHT / width, 1)
    figure.legend(list(legend.values()), list(legend), loc="upper right", bbox_to_anchor=place, ncol=4, frameon=False)
