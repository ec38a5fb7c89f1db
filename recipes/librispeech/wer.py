"""Word error rates of runs of train.sh against one of their settings: Figure 13 of the σReparam paper.

A run's rate is the least that it had on its first validation set, dev-other, as its best checkpoint's is.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from recipes.figure import curve, write

SETTINGS = {  # as fairseq prints them in the first line of its log
    "lr": re.compile(r"'lr': \[([\d.e-]+)\]"),
    "warmup_updates": re.compile(r"'warmup_updates': (\d+)"),
    "init_std": re.compile(r"\binit_std'?[=:] ?([\d.e-]+)"),
}
VALIDATED = re.compile(r"valid on '([^']+)' subset \|.* \| wer ([\d.]+)")


@dataclass(frozen=True)
class Settings:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders that train.sh named"""
    against: Literal["lr", "warmup_updates", "init_std"]
    output: Path
    """NAME.png and NAME.jsonl are written"""


def setting(name: str, log: Path) -> float:
    found = SETTINGS[name].search(log.read_text())
    if found is None:
        raise ValueError(
            f"{log}: tells nothing of {name}; allowed are whole logs of fairseq-train, of a model that has it"
        )
    return float(found[1])


def wer(log: Path) -> float:
    """Percent."""
    found = VALIDATED.findall(log.read_text())
    if not found:
        raise ValueError(f"{log}: no validation with a word error rate")
    return min(float(rate) for subset, rate in found if subset == found[0][0])


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.librispeech.wer", description=__doc__)
    models: dict[str, list[tuple[float, float]]] = {}  # the folder's name begins with the model's
    for log in (run / "train.log" for run in settings.runs):
        models.setdefault(log.parent.name.partition("-")[0], []).append((setting(settings.against, log), wer(log)))
    drawn = [curve("WER, %", model, model, "o-", sorted(known)) for model, known in models.items()]
    write(drawn, settings.output, settings.against)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"wer: {error}")
