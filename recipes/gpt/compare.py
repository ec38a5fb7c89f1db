"""Lays runs of nanoGPT side by side: a line of JSON for each, a plot, a table. Those that differ by their seed are a group."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from recipes.hf_clm.compare import worst, write

TRAINED = re.compile(r"^iter (\d+): loss (\S+),", re.MULTILINE)
VALIDATED = re.compile(r"^step (\d+): train loss \S+, val loss (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Settings:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """directories of runs, with what train.py printed in train.log"""
    output: Path
    """NAME.jsonl and NAME.png are written"""

    def __post_init__(self) -> None:
        for run in self.runs:
            if not (run / "train.log").is_file():
                raise ValueError(f"runs = {run}: allowed are directories with a train.log")


def series(pattern: re.Pattern, log: str) -> list[list]:
    """Iterations and losses; what a resumed run did again is what counts."""
    found = {int(step): float(loss) for step, loss in pattern.findall(log)}
    return [sorted(found), [found[step] for step in sorted(found)]]


def summary(run: Path) -> dict:
    log = (run / "train.log").read_text()
    settings = dict(re.findall(r"^Overriding: (\w+) = (.*)$", log, re.MULTILINE))
    kept = {name: value for name, value in settings.items() if name not in ("dataset", "out_dir", "init_from")}
    losses = {"loss": series(TRAINED, log), "eval_loss": series(VALIDATED, log)}
    return {"run": run.name, "settings": kept, **losses, **worst(run)}


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.gpt.compare", description=__doc__)
    write([summary(run) for run in settings.runs], settings.output)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"compare: {error}")
