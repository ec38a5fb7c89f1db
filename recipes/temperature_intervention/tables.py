"""The table of this recipe, for `python -m recipes.tables`."""

from pathlib import Path

from recipes.tables import Page, Section, markdown

from .temperature_intervention import read, table


def page() -> Page:
    found = markdown(table(read(Path(__file__).parent / "results" / "log.jsonl")))
    return Page(
        "The temperature intervention: every table",
        "Seeds 1 / 2 / 3. Entropy of block 1, in nats: before the intervention, at it, and the least and the last since. Loss "
        "in nats: before it, and the worst and the last since. The largest |λ1| of the Hessian since, and the largest positive "
        "eigenvalue of the preconditioned one, divided by the threshold, 38 / learning rate; how often that was above it.",
        [Section("Every intervention", found, logs=("log.jsonl",), picture="figure2.png")],
    )
