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
COMMAND = "By `python -m recipes.vision.grid --output OUT {}`. Test accuracy in %."
GRIDS = {
    "sn_wn": "--models vit sn wn wn_preln sigma sigma_preln --warmups 0.25",
    "lars": "--models vit sigma --opt lars --weight-decay 0 --lrs 1.6 6.4 --warmups 0",
    "parts": "--models vit stable_init stable_norm stable_atten stable --lrs 1e-2 3e-2 --warmups 0",
    "blocks_200": "--models vit stable --depth 200 --batches 32 --lrs 1e-3 --warmups 0 --data digits --epochs 5",
}


def section(name: str, title: str) -> Section:
    lines, experiment = log("evidence", name), EXPERIMENTS.get(name)
    table = run.table(experiment, lines) if experiment else grid.table(lines, CLASSES)
    text = f"By `python -m recipes.evidence.run {name}`." if experiment else COMMAND.format(GRIDS[name])
    return Section(title, markdown(table), text, (f"{name}.jsonl",), f"{name}.png")


def page() -> Page:
    runs = collapse.runs()
    text = f"{collapse.summary(runs)}. By `python -m recipes.evidence.collapse`."
    first = Section("a: which comes first?", markdown(collapse.table(runs)), text)
    return Page(
        "Evidence: every table",
        "Cells of three figures are seeds 1 / 2 / 3. Least entropy is the mean over heads in the layer and at the update where "
        "it is least. Below half: the first record in which it is.",
        [first, *(section(*each) for each in TITLES.items())],
    )
