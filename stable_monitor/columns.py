"""The numbers of a run that the report draws, collected in one pass over its records, and no more of them than pixels show.

Of many records, the least and the largest value of each interval of updates are kept for each layer, so that no spike is lost
and what is in memory does not grow with the run. Records wait until there are enough of them for numpy to pay.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

INTERVALS = 400  # about the pixels of a panel
LEAST_INTERVALS = 64  # where there are many layers
POINTS = 5000  # intervals times layers, above LEAST_INTERVALS
WAITING = 2000  # layers' records
OF_MODEL = ("loss", "lr", "grad_l2", "grad_linf")
ROLES = ("q", "k", "v", "qkv", "kv", "out")
Curve = tuple[np.ndarray, np.ndarray]  # steps, values
OF_LAYER = ("kind", "keys", "grad_l2", "grad_linf", "entropy", "entropy_min", "max_logit", "sigma", "lag")


def mean_known(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The mean of each part of `values` without NaNs; the parts begin at `starts`."""
    known = ~np.isnan(values)
    total, count = np.add.reduceat(np.where(known, values, 0), starts), np.add.reduceat(known.astype(int), starts)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


OVER_HEADS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "entropy": mean_known,
    "entropy_min": np.fmin.reduceat,
    "max_logit": np.fmax.reduceat,
}


def extremes(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each column, without NaNs, in order of steps; (rows, columns) -> (2, columns)."""
    unknown = np.isnan(values)
    rows = np.stack([np.where(unknown, np.inf, values).argmin(0), np.where(unknown, -np.inf, values).argmax(0)])
    rows.sort(0)
    return np.take_along_axis(steps, rows, 0), np.take_along_axis(values, rows, 0)


class Thinned:
    """Series side by side, one a column; NaN is what was not measured.

    Args:
        steps: all steps that will be added.
        columns: how many series there will be, about.

    Attributes:
        steps, values: (points, columns), the steps as (points, 1) where all records are kept.
        interval: the number of updates of which two points are kept; 0 where all are.
    """

    def __init__(self, steps: Sequence[int], columns: int) -> None:
        intervals = min(INTERVALS, max(LEAST_INTERVALS, POINTS // max(columns, 1)))
        self._first, self._last = steps[0], steps[-1]
        span = self._last - self._first + 1
        self.interval = 0 if len(steps) <= 2 * intervals else -(-span // intervals)
        self._dtype = np.uint32 if span < 1 << 32 else np.uint64  # of steps since the first
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._open = -1  # the interval of the last part, which may have more to come
        self.steps: np.ndarray = np.empty((0, 1), np.int64)
        self.values: np.ndarray = np.empty((0, columns))

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Appends (records,) steps and (records, columns) values; later calls may have more columns."""
        values = values.clip(-3e38, 3e38).astype(np.float32)
        offsets = (steps - self._first).astype(self._dtype)[:, None]
        if not self.interval:
            self._parts.append((offsets, values))
            return
        numbers = (offsets[:, 0] // self.interval + 1).astype(int)
        numbers[steps == self._first], numbers[steps == self._last] = 0, -2  # both ends are kept as they are
        for part in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(numbers)) + 1):
            wide = np.repeat(offsets[part], values.shape[1], 1), values[part]
            if numbers[part[0]] == self._open:
                wide = joined([self._parts.pop(), wide])
            self._open = numbers[part[0]]
            self._parts.append(extremes(*wide) if len(wide[0]) > 2 else wide)

    def close(self) -> None:
        offsets, self.values = joined(self._parts)
        self.steps = offsets.astype(np.int64) + self._first
        self._parts = []

    def curve(self, column: int) -> Curve:
        """The points of a series."""
        x, y = self.steps[:, min(column, self.steps.shape[1] - 1)], self.values[:, column].astype(float)
        x, y = x[~np.isnan(y)], y[~np.isnan(y)]
        new = np.diff(x, prepend=-1) != 0  # a single value is both the least and the largest
        return x[new], y[new]


def joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Parts one after another; those with fewer columns are filled up with NaN."""
    columns = max(values.shape[1] for _, values in parts)

    def filled(x: np.ndarray, value: Any) -> np.ndarray:
        missing = columns - x.shape[1]
        return np.pad(x, ((0, 0), (0, missing)), constant_values=value) if missing else x

    narrow = all(steps.shape[1] == 1 for steps, _ in parts)
    steps = [x if narrow else filled(x, 0) for x, _ in parts]
    return np.concatenate(steps), np.concatenate([filled(values, np.nan) for _, values in parts])


class Columns:
    """What one pass over the records of a run leaves: give each to `add`, and then call `close`.

    Args:
        steps: of all records.

    Attributes:
        of_model: by quantity, `Thinned` with one column.
        of_layers: by quantity, as "entropy" or "sigma.q", `Thinned` with a column for each layer, in the order of `kinds`.
        ceiling: by kind, log(keys) of the layer with the most keys, the entropy in nats of uniform attention; one column.
        kinds: {layer: kind}, in the order of depth.
        records: their number.
        first_step, last: the step of the first record, and the last record itself.
        last_loss: (step, loss) of the last loss that is a number, or None.
        pace: updates a second and the monitor's part of the time, both over the records that say so; None where none does.
        alarms, rescues: in order, each with its "step".
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = steps
        self._waiting: list[dict[str, Any]] = []
        self._count = 0  # of layers that wait
        self._index: dict[str, int] = {}  # of a layer
        self.of_model, self.of_layers, self.ceiling = dict[str, Thinned](), dict[str, Thinned](), dict[str, Thinned]()
        self.kinds: dict[str, str] = {}
        self.records = self.first_step = 0
        self.last: dict[str, Any] = {}
        self.last_loss: tuple[int, float] | None = None
        self._paced, self._seconds, self._own_seconds = 0, 0.0, 0.0  # records; for an update in each of them
        self.alarms, self.rescues = list[dict[str, Any]](), list[dict[str, Any]]()

    def add(self, record: dict[str, Any]) -> None:
        step, layers = record["step"], record["layers"]
        if not self.records:
            self.first_step = step
        self.records += 1
        self.last = record
        if (loss := record.get("loss")) is not None:
            self.last_loss = step, loss
        if speed := record.get("updates_per_second"):
            self._paced += 1
            self._seconds += 1 / speed
            self._own_seconds += (record.get("overhead") or 0.0) / speed
        if record["alarms"]:
            self.alarms += [{"step": step, **alarm} for alarm in record["alarms"]]
        if "rescues" in record:
            self.rescues += [{"step": step, **rescue} for rescue in record["rescues"]]
        self._waiting.append(record)
        self._count += len(layers) + 1
        if self._count >= WAITING:
            self._take()

    def close(self) -> None:
        if self._waiting:
            self._take()
        for found in (self.of_model, self.of_layers, self.ceiling):
            for thinned in found.values():
                thinned.close()

    @property
    def pace(self) -> tuple[float, float] | None:
        return (self._paced / self._seconds, self._own_seconds / self._seconds) if self._paced else None

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last step."""
        return self.first_step, self.last["step"]

    def places(self, kind: str) -> list[int]:
        """The columns of the layers of a kind, in the order of depth."""
        return [place for place, own in enumerate(self.kinds.values()) if own == kind]

    def _take(self) -> None:
        records, self._waiting, self._count = self._waiting, [], 0
        for key, values in zip(OF_MODEL, across(records, OF_MODEL), strict=True):
            self._add(self.of_model, key, self._steps_of(records), numbers(values)[:, None])
        layers = [record["layers"] for record in records]
        kinds, keys, l2, linf, *heads, sigma, lag = across(
            list(chain.from_iterable(map(dict.values, layers))), OF_LAYER
        )
        names = list(chain.from_iterable(layers))
        self.kinds.update(zip(names, kinds, strict=True))
        for name in self.kinds:
            self._index.setdefault(name, len(self._index))
        place = _Place(
            self._steps_of(records),
            np.repeat(np.arange(len(records)), list(map(len, layers))),
            np.array(list(map(self._index.__getitem__, names)), int),
            len(self._index),
        )
        for key, lists in zip(OVER_HEADS, heads, strict=True):
            lists = [values or () for values in lists]
            lengths = np.array(list(map(len, lists)), int)
            if lengths.any():
                starts = (np.cumsum(lengths) - lengths)[lengths > 0]
                found = OVER_HEADS[key](numbers(list(chain.from_iterable(lists))), starts)
                self._add(self.of_layers, key, place.steps, place.spread(found, lengths > 0))
        for key, dicts in (("sigma", sigma), ("lag", lag)):
            dicts = [values or {} for values in dicts]
            roles = [role for role in ROLES if role in set(chain.from_iterable(dicts))]
            for role, values in zip(roles, across(dicts, roles), strict=True):
                self._add(self.of_layers, f"{key}.{role}", place.steps, place.spread(numbers(values)))
        for key, values in (("grad_l2", l2), ("grad_linf", linf)):
            self._add(self.of_layers, key, place.steps, place.spread(numbers(values)))
        self._add_ceilings(place, kinds, numbers(keys))

    @staticmethod
    def _steps_of(records: list[dict[str, Any]]) -> np.ndarray:
        return np.array([record["step"] for record in records])

    def _add_ceilings(self, place: "_Place", kinds: Sequence[str], keys: np.ndarray) -> None:
        of_kind = np.array(kinds)
        for kind in set(kinds):
            where = (of_kind == kind) & (keys > 0)
            most = np.full(len(place.steps), np.nan)
            np.fmax.at(most, place.rows[where], np.log(keys[where]))
            self._add(self.ceiling, kind, place.steps, most[:, None])

    def _add(self, found: dict[str, Thinned], key: str, steps: np.ndarray, values: np.ndarray) -> None:
        if key not in found and np.isnan(values).all():
            return
        found.setdefault(key, Thinned(self._steps, values.shape[1])).add(steps, values)


class _Place(NamedTuple):
    """Where the numbers of the layers of some records belong: the steps of its rows; and of each layer, row and column."""

    steps: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    width: int

    def spread(self, numbers: np.ndarray, where: Any = slice(None)) -> np.ndarray:
        """The numbers of the layers `where`, one after another, as (records, columns)."""
        values = np.full((len(self.steps), self.width), np.nan)
        values[self.rows[where], self.columns[where]] = numbers
        return values


def across(dicts: list[dict[str, Any]], keys: Sequence[str]) -> list[Sequence[Any]]:
    """For each key, its values in all dicts; None where it is missing."""
    if len(keys) > 1:
        try:
            return list(zip(*map(itemgetter(*keys), dicts), strict=True)) or [()] * len(keys)
        except KeyError:
            pass
    return [[values.get(key) for values in dicts] for key in keys]


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """As an array; None is NaN."""
    return np.array(values, float)
