"""Writes and reads `monitor.jsonl`, the file of a monitored run, with one JSON object per line.

A line is the record of an update, or a validation: {"step": ..., "validation": {name: number}}.
"""

import gc
import json
import logging
import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_core.extras import extra

if TYPE_CHECKING:
    from .columns import Columns

FILE_NAME = "monitor.jsonl"
PACE = ("updates_per_second", "overhead")  # of a record; older ones lack them
NUMBERS = ("time", "loss", "lr", *PACE, "grad_l2", "grad_linf", "entropy", "threshold")  # keys of a record or an alarm
BY_HEAD = ("entropy", "entropy_min", "max_logit", "bound")
OF_LAYER = itemgetter("kind", *BY_HEAD, "sigma", "lag", "keys", "grad_l2", "grad_linf")  # as the monitor writes a layer
OF_RECORD = itemgetter("step", "layers", "alarms", "time", "loss", "lr", "grad_l2", "grad_linf")
START = re.compile(rb'\{"step": (\d{1,15})[,}]')  # and the start of a line
OF_NUMBERS = {float, int, bool, type(None)}  # types that JSON's numbers, and null, become
# NaN and Infinity, which are not JSON, but which json writes, become null.
DECODER = json.JSONDecoder(parse_constant=lambda name: None)
CHUNK = 1 << 18  # bytes of lines that are read at once
log = logging.getLogger("stable_monitor")


class RecordFile:
    """Appends records to the file of a run.

    The file is opened for each record, so that none is lost in a buffer when the disk is full, and a deleted folder is an error
    at once."""

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run)
        if self.path.suffix != ".jsonl":
            self.path /= FILE_NAME

    def prepare(self) -> bool:
        """Creates the folder and the file, and removes an unfinished last line. Returns whether the file holds any lines."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab"):
            pass
        if not self.path.is_file():  # a device, such as /dev/null
            return False
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(self.path, end)
        return bool(whole[:end].strip())

    def append(self, record: dict[str, Any]) -> None:
        """Appends the record as a line. If the disk is full, it removes the part that was written, and raises OSError."""
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
            except BaseException:
                with suppress(OSError):
                    file.truncate(end)
                raise


class Records:
    """The records of a run in ascending order of steps, read from its file each time that they are gone through.

    Only one is in memory at a time. Which lines count, `load` says; it is found by a look at the steps alone, and lines are
    parsed when their turn comes. A warning names those that are neither records nor validations, when the last was read.

    Args:
        run: a directory with `monitor.jsonl`, or such a file of any name.

    Attributes:
        steps: of the records, in order; of a line that turns out to be no record, too.
        validations: in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no record; also when they are gone through.
    """

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run)
        if self.path.is_dir():
            self.path /= FILE_NAME
        if not self.path.is_file():
            below = (f"{depth}{FILE_NAME}" for depth in ("*/", "*/*/", "*/*/*/") if Path(run).is_dir())
            runs = [str(path.parent) for pattern in below for path in sorted(Path(run).glob(pattern))][:5]
            raise FileNotFoundError(
                f"{self.path}: no such file; a run is a directory that holds {FILE_NAME}, or such a file"
                + (f"; below it: {' '.join(runs)}" if runs else "")
            )
        self.steps, self.validations = array("q"), list[dict[str, Any]]()
        self._lines, self._validation_lines = array("q"), array("q")  # their numbers, from 0
        self._wrong: list[int] = []
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                self._place(number, line)
        if not self.steps:
            raise self._none()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        wrong, found = list(self._wrong), False
        for number, line, record in self._read(self._lines):
            if record is not None:
                found = True
                yield record
            elif line.endswith(b"\n"):
                wrong.append(number)
        if not found:
            raise self._none()
        if wrong:
            some = ", ".join(str(number + 1) for number in sorted(wrong)[:5]) + ", ..." * (len(wrong) > 5)
            log.warning("%s, line%s %s: not a record of the monitor; left out", self.path, "s"[: len(wrong) - 1], some)

    def lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The lines of records and validations, and what they hold, in the order of the file."""
        numbers = array("q", sorted([*self._lines, *self._validation_lines]))
        yield from ((line, found) for _, line, found in self._read(numbers) if found is not None)

    def _read(self, numbers: "array[int]") -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
        """The lines of these numbers, and what they hold."""
        number = place = 0  # of the line that comes next, and where `numbers` goes on
        with self.path.open("rb") as file:
            while place < len(numbers) and (lines := file.readlines(CHUNK)):
                end = bisect_left(numbers, number + len(lines), place)
                chosen = [lines[at - number] for at in numbers[place:end]]
                yield from zip(numbers[place:end], chosen, parsed_all(chosen), strict=True)
                number, place = number + len(lines), end

    def _none(self) -> ValueError:
        return ValueError(f"{self.path}: holds no record; the monitor writes one JSON object a line")

    def _place(self, number: int, line: bytes) -> None:
        """Adds a line, and removes those that it replaces. It is parsed if it replaces any or is not as the monitor writes it,
        for no other line can do harm before its turn comes."""
        start = START.match(line)
        is_validation = b'"layers"' not in line
        line_parsed = None
        if start is None or is_validation or self._replaces(int(start[1])):
            line_parsed = parsed(line)
            if line_parsed is None:
                self._wrong += [number] if line.endswith(b"\n") else []
                return
        step = line_parsed["step"] if line_parsed is not None else int(start[1]) if start is not None else 0
        is_rescue = line_parsed is not None and "rescues" in line_parsed
        is_validation = line_parsed is not None and "validation" in line_parsed
        while self.steps and (self.steps[-1] > step or (self.steps[-1] == step and not is_validation)):
            self.steps.pop()
            self._lines.pop()
        while self.validations and not is_rescue and self.validations[-1]["step"] > step - is_validation:
            self.validations.pop()
            self._validation_lines.pop()
        if line_parsed is not None and is_validation:
            self.validations.append(line_parsed)
            self._validation_lines.append(number)
        else:
            self.steps.append(step)
            self._lines.append(number)

    def _replaces(self, step: int) -> bool:
        """Whether a record of this step would replace any line."""
        return bool(self.steps and self.steps[-1] >= step) or bool(
            self.validations and self.validations[-1]["step"] > step
        )


