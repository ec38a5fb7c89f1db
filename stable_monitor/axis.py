"""The vertical and horizontal scales of the report's panels: how far up a value is, and which values are written beside it."""

import math
from typing import NamedTuple

import numpy as np


class Axis(NamedTuple):
    """A scale from `low` to `high`: "linear", "symlog" (linear up to 1 and logarithmic above, on both sides of 0) or "log"."""

    kind: str
    low: float
    high: float
    ticks: list[float]

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values are, 0 at the lower end and 1 at the upper one."""
        low, high = (stretched(self.kind, np.array(end, float)) for end in (self.low, self.high))
        return (stretched(self.kind, np.asarray(values, float)) - low) / (high - low)


def stretched(kind: str, values: np.ndarray) -> np.ndarray:
    if kind == "log":
        return np.log10(np.maximum(values, 1e-38))
    if kind == "symlog":
        size = np.maximum(abs(values), 1)
        return np.where(abs(values) <= 1, values, np.sign(values) * (1 + np.log10(size)))
    return values


def axis_of(name: str, values: np.ndarray) -> Axis:
    """The axis of a quantity whose scale is `name`, as `Quantity` says, for all values of a row of panels."""
    low, high = float(values.min()), float(values.max())
    if name == "log":
        positive = values[values > 0]
        low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.1, 1.0)
        margin = max((high / low) ** 0.05, 1.05)
        return Axis("log", low / margin, high * margin, decades(low / margin, high * margin))
    if name == "wide" and max(abs(low), abs(high)) > 20:
        stretch = stretched("symlog", np.array([low, high]))
        margin = 0.05 * max(stretch[1] - stretch[0], 1)
        low, high = (
            math.copysign(max(abs(x), 10 ** (abs(x) - 1)), x) for x in (stretch[0] - margin, stretch[1] + margin)
        )
        below = [-x for x in decades(1, -low)] if low < -1 else []
        ticks = [*below, 0.0, *(decades(1, high) if high > 1 else [])]
        return Axis("symlog", low, high, [x for x in ticks if low <= x <= high])
    if name == "zero":
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 0.5
    high += margin
    low -= margin if name != "zero" else 0.03 * (high - low)  # a curve at 0 stays clear of the axis
    return Axis("linear", low, high, evenly(low, high, 5))


def evenly(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers between low and high; whole ones if asked."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * x for x in (1, 2, 2.5, 5, 10) if size * x >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, at most six, with 2 and 5 or 3 between where there are few."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    between = (1, 2, 5) if last - first < 2 else (1, 3) if last - first < 3 else (1,)
    every = -(-(last - first + 1) // 6) if last >= first else 1
    powers = range(first, last + 1, every) if between == (1,) else range(first - 1, last + 1)
    found = [float(f"{x}e{power}") for power in powers for x in between]
    found = [x for x in found if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)]
    return found if len(found) > 1 else evenly(low, high, 3)
