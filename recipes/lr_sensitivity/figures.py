"""The comparison's pictures from its logs, and which variants differ by more than seeds do.

    python -m recipes.lr_sensitivity.figures recipes/lr_sensitivity/results/gpt.jsonl

writes gpt.png beside the log, and prints its table. Without arguments it does so for all of results/.
"""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

import tyro

from recipes.command import command
from stable_monitor.outcomes import Row, plot, summarise, table

from .logs import outcomes

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "gpt": "GPT of characters, 0.8 million parameters",
    "vit": "ViT of digits",
    "translation": "Translation of number words",
    "gpt-muon": "GPT, Muon",
    "gpt-longer": "GPT, 1,000 updates",
    "gpt-25m": "GPT, 25 million parameters",
    "gpt-85m": "GPT, 85 million parameters",
    "gpt-85m-low": "GPT, 85 million parameters, lower rates",
    "gpt-parts": "GPT, the parts alone",
    "translation-residual": "Translation, post-LN and DeepNorm",
}
IN_SHORT = ("gpt", "vit", "translation")


@dataclass(frozen=True)
class Settings:
    logs: tyro.conf.Positional[tuple[Path, ...]] = ()
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


def rows_of(log: Path) -> list[Row]:
    return summarise(outcomes([json.loads(line) for line in log.read_text().splitlines()]))


def described(rows: list[Row]) -> str:
    """Markdown: the table, and what is apart."""
    lines = [table(rows)]
    for row in rows:
        below = ", ".join(f"`{high}`" for low, high in apart(rows) if low == row.variant)
        lines.append(f"- `{row.variant}` is less sensitive than {below or 'none'}.\n")
    return "\n".join([lines[0], "".join(lines[1:])])


def in_short() -> str:
    """Markdown, for the README: each variant's mean loss at its best rate, and its mean sensitivity, in three stacks."""
    stacks = [{row.variant: row for row in rows_of(RESULTS / f"{name}.jsonl")} for name in IN_SHORT]
    lines = ["| | GPT | ViT | translation |", "|---|---|---|---|"]
    for variant in stacks[0]:
        found = (stack[variant] for stack in stacks)
        cells = (f"{fmean(row.best.values()):.3f}, {fmean(row.sensitivity.values()):.2f}" for row in found)
        lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.lr_sensitivity.figures", description=__doc__)
    for log in settings.logs or [RESULTS / f"{name}.jsonl" for name in TITLES]:
        rows = rows_of(log)
        print(f"{log.stem}\n\n{described(rows)}")
        plot(rows, log.with_suffix(".png"))
        print(f"wrote {log.with_suffix('.png')}\n")
    return 0


if __name__ == "__main__":
    command(main)
