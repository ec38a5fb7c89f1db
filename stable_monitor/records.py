"""Writes and reads `monitor.jsonl`, the file of a monitored run, with one JSON object per line.

A line is the record of an update, or a validation: {"step": ..., "validation": {name: number}}.
"""

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

FILE_NAME = "monitor.jsonl"
NUMBERS = ("time", "loss", "lr", "grad_l2", "grad_linf", "entropy", "threshold")  # keys of a record or an alarm
BY_HEAD = ("entropy", "entropy_min", "max_logit", "bound")
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


def read(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run, as `load` reads them."""
    return load(run)[0]


def load(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(records, validations) of a run in ascending order of steps.

    An unfinished last line, of a writer that was killed, is left out. Where the run was resumed from an earlier checkpoint, a
    line replaces earlier lines of its own kind with the same step, and all earlier lines with later steps. Lines that are
    neither records nor validations are left out with a warning that names them.

    Args:
        run: a directory with `monitor.jsonl`, or such a file of any name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no record.
    """
    path = Path(run)
    if path.is_dir():
        path /= FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run is a directory that holds {FILE_NAME}, or such a file")
    whole = path.read_bytes()
    lines = whole.splitlines()
    records: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    wrong = []
    for number, line in enumerate(lines, 1):
        parsed = _parsed(line)
        if parsed is None:
            wrong.append(number)
            continue
        same, others = (validations, records) if "validation" in parsed else (records, validations)
        while same and same[-1]["step"] >= parsed["step"]:
            same.pop()
        while others and others[-1]["step"] > parsed["step"] and "rescues" not in parsed:  # it was written again
            others.pop()
        same.append(parsed)
    if wrong and wrong[-1] == len(lines) and not whole.endswith(b"\n"):
        wrong.pop()
    if not records:
        raise ValueError(f"{path}: holds no record; the monitor writes one JSON object a line")
    if wrong:
        some = ", ".join(map(str, wrong[:5])) + ", ..." * (len(wrong) > 5)
        log.warning("%s, line%s %s: not a record of the monitor; left out", path, "s" * (len(wrong) > 1), some)
    return records, validations


def in_words(entropy: float | None, unit: str = "") -> str:
    """An entropy as text; null in a record is NaN, "not a number"."""
    return "not a number" if entropy is None else f"{entropy:.3g}{unit}"


@dataclass(frozen=True)
class Run:
    """A run of the report: its name, and its records and validations as `load` returns them."""

    name: str
    records: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    @cached_property
    def layers(self) -> dict[str, list[str]]:
        """The attention layers' names by kind ("encoder", "decoder", "cross"), in the order of depth."""
        kinds = {name: layer["kind"] for record in self.records for name, layer in record["layers"].items()}
        return {kind: [name for name in kinds if kinds[name] == kind] for kind in dict.fromkeys(kinds.values())}

    @cached_property
    def alarms(self) -> list[dict[str, Any]]:
        """All alarms in order, each with its "step"."""
        return [{"step": record["step"], **alarm} for record in self.records for alarm in record["alarms"]]

    @cached_property
    def rescues(self) -> list[dict[str, Any]]:
        """All rescued layers in order, each with the "step" of the record after which it was."""
        return [{"step": record["step"], **rescue} for record in self.records for rescue in record.get("rescues", [])]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record or validation in a line; None if it is neither."""
    try:
        record = json.loads(
            line, parse_constant=lambda name: None
        )  # NaN and Infinity, which are not JSON, but which json writes, become null
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(step, int) or not 0 <= step < 1 << 53 or not _has_numbers(record):
        return None
    if "validation" in record:
        found = record["validation"]
        return record if isinstance(found, dict) and all(map(_is_number, found.values())) else None
    layers, alarms, rescues = record.get("layers"), record.get("alarms"), record.get("rescues", [])
    if not isinstance(layers, dict) or not all(map(_is_layer, layers.values())):
        return None
    listed = isinstance(alarms, list) and isinstance(rescues, list)
    return record if listed and all(map(_is_alarm, alarms)) and all(map(_is_rescue, rescues)) else None


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not isinstance(layer.get("kind"), str):
        return False
    heads = [layer.get(key, []) for key in BY_HEAD]
    by_role = [layer.get(key, {}) for key in ("sigma", "lag")]
    return (
        all(isinstance(values, list) and all(map(_is_number, values)) for values in heads)
        and all(isinstance(values, dict) and all(map(_is_number, values.values())) for values in by_role)
        and all(_is_number(layer.get(key)) for key in ("keys", "grad_l2", "grad_linf"))
    )


def _is_alarm(alarm: Any) -> bool:
    return isinstance(alarm, dict) and isinstance(alarm.get("layer"), str) and _has_numbers(alarm)


def _is_rescue(rescue: Any) -> bool:
    if not isinstance(rescue, dict) or not isinstance(rescue.get("layer"), str):
        return False
    pairs = [rescue.get(key) for key in ("entropy", "queries", "keys")]
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs)


def _has_numbers(values: dict[str, Any]) -> bool:
    return all(_is_number(values.get(key)) for key in NUMBERS)


def _is_number(x: Any) -> bool:
    """Whether x is a number, or null, as a record may hold in place of one."""
    return x is None or (isinstance(x, int | float) and abs(x) < 1e308)
