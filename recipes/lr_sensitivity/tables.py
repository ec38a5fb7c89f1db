"""The tables of this recipe, for `python -m recipes.tables`."""

from recipes.tables import Page, Section

from .alarms import by_log
from .figures import RESULTS, TITLES, described, rows_of


def section(name: str, title: str) -> Section:
    return Section(title, described(rows_of(RESULTS / f"{name}.jsonl")), "", (f"{name}.jsonl",), f"{name}.png")


def page() -> Page:
    return Page(
        "Every rate, every variant",
        "Mean validation loss of three seeds at each rate; best loss and sensitivity of seeds 1 / 2 / 3. One variant is less "
        "sensitive than another where every seed of it is below every seed of the other; of two that are alike that is so, one "
        "way or the other, once in ten times.",
        [
            *(section(*each) for each in TITLES.items()),
            Section("What the alarm hears", by_log([RESULTS / f"{name}.jsonl" for name in TITLES])),
        ],
    )
