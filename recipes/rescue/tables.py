"""The tables of this recipe, for `python -m recipes.tables`, and the one that its README has."""

from pathlib import Path

from recipes.tables import Page, Section, log, markdown

from . import run, switch

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "gpt": "GPT of characters",
    "gpt2": "GPT-2",
    "translation": "Translation, 18L-18L",
    "vit96": "ViT of width 96",
    "vit": "ViT of width 64",
}
IN_SHORT = ("go_on", "half", "qk_clip", "rescue")


def names() -> list[str]:
    """Of the logs of `recipes.rescue.run`, a training's main one first."""
    there = {path.stem for path in RESULTS.glob("*.jsonl") if path.with_suffix(".png").exists()}
    return [name for kind in TITLES for name in sorted(there) if name == kind or name.startswith(f"{kind}_")]


def in_short() -> str:
    """Markdown, for the README: losses at the end of four remedies, each training from its main log."""
    found = ["| | go on | half the rate | QK-clip at 30 | rescue |", "|---|---|---|---|---|"]
    for kind, title in TITLES.items():
        lines = sorted(log("rescue", kind), key=lambda line: line["seed"])
        cells = (" / ".join(f"{line['eval_end']:.3f}" for line in lines if line["remedy"] == one) for one in IN_SHORT)
        found.append(f"| {title}, {lines[0]['lr']:g} | {' | '.join(cells)} |")
    return "\n".join(found)


def remedies(name: str) -> Section:
    lines = log("rescue", name)
    title = f"{TITLES[name.partition('_')[0]]} at {lines[0]['lr']:g}, from update {lines[0]['at']}"
    return Section(title, markdown(run.table(lines)), logs=(f"{name}.jsonl",), picture=f"{name}.png")


def switches() -> Section:
    rows = [switch.row(stack, log("rescue", f"switch_{stack}")) for stack in switch.STACKS]
    rates = ", ".join(f"{stack} {settings.lr:g}" for stack, settings in switch.STACKS.items())
    text = f"Each stack's own command, from the start; fairseq's loss is in bits, labels smoothed. The full rates: {rates}."
    logs = tuple(f"switch_{stack}.jsonl" for stack in switch.STACKS)
    return Section("The switch in each stack", "\n".join([switch.HEAD, *rows]), text, logs)


def page() -> Page:
    return Page(
        "Every remedy, every log",
        "Validation loss in nats, seeds 1 / 2 / 3. Least entropy is that of the median head in the layer that attends to "
        "least, as a part of log(keys).",
        [*map(remedies, names()), switches()],
    )
