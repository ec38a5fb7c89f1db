"""The tables of this recipe, for `python -m recipes.tables`."""

from rich.table import Table

from recipes.hf_clm import compare
from recipes.tables import Page, Section, log, markdown


def kind_and_rate(run: dict) -> tuple[str, float]:
    return run["run"].partition("-")[0], float(run["settings"]["learning_rate"])


def muon() -> Table:
    names = ("shape", "updates", "lr", "reparam", "optimizer")
    table, losses = Table(*names, "validation loss"), {}
    for run in log("gpt", "muon"):
        losses.setdefault(tuple(str(run[name]) for name in names), []).append(f"{run['eval_loss']:.3f}")
    for setting, of_seeds in sorted(losses.items()):
        table.add_row(*setting, " / ".join(of_seeds))
    return table


def page() -> Page:
    small = markdown(compare.table(sorted(log("gpt", "small"), key=kind_and_rate)))
    text = "x1 is a learning rate of 1e-3. Entropy, in nats, is that of the layer where it is least."
    return Page(
        "GPT: every table",
        "Validation loss in nats a character, seeds 1 / 2 / 3; with Muon, of `gpt2` seed 1 alone.",
        [
            Section("Small, without warm-up", small, text, ("small.jsonl",), "small.png"),
            Section("Muon", markdown(muon()), logs=("muon.jsonl",)),
        ],
    )
