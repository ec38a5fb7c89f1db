"""Writes results/tables.md, all tables of this recipe, from its logs."""

import json
from pathlib import Path
from typing import Any

from .run import rows

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "gpt": "GPT of characters",
    "gpt2": "GPT-2",
    "translation": "Translation, 18L-18L",
    "vit96": "ViT of width 96",
    "vit": "ViT of width 64",
}
IN_SHORT = ("go_on", "half", "qk_clip", "rescue")


def log(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def names() -> list[str]:
    """Of the logs of `recipes.rescue.run`, a training's main one first."""
    there = {path.stem for path in RESULTS.glob("*.jsonl") if path.with_suffix(".png").exists()}
    return [name for kind in TITLES for name in sorted(there) if name == kind or name.startswith(f"{kind}_")]


def in_short() -> str:
    """Markdown, for the README: losses at the end of four remedies, each training from its main log."""
    found = ["| | go on | half the rate | QK-clip at 30 | rescue |", "|---|---|---|---|---|"]
    for kind, title in TITLES.items():
        lines = sorted(log(kind), key=lambda line: line["seed"])
        cells = (" / ".join(f"{line['eval_end']:.3f}" for line in lines if line["remedy"] == one) for one in IN_SHORT)
        found.append(f"| {title}, {lines[0]['lr']:g} | {' | '.join(cells)} |")
    return "\n".join(found)


def tables() -> str:
    found = [
        "# Every remedy, every log",
        "",
        "Written by `python -m recipes.rescue.tables`. Validation loss in nats, seeds 1 / 2 / 3. Least entropy is that of the",
        "median head in the layer that attends to least, as a part of log(keys).",
    ]
    for name in names():
        lines = log(name)
        head, kind = lines[0], name.partition("_")[0]
        found += [
            *("", f"## {TITLES[kind]} at {head['lr']:g}, from update {head['at']}", ""),
            f"| | after the change | {head['after']} updates later | least entropy / log(keys) |",
            *("|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows(lines)), ""),
            f"Log: [{name}.jsonl]({name}.jsonl).",
            *("", f"![Training loss and least entropy after each remedy]({name}.png)"),
        ]
    return "\n".join(found) + "\n"


def main() -> None:
    (RESULTS / "tables.md").write_text(tables())
    print(f"{in_short()}\ntables: {RESULTS / 'tables.md'}")


if __name__ == "__main__":
    main()
