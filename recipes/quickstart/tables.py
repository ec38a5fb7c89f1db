"""The table of this recipe, for `python -m recipes.tables`."""

from pathlib import Path

from recipes.tables import Page, Section, markdown

from .run import table
from .train import RUNS

RESULTS = Path(__file__).parent / "results"


def page() -> Page:
    logs = {(name, seed): RESULTS / f"{name}-{seed}.jsonl" for name in RUNS for seed in (1, 2, 3)}
    names = tuple(path.name for path in logs.values())
    return Page(
        "Quickstart: every table",
        "Seeds 1 / 2 / 3. Loss in nats a character. Least entropy is that of the median head in the layer that attends to "
        "least, as a part of log(keys), at the last record. The diagnosis is `stable diagnose`'s.",
        [Section("Three runs", markdown(table(logs)), logs=names, picture="quickstart.png")],
    )
