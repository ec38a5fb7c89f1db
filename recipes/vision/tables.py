"""The tables of this recipe, for `python -m recipes.tables`."""

from rich.table import Table

from recipes.command import keyword_arguments
from recipes.tables import Page, Section, log, markdown

from . import fine_tune, grid
from .data import CLASSES

FINE_TUNED = (
    "By `python -m recipes.vision.fine_tune`: a ViT of 6 blocks and width 128 is trained on five classes, and by 100 updates "
    "on 500 images of the others, with timm's layer decay. Mean test accuracy in % by learning rate; in brackets the number "
    "of seeds, where it is less than the row's others; seeds 1 / 2 / 3 at the best rate."
)
LABELS = {"dot": "dot product", "stable": "StableAtten"}


def small() -> Table:
    table = Table("", "heads", "test accuracy, %", "largest logit", "least entropy, nats")
    for run in log("vision", "small"):
        kwargs = keyword_arguments(run["settings"]["model_kwargs"])
        label = LABELS.get(kwargs.get("attention"), f"`{run['run'].rpartition('-')[0]}`")
        worst = f"{max(run['max_logit']):.0f}", f"{min(run['entropy']):.2f}"
        table.add_row(label, str(kwargs["num_heads"]), f"{run['rows'][-1]['top1']:.1f}", *worst)
    return table


def page() -> Page:
    models = list(grid.MODELS)
    lines = sorted(log("vision", "grid"), key=lambda line: models.index(line["model"]))
    every = markdown(grid.table(lines, CLASSES["cifar10"]))
    text = "Seed 1 alone. Entropy is at most log(17) = 2.83. `wn_b`, of imagenet1k.sh, has two epochs, the others one."
    return Page(
        "Vision: every table",
        "CIFAR-10, a ViT of 8 blocks and width 64.",
        [
            Section("The grid", every, "Test accuracy in %, seeds 1 / 2 / 3.", ("grid.jsonl",), "grid.png"),
            Section("Heads and attention", markdown(small()), text, ("small.jsonl",)),
            Section(
                "Fine-tuning", markdown(fine_tune.table(log("vision", "fine_tune"))), FINE_TUNED, ("fine_tune.jsonl",)
            ),
        ],
    )
