"""The records of monitored runs, read back from the file that the monitor appends to: one JSON object a line."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FILE_NAME = "monitor.jsonl"


def read(run: str | Path) -> list[dict]:
    """The records of a run (a directory that holds `monitor.jsonl`, or such a file of any name), steps ascending.

    The writer may have been killed: a last line that was cut short is left out. It may have gone on from an earlier
    checkpoint: a record replaces those of the same and of later steps before it. Raises FileNotFoundError if there is no
    such file, ValueError for any other malformed line and for a file without records.
    """
    path = Path(run)
    if path.is_dir():
        path /= FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run is a directory that holds {FILE_NAME}, or such a file")
    lines = path.read_bytes().splitlines()
    records: list[dict] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, _, _ = record["step"], record["layers"], record["alarms"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a record of the monitor") from None
        while records and records[-1]["step"] >= step:
            records.pop()
        records.append(record)
    if not records:
        raise ValueError(f"{path}: holds no record; the monitor writes one JSON object a line")
    return records


@dataclass(frozen=True)
class Run:
    name: str
    records: list[dict]

    @cached_property
    def layers(self) -> dict[str, list[str]]:
        """The attention layers' names by kind ("encoder", "decoder", "cross"), in the order of depth."""
        kinds = {name: layer["kind"] for record in self.records for name, layer in record["layers"].items()}
        return {kind: [name for name in kinds if kinds[name] == kind] for kind in dict.fromkeys(kinds.values())}

    @cached_property
    def alarms(self) -> list[dict]:
        """All alarms in order, each with its "step"."""
        return [{"step": record["step"], **alarm} for record in self.records for alarm in record["alarms"]]
