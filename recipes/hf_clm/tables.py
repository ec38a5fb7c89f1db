"""The table of this recipe, for `python -m recipes.tables`."""

from recipes.tables import Page, Section, log, markdown

from .compare import table


def page() -> Page:
    runs = sorted(log("hf_clm", "small"), key=lambda run: (run["settings"]["norm"], run["settings"]["lr"]))
    return Page(
        "GPT with Trainer: every table",
        "Validation loss in nats a token, seeds 1 / 2 / 3; at 1e-2 seed 1 alone. A run's name has its learning rate. Entropy, "
        "in nats, is that of the layer where it is least.",
        [Section("Small, without warm-up", markdown(table(runs)), logs=("small.jsonl",), picture="small.png")],
    )
