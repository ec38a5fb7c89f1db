"""The comparison's table and picture from its committed logs, and which variants differ by more than seeds do.

    python -m recipes.lr_sensitivity.figures recipes/lr_sensitivity/results/gpt.jsonl

writes gpt.png beside the log.
"""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import tyro

from recipes.command import command
from stable_monitor.outcomes import Row, plot, summarise, table

from .logs import outcomes


@dataclass(frozen=True)
class Settings:
    logs: tyro.conf.Positional[tuple[Path, ...]]
    """files of recipes.lr_sensitivity.logs"""


def apart(rows: list[Row]) -> list[tuple[str, str]]:
    """(less sensitive, more sensitive) pairs of variants in which every seed of the one is below every seed of the other.

    Two variants that are alike are apart, one way or the other, once in ten times with three seeds each.
    """
    known = [row for row in rows if row.sensitivity]
    found = []
    for pair in combinations(known, 2):
        low, high = sorted(pair, key=lambda row: min(row.sensitivity.values()))
        if max(low.sensitivity.values()) < min(high.sensitivity.values()):
            found.append((low.variant, high.variant))
    return found


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.lr_sensitivity.figures", description=__doc__)
    for log in settings.logs:
        rows = summarise(outcomes([json.loads(line) for line in log.read_text().splitlines()]))
        print(f"{log.stem}\n\n{table(rows)}")
        for row in rows:
            below = ", ".join(high for low, high in apart(rows) if low == row.variant)
            print(f"{row.variant} is less sensitive, in every seed, than: {below or 'none'}")
        plot(rows, log.with_suffix(".png"))
        print(f"\nwrote {log.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    command(main)
