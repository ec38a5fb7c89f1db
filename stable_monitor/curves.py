"""What the report shows: quantities from the records, and each as one curve per layer."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from .records import Run

Curve = tuple[np.ndarray, np.ndarray]  # steps, values
Value = Callable[[dict[str, Any]], float | None]
ROLES = ("q", "k", "v", "qkv", "kv", "out")
WHOLE_MODEL = "whole model"  # beside the kinds of attention


class Quantity(NamedTuple):
    """What a panel shows. `panel` names it in ids. `scale` is "zero" (linear from 0), "wide" (linear, but logarithmic
    from 1 on where it exceeds 20) or "log". `of_layer` takes the record of a layer, `of_model` a whole record.
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
    """At most two points a bin, its least and its greatest, so that no spike is lost; and the two ends."""
    if len(x) <= 2 * bins:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), bins):
        keep |= {part[y[part].argmin()], part[y[part].argmax()]}
    kept = sorted(keep)
    return x[kept], y[kept]


def series(records: list[dict[str, Any]], value: Value) -> Curve:
    """A null is no point: the curve goes straight on between its neighbours."""
    points = [(record["step"], y) for record in records if (y := value(record)) is not None]
    return thin(*np.array(points, float).reshape(-1, 2).T)


def curves(quantity: Quantity, run: Run, kind: str) -> dict[str, Curve]:
    """The curves of one panel by layer, for WHOLE_MODEL the one of that name, without those that hold no point."""
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
    """log(keys), the entropy of attending to all keys alike; where layers differ the highest. Nats."""

    def value(record: dict[str, Any]) -> float | None:
        keys = [record["layers"].get(name, {}).get("keys") for name in run.layers.get(kind, [])]
        return max((math.log(count) for count in keys if count and count > 0), default=None)

    return series(run.records, value)
