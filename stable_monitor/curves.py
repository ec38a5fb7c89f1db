"""The quantities that the report shows, and their curves, one for each layer, from the records of runs."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from .records import Run

Curve = tuple[np.ndarray, np.ndarray]  # steps, values
Value = Callable[[dict[str, Any]], float | None]
ROLES = ("q", "k", "v", "qkv", "kv", "out")
WHOLE_MODEL = "whole model"  # a kind beside the kinds of attention


class Quantity(NamedTuple):
    """A quantity shown in panels of the report.

    Attributes:
        panel: its name in the ids of curves.
        label: of the y axis.
        scale: "zero" (linear from 0), "wide" (linear; if values exceed 20, linear up to 1 and logarithmic above) or "log".
        of_layer, of_model: its value from the record of a layer, and from a whole record; None where there is none.
    """

    panel: str
    label: str
    scale: str
    of_layer: Value = lambda layer: None
    of_model: Value = lambda record: None


def over_heads(reduce: Callable[[list[float]], float], key: str) -> Value:
    def value(layer: dict[str, Any]) -> float | None:
        heads = [head for head in layer.get(key) or [] if head is not None]
        return reduce(heads) if heads else None

    return value


def number(key: str) -> Value:
    return lambda record: record.get(key)


def of_role(key: str, role: str) -> Value:
    return lambda layer: layer.get(key, {}).get(role)


mean_entropy = over_heads(fmean, "entropy")
FIGURES = {
    "loss": (
        "Loss and learning rate",
        [
            Quantity("loss", "loss", "wide", of_model=number("loss")),
            Quantity("lr", "learning rate", "zero", of_model=number("lr")),
        ],
    ),
    "entropy": (
        "Attention entropy, mean over heads",
        [Quantity("entropy", "entropy (nats)", "zero", mean_entropy)],
    ),
    "entropy_min": (
        "Attention entropy, least of heads and queries",
        [Quantity("entropy_min", "least entropy (nats)", "zero", over_heads(min, "entropy_min"))],
    ),
    "max_logit": (
        "Largest attention logit",
        [Quantity("max_logit", "largest logit", "wide", over_heads(max, "max_logit"))],
    ),
    "sigma": (
        "Spectral norm σ of the projections",
        [Quantity(f"sigma.{role}", f"σ of {role}", "wide", of_role("sigma", role)) for role in ROLES],
    ),
    "lag": (
        "Lag of σReparam's running estimate, 1 - estimate / σ",
        [Quantity(f"lag.{role}", f"lag of {role}", "zero", of_role("lag", role)) for role in ROLES],
    ),
    "gradients": (
        "Gradient norms",
        [
            Quantity("grad_l2", "gradient, l2", "log", number("grad_l2"), number("grad_l2")),
            Quantity("grad_linf", "gradient, l-inf", "log", number("grad_linf"), number("grad_linf")),
        ],
    ),
}


def thin(x: np.ndarray, y: np.ndarray, bins: int = 100) -> Curve:
    """The smallest and the largest point of each bin, so that no spike is lost, and both ends; few points are all kept."""
    if len(x) <= 2 * bins:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), bins):
        keep |= {part[y[part].argmin()], part[y[part].argmax()]}
    kept = sorted(keep)
    return x[kept], y[kept]


def series(records: list[dict[str, Any]], value: Value) -> Curve:
    """The thinned curve of a value over the steps of the records. Nulls are left out, and their neighbours connected."""
    points = [(record["step"], y) for record in records if (y := value(record)) is not None]
    return thin(*np.array(points, float).reshape(-1, 2).T)


def curves(quantity: Quantity, run: Run, kind: str) -> dict[str, Curve]:
    """The curves of one panel by layer, or the model's, named WHOLE_MODEL; curves without a point are left out."""
    if kind == WHOLE_MODEL:
        found = {kind: series(run.records, quantity.of_model)}
    else:

        def of_layer(name: str) -> Value:
            return lambda record: quantity.of_layer(record["layers"].get(name, {}))

        found = {name: series(run.records, of_layer(name)) for name in run.layers.get(kind, [])}
    return {name: curve for name, curve in found.items() if len(curve[0])}


def validation_loss(line: dict[str, Any]) -> float | None:
    return line["validation"].get("loss")


def validation(run: Run) -> Curve:
    return series(run.validations, validation_loss)


def ceiling(run: Run, kind: str) -> Curve:
    """The curve of log(keys), the entropy in nats of uniform attention; of the layer with the most keys."""

    def value(record: dict[str, Any]) -> float | None:
        keys = [record["layers"].get(name, {}).get("keys") for name in run.layers.get(kind, [])]
        return max((math.log(count) for count in keys if count and count > 0), default=None)

    return series(run.records, value)
