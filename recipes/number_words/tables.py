"""The table of this recipe, for `python -m recipes.tables`."""

from itertools import chain
from pathlib import Path

from rich.table import Table

from recipes.tables import Page, Section, markdown

from .run import RUNS, losses, row

RESULTS = Path(__file__).parent / "results"


def page() -> Page:
    table = Table("", "learning rate", "training loss")
    logs = {run: [f"{run.name}-{seed}.log" for seed in (1, 2, 3)] for run in RUNS}
    for run, names in logs.items():
        table.add_row(*row(run, [losses(RESULTS / name) for name in names]))
    section = Section("Five ways", markdown(table), logs=tuple(chain(*logs.values())), picture="number_words.png")
    text = "Training loss in nats a letter, after 240 updates, seeds 1 / 2 / 3."
    return Page("Number words: every table", text, [section])
