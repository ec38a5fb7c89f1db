"""The tables of this recipe, for `python -m recipes.tables`."""

from recipes.tables import Page, Section, log, markdown
from recipes.vision import grid

from . import collapse, run
from .experiments import EXPERIMENTS

TITLES = {
    "translation": "a, b, c: translation, 18L-18L",
    "speech": "b, c: speech",
    "depth": "d: depth, 100L-100L",
    "simclr": "f: SimCLR at five times the learning rate",
    "sn_wn": "c: spectral norm and weight norm in ViT",
    "lars": "e: LARS, no LayerNorm, no warm-up, no weight decay",
    "parts": "g: the parts of Stable-Transformer, no warm-up",
    "blocks_200": "g: 200 blocks",
}
CLASSES = 10


def section(name: str, title: str) -> Section:
    lines, experiment = log("evidence", name), EXPERIMENTS.get(name)
    table = run.table(experiment, lines) if experiment else grid.table(lines, CLASSES)
    text = "" if experiment else "Test accuracy in %."
    return Section(title, markdown(table), text, (f"{name}.jsonl",), f"{name}.png")


def page() -> Page:
    runs = collapse.runs()
    first = Section("a: which comes first?", markdown(collapse.table(runs)), f"{collapse.summary(runs)}.")
    return Page(
        "Evidence: every table",
        "Cells of three figures are seeds 1 / 2 / 3. Least entropy is the mean over heads in the layer and at the update where "
        "it is least. Below half: the first record in which it is.",
        [first, *(section(*each) for each in TITLES.items())],
    )
