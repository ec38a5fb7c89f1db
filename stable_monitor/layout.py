"""How the report lays out its figures: rows of panels, a row for each quantity and kind of attention, a panel for each run.

`svg` draws them for the page, `plots` as PNG.
"""

from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from .axis import Axis, axis_of
from .curves import FIGURES, HEATS, WHOLE_MODEL, Curve, Quantity, ceiling, curves, heat, thin, validation
from .records import Run

EMPTY = np.empty(0)


class Line(NamedTuple):
    """A curve, or marks.

    Attributes:
        id: `run/panel/layer`, each percent-encoded.
        style: "layer", "model", "run", "validation", "ceiling", "alarm" or "lost".
        place: of a layer, its depth from 0 to 1; of a run, its number.
    """

    id: str
    style: str
    x: np.ndarray
    y: np.ndarray
    place: float = 0
    name: str = ""


class Panel(NamedTuple):
    """A panel: its run, lines, and updates that are marked by vertical lines, ("rescue" or "first alarm"); or a heat map."""

    run: str
    lines: list[Line]
    marked: list[tuple[int, str]]
    heat: np.ndarray | None = None
    depth: int = 0
    left_out: int = 0  # layers


class Row(NamedTuple):
    """Panels that share a vertical axis; the axis of a heat map is that of its colours."""

    label: str
    kind: str
    quantity: str
    axis: Axis
    panels: list[Panel]
    across: bool = False  # whether all runs are in one panel


class Figure(NamedTuple):
    name: str
    title: str
    rows: list[Row]
    span: tuple[int, int]  # updates


def figures(runs: list[Run]) -> list[Figure]:
    """All figures of a report; those without rows were not recorded."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.layers))
    steps = [step for run in runs for step in (*run.columns.span, *(line["step"] for line in run.validations))]
    span = min(steps), max(steps)
    found = []
    for name, (title, quantities) in FIGURES.items():
        rows = [
            row for quantity in quantities for kind in [WHOLE_MODEL, *kinds] if (row := row_of(quantity, kind, runs))
        ]
        if name == "loss" and len(runs) > 1 and rows and rows[0].quantity == "loss":
            rows.insert(0, together(rows[0]))
        found.append(Figure(name, title, rows, span))
    rows = [row for panel in HEATS for kind in kinds if (row := heat_row(panel, kind, runs))]
    return [*found, Figure("heat", "Layer by update", rows, span)] if rows else found


def row_of(quantity: Quantity, kind: str, runs: list[Run]) -> Row | None:
    found = [curves(quantity, run, kind) for run in runs]
    if not any(found):
        return None
    depth = max(len(run.layers.get(kind, [])) for run in runs)
    panels = [panel_of(quantity, kind, run, own, depth) for run, own in zip(runs, found, strict=True)]
    values = np.concatenate([line.y for panel in panels for line in panel.lines if line.style != "lost"])
    return Row(quantity.label, kind, quantity.panel, axis_of(quantity.scale, values), panels)


def panel_of(quantity: Quantity, kind: str, run: Run, found: dict[str, Curve], depth: int) -> Panel:
    layers = run.layers.get(kind, [])
    order = {name: place for place, name in enumerate(layers)}

    def line(panel: str, style: str, curve: Curve, name: str = kind, place: float = 0) -> Line:
        return Line("/".join(quote(part, safe="") for part in (run.name, panel, name)), style, *curve, place, name)

    style = "layer" if layers else "model"
    lines = [
        line(quantity.panel, style, curve, name, order[name] / max(depth - 1, 1) if layers else 0)
        for name, curve in found.items()
    ]
    if quantity.panel == "loss":
        lines.append(line("validation loss", "validation", validation(run)))
    if quantity.panel == "entropy":
        lines.append(line("ceiling", "ceiling", ceiling(run, kind)))
        marks = [(alarm["step"], alarm.get("entropy")) for alarm in run.alarms if alarm["layer"] in order]
        known = [mark for mark in marks if mark[1] is not None]
        lost = sorted({step for step, entropy in marks if entropy is None})
        lines.append(line("alarms", "alarm", thin(*map(list, zip(*known, strict=True))) if known else (EMPTY, EMPTY)))
        lines.append(line("not a number", "lost", thin(lost, [0.0] * len(lost))))
    rescued = sorted({rescue["step"] for rescue in run.rescues})
    marked: list[tuple[int, str]] = [(int(step), "rescue") for step in thin(rescued, [0.0] * len(rescued))[0]]
    if run.alarms:
        marked.append((run.alarms[0]["step"], "first alarm"))
    lines = [line for line in lines if len(line.x)]
    return Panel(run.name, lines, marked, depth=depth, left_out=len(layers) - len(found) if found and layers else 0)


def together(row: Row) -> Row:
    """The losses of all runs in one panel, without marks."""
    lines: list[Line] = []
    for number, panel in enumerate(row.panels):
        for line in panel.lines:
            run, _, name = line.id.split("/")
            style = {"model": "run", "validation": "run validation"}[line.style]
            id = f"{run}/{'all' if style == 'run' else 'all%20validation'}%20losses/{name}"
            lines.append(Line(id, style, line.x, line.y, number, panel.run))
    return row._replace(label="loss of all runs", panels=[Panel("all runs", lines, [])], across=True)


def heat_row(panel: str, kind: str, runs: list[Run]) -> Row | None:
    found = [heat(run, kind, panel) for run in runs]
    known = [grid[~np.isnan(grid)] for grid in found if grid is not None]
    if not known:
        return None
    quantity = HEATS[panel][0]
    panels = [
        Panel(run.name, [], [], grid, len(run.layers.get(kind, []))) for run, grid in zip(runs, found, strict=True)
    ]
    return Row(quantity.label, kind, panel, axis_of(quantity.scale, np.concatenate(known).astype(float)), panels)


def alt(row: Row, panel: Panel) -> str:
    """A panel in words, for those who do not see it."""
    head = f"{row.label}, {row.kind}, {panel.run}"
    if panel.heat is not None:
        known = panel.heat[~np.isnan(panel.heat)]
        return f"{head}: heat map of {panel.depth} layers, from {known.min():.3g} to {known.max():.3g}"
    own: list[Any] = [line for line in panel.lines if line.style in ("layer", "model", "run")]
    if not own:
        return f"{head}: not recorded"
    least = min(own, key=lambda line: line.y.min())
    largest = max(own, key=lambda line: line.y.max())

    def at(line: Line, i: int) -> str:
        return f"{line.y[i]:.3g} at update {line.x[i]:.0f}" + (f" in {line.name}" if len(own) > 1 else "")

    curves = f"{len(own)} curves" if len(own) > 1 else "a curve"
    return f"{head}: {curves}, least {at(least, least.y.argmin())}, largest {at(largest, largest.y.argmax())}"
