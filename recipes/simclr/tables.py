"""The table of this recipe, for `python -m recipes.tables`."""

from itertools import groupby

from rich.table import Table

from recipes.tables import Page, Section, log, markdown


def page() -> Page:
    table = Table("", "pretrained", "untrained", "alarms")
    for variant, group in groupby(log("simclr", "small"), lambda run: run["variant"]):
        found = (
            (f"{run['probe']['top1']:.1f}", f"{run['untrained']['top1']:.1f}", str(len(run["alarms"]))) for run in group
        )
        table.add_row(f"`{variant}`", *map(" / ".join, zip(*found, strict=True)))
    text = (
        "Accuracy in % of the linear probe on the pretrained encoder, and on the same encoder before, seeds 1 / 2 / 3."
    )
    return Page("SimCLR: every table", text, [Section("Small, on digits", markdown(table), logs=("small.jsonl",))])
