"""The table of this recipe, for `python -m recipes.tables`."""

from recipes.tables import Page, Section, log, markdown

from .run import SIZES, Outcome, table


def page() -> Page:
    found = markdown(table([Outcome(**line) for line in log("number_words", "outcomes")]))
    text = (
        f"Training loss in nats a letter after 240 updates; BLEU and numbers right of {SIZES['test']} others, beam 5; seeds "
        "1 / 2 / 3."
    )
    return Page("Number words: every table", text, [Section("Five ways", found, logs=("outcomes.jsonl",))])
