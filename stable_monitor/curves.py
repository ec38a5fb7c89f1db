"""What the report draws: quantities, and of many layers those whose curves are drawn, and heat maps of all."""

from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from .columns import ROLES, Curve, Thinned
from .records import Run

Value = Callable[[dict[str, Any]], float | None]
WHOLE_MODEL = "whole model"  # a kind beside the kinds of attention
MOST_CURVES = 64  # of the layers of a panel
EVENLY, OUTERMOST = (
    40,
    8,
)  # where there are more layers: so many evenly spread, and of those with the least and the largest
HEAT_FROM = 13  # layers
HEAT_ROWS, HEAT_COLUMNS = 200, 200


class Quantity(NamedTuple):
    """A quantity shown in panels of the report.

    Attributes:
        panel: its name in `Columns`, and in the ids of curves.
        label: of the y axis.
        scale: "zero" (linear from 0), "wide" (linear; if values exceed 20, linear up to 1 and logarithmic above) or "log".
        of_model, of_layer: whether records have it, of the model and of a layer.
    """

    panel: str
    label: str
    scale: str
    of_model: bool = False
    of_layer: bool = True


FIGURES = {
    "loss": (
        "Loss and learning rate",
        [Quantity("loss", "loss", "wide", True, False), Quantity("lr", "learning rate", "zero", True, False)],
    ),
    "entropy": ("Attention entropy, mean over heads", [Quantity("entropy", "entropy (nats)", "zero")]),
    "entropy_min": (
        "Attention entropy, least of heads and queries",
        [Quantity("entropy_min", "least entropy (nats)", "zero")],
    ),
    "max_logit": ("Largest attention logit", [Quantity("max_logit", "largest logit", "wide")]),
    "sigma": (
        "Spectral norm σ of the projections",
        [Quantity(f"sigma.{role}", f"σ of {role}", "wide") for role in ROLES],
    ),
    "lag": (
        "Lag of σReparam's running estimate, 1 - estimate / σ",
        [Quantity(f"lag.{role}", f"lag of {role}", "zero") for role in ROLES],
    ),
    "gradients": (
        "Gradient norms",
        [
            Quantity("grad_l2", "gradient, l2", "log", True),
            Quantity("grad_linf", "gradient, l-inf", "log", True),
        ],
    ),
}
HEATS = {  # quantities of the heat maps, and what stands for several layers that share a row: no spike is lost
    "entropy": (Quantity("entropy", "entropy (nats)", "zero"), np.fmin),
    "max_logit": (Quantity("max_logit", "largest logit", "wide"), np.fmax),
    "grad_l2": (Quantity("grad_l2", "gradient, l2", "log"), np.fmax),
}


def over_heads(reduce: Callable[[list[float]], float], key: str) -> Value:
    """Of the record of a layer, `reduce` of the heads that are not null."""

    def value(layer: dict[str, Any]) -> float | None:
        heads = [head for head in layer.get(key) or [] if head is not None]
        return reduce(heads) if heads else None

    return value


def number(key: str) -> Value:
    return lambda record: record.get(key)


mean_entropy = over_heads(fmean, "entropy")


def validation_loss(line: dict[str, Any]) -> float | None:
    return line["validation"].get("loss")


def thin(steps: list[int], values: list[float | None]) -> Curve:
    """A curve of which each interval of updates keeps the least and the largest value; None is left out."""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if not known:
        return np.empty(0), np.empty(0)
    x, y = np.array(known, float).T
    thinned = Thinned(x.astype(int).tolist(), 1)
    thinned.add(x.astype(int), y[:, None])
    thinned.close()
    return thinned.curve(0)


def validation(run: Run) -> Curve:
    return thin([line["step"] for line in run.validations], [validation_loss(line) for line in run.validations])


def ceiling(run: Run, kind: str) -> Curve:
    """The curve of log(keys), the entropy in nats of uniform attention; of the layer with the most keys."""
    found = run.columns.ceiling.get(kind)
    return found.curve(0) if found is not None else (np.empty(0), np.empty(0))


def curves(quantity: Quantity, run: Run, kind: str) -> dict[str, Curve]:
    """The curves of one panel by layer, or the model's, named WHOLE_MODEL; curves without a point are left out."""
    if kind == WHOLE_MODEL:
        found = run.columns.of_model.get(quantity.panel) if quantity.of_model else None
        drawn = {} if found is None else {kind: found.curve(0)}
    else:
        found = run.columns.of_layers.get(quantity.panel) if quantity.of_layer else None
        columns = [] if found is None else [c for c in run.columns.places(kind) if c < found.values.shape[1]]
        names = list(run.columns.kinds)
        drawn = {names[column]: found.curve(column) for column in chosen(found, columns)} if found is not None else {}
    return {name: curve for name, curve in drawn.items() if len(curve[0])}


def chosen(found: Thinned, columns: list[int]) -> list[int]:
    """All columns; of more than MOST_CURVES some that are evenly spread, and those with the least and the largest values."""
    if len(columns) <= MOST_CURVES:
        return columns
    values = found.values[:, columns]
    least, largest = np.fmin.reduce(values, 0), np.fmax.reduce(values, 0)
    even = np.linspace(0, len(columns) - 1, EVENLY).round().astype(int)
    outermost = np.argsort(least)[:OUTERMOST], np.argsort(np.nan_to_num(-largest, nan=np.inf))[:OUTERMOST]
    return [columns[i] for i in sorted({*even.tolist(), *outermost[0].tolist(), *outermost[1].tolist()})]


def heat(run: Run, kind: str, panel: str) -> np.ndarray | None:
    """A heat map, (layers, updates): rows are layers or neighbouring layers in order of depth, columns are equal intervals of
    updates; NaN where nothing was measured. None where the kind has too few layers, or the quantity was not recorded."""
    found, places = run.columns.of_layers.get(panel), run.columns.places(kind)
    if found is None or len(places) < HEAT_FROM:
        return None
    columns = [c for c in places if c < found.values.shape[1]]
    first, last = run.columns.span
    width = min(HEAT_COLUMNS, len(found.steps))
    rows = min(HEAT_ROWS, len(places))
    over: Any = HEATS[panel][1]
    grid = np.full((rows, width), np.nan, np.float32)
    values = found.values[:, columns]
    steps = np.broadcast_to(found.steps[:, columns] if found.steps.shape[1] > 1 else found.steps, values.shape)
    at = (steps - first) * width // (last - first + 1)
    row = np.broadcast_to(np.arange(len(columns)) * rows // len(places), values.shape)
    known = ~np.isnan(values)
    over.at(grid, (row[known], at[known]), values[known])
    for column in range(1, width):  # what was measured holds until the next record
        empty = np.isnan(grid[:, column])
        if empty.all():
            grid[:, column] = grid[:, column - 1]
    return None if np.isnan(grid).all() else grid
