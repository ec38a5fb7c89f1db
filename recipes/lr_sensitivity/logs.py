"""`python -m recipes.lr_sensitivity.logs SWEEP LOG`: a sweep in a file that is small enough to keep, a line of JSON a run.

A line has the run's losses, and for each layer the entropy of its median head as a part of log(keys), and its largest logit.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from recipes.command import command
from stable_monitor.outcomes import Outcome
from stable_monitor.records import load
from stable_monitor.verdicts import examine, median_head


@dataclass(frozen=True)
class Settings:
    sweep: tyro.conf.Positional[Path]
    """folder of python -m stable_monitor.sweep"""
    log: tyro.conf.Positional[Path]
    """file to write"""


def line_of(outcome: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The line of a run: what came of it, and its records in `folder`."""
    records, _ = load(folder)
    layers: dict[str, dict[str, list[float | None]]] = {}
    for record in records:
        for name, layer in record["layers"].items():
            entropy, keys = median_head(layer["entropy"]), layer["keys"]
            relative = None if math.isnan(entropy) or not keys or keys <= 1 else round(entropy / math.log(keys), 3)
            logit = max((x for x in layer["max_logit"] if x is not None), default=None)
            series = layers.setdefault(name, {"entropy": [], "logit": []})
            series["entropy"].append(relative)
            series["logit"].append(None if logit is None else float(f"{logit:.3g}"))
    losses = [None if record["loss"] is None else round(record["loss"], 4) for record in records]
    steps = [record["step"] for record in records]
    return {**outcome, "verdict": examine(records).verdict, "steps": steps, "loss": losses, "layers": layers}


def outcomes(lines: list[dict[str, Any]]) -> list[Outcome]:
    names = Outcome.__dataclass_fields__
    return [Outcome(**{name: math.nan if line[name] is None else line[name] for name in names}) for line in lines]


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.lr_sensitivity.logs", description=__doc__)
    found = [json.loads(line) for line in (settings.sweep / "outcomes.jsonl").read_text().splitlines()]
    lines = [line_of(one, settings.sweep / f"{one['variant']}-{one['lr']:g}-{one['seed']}") for one in found]
    settings.log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    print(f"{len(lines)} runs: {settings.log}")
    return 0


if __name__ == "__main__":
    command(main)