def read(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run, as `load` reads them."""
    return load(run)[0]


def load(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(records, validations) of a run in ascending order of steps, all in memory; `Records` reads one after another.

    An unfinished last line, of a writer that was killed, is left out. Where the run was resumed from an earlier checkpoint, a
    line replaces earlier lines of its own kind with the same step, and all earlier lines with later steps. Lines that are
    neither records nor validations are left out with a warning that names them.

    Args:
        run: a directory with `monitor.jsonl`, or such a file of any name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no record.
    """
    records = Records(run)
    return list(records), records.validations


def begin_with(earlier: str | Path, new: Path, step: int) -> None:
    """Begins the file of a run that goes on elsewhere with the lines of the earlier one, up to an update."""
    kept = []
    for line in Path(earlier).read_bytes().splitlines(keepends=True):
        found = parsed(line)
        # A record is of the update after its step, a validation of the update before.
        if found is not None and found["step"] < step + ("validation" in found):
            kept.append(line)
    new.parent.mkdir(parents=True, exist_ok=True)
    part = new.with_suffix(".part")
    part.write_bytes(b"".join(kept))
    part.replace(new)


def in_words(entropy: float | None, unit: str = "") -> str:
    """An entropy as text; null in a record is NaN, "not a number"."""
    return "not a number" if entropy is None else f"{entropy:.3g}{unit}"


@dataclass(frozen=True)
class Run:
    """A run of the report: its name, its records, of `load` or as a stream, `Records`, and its validations."""

    name: str
    records: Iterable[dict[str, Any]]
    validations: list[dict[str, Any]]

    @classmethod
    def stream(cls, name: str, path: str | Path) -> "Run":
        """The run at `path`, of which no more than a few records are in memory at a time."""
        records = Records(path)
        return cls(name, records, records.validations)

    @cached_property
    def columns(self) -> "Columns":
        """What the report draws of the records, collected in one pass."""
        return self.collect()

    def collect(self, *observers: Callable[[dict[str, Any]], Any]) -> "Columns":
        """Makes `columns` now, and calls the observers with each record in the same pass, in order."""
        with extra("monitor"):  # numpy, which training does without
            from .columns import Columns

        steps = self.records.steps if isinstance(self.records, Records) else [r["step"] for r in self.records]
        columns = self.__dict__["columns"] = Columns(steps)
        with _without_collector():
            for record in self.records:
                for observer in observers:
                    observer(record)
                columns.add(record)
            columns.close()
        return columns

    @property
    def layers(self) -> dict[str, list[str]]:
        """The attention layers' names by kind ("encoder", "decoder", "cross"), in the order of depth."""
        kinds = self.columns.kinds
        return {kind: [name for name in kinds if kinds[name] == kind] for kind in dict.fromkeys(kinds.values())}

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """All alarms in order, each with its "step"."""
        return self.columns.alarms

    @property
    def rescues(self) -> list[dict[str, Any]]:
        """All rescued layers in order, each with the "step" of the record after which it was."""
        return self.columns.rescues


@contextmanager
def _without_collector() -> Iterator[None]:
    """A context without Python's search for cycles: records have none, and it takes half of the time to read them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record or validation in a line; None if it is neither."""
    return parsed_all([line])[0]


def parsed_all(lines: list[bytes]) -> list[dict[str, Any] | None]:
    """What `parsed` returns, for each line. All that the monitor wrote is looked at together, which is faster."""
    found = list(map(_decoded, lines))
    try:
        if _are_whole(found):
            return found
    except (KeyError, TypeError, AttributeError):
        pass
    return [record if _is_right(record) else None for record in found]


def _decoded(line: bytes) -> Any:
    try:
        return DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None


def _are_whole(records: list[Any]) -> bool:
    """Whether all are records as the monitor writes them, with nothing missing, without alarm or rescue, and so right.

    Raises:
        KeyError, TypeError, AttributeError: they are not.
    """
    of_model = list(map(OF_RECORD, records))
    steps, layers, alarms = zip(*(model[:3] for model in of_model), strict=True)
    if any(alarms) or not ({*map(type, layers)} == {dict} and {*map(type, alarms)} == {list}):
        return False
    if any("rescues" in record or "validation" in record for record in records):
        return False
    of_layers = list(map(OF_LAYER, chain.from_iterable(map(dict.values, layers))))
    if not of_layers:
        return False
    kinds, *columns = zip(*of_layers, strict=True)
    heads, roles = list(chain(*columns[:4])), list(chain(*columns[4:6]))
    if not ({*map(type, kinds)} == {str} and {*map(type, heads)} == {list} and {*map(type, roles)} == {dict}):
        return False
    values = (chain.from_iterable(model[3:] for model in of_model), *columns[6:])
    of_roles = chain.from_iterable(map(dict.values, roles))
    added = chain.from_iterable(([r.get(key) for key in PACE], r.get("lrs", ())) for r in records)
    return _are_steps(steps) and _are_numbers(chain(*values, chain.from_iterable(heads), of_roles, *added))


def _is_right(record: Any) -> bool:
    if not isinstance(record, dict) or not _are_steps([record.get("step")]) or not _has_numbers(record):
        return False
    if "validation" in record:
        found = record["validation"]
        return isinstance(found, dict) and _are_numbers(found.values())
    layers, alarms, rescues = record.get("layers"), record.get("alarms"), record.get("rescues", [])
    if not isinstance(layers, dict) or not all(map(_is_layer, layers.values())):
        return False
    rates = record.get("lrs", [])
    if not isinstance(rates, list) or not _are_numbers(rates):
        return False
    if not isinstance(alarms, list) or not isinstance(rescues, list):
        return False
    return all(map(_is_alarm, alarms)) and all(map(_is_rescue, rescues))


def _are_steps(steps: Iterable[Any]) -> bool:
    return all(isinstance(step, int) and 0 <= step < 1 << 53 for step in steps)


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not isinstance(layer.get("kind"), str):
        return False
    heads = [layer.get(key, []) for key in BY_HEAD]
    by_role = [layer.get(key, {}) for key in ("sigma", "lag")]
    return (
        all(isinstance(values, list) and _are_numbers(values) for values in heads)
        and all(isinstance(values, dict) and _are_numbers(values.values()) for values in by_role)
        and _are_numbers(map(layer.get, ("keys", "grad_l2", "grad_linf")))
    )


def _is_alarm(alarm: Any) -> bool:
    return isinstance(alarm, dict) and isinstance(alarm.get("layer"), str) and _has_numbers(alarm)


def _is_rescue(rescue: Any) -> bool:
    if not isinstance(rescue, dict) or not isinstance(rescue.get("layer"), str):
        return False
    pairs = [rescue.get(key) for key in ("entropy", "queries", "keys")]
    return all(isinstance(pair, list) and len(pair) == 2 and _are_numbers(pair) for pair in pairs)


def _has_numbers(values: dict[str, Any]) -> bool:
    return _are_numbers(map(values.get, NUMBERS))


def _are_numbers(values: Iterable[Any]) -> bool:
    """Whether all are numbers, or null, as a record may hold in place of one."""
    values = list(values)
    return {*map(type, values)} <= OF_NUMBERS and max(map(abs, filter(None, values)), default=0) < 1e308
