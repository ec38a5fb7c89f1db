"""Writes results/tables.md, all tables of this recipe, from its logs: `python -m recipes.evidence.tables`."""

import json
from pathlib import Path

from rich.table import Table

from recipes.vision import grid

from . import collapse, run
from .experiments import EXPERIMENTS

RESULTS = Path(__file__).parent / "results"
OF_GRIDS = {
    "sn_wn": "c: spectral norm and weight norm in ViT",
    "lars": "e: LARS, no LayerNorm, no warm-up, no weight decay",
    "parts": "g: the parts of Stable-Transformer, no warm-up",
    "blocks_200": "g: 200 blocks",
}
OF_RUNS = {
    "translation": "a, b, c: translation, 18L-18L",
    "speech": "b, c: speech",
    "depth": "d: depth, 100L-100L",
    "simclr": "f: SimCLR at five times the learning rate",
}
CLASSES = 10


def log(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def markdown(headers: list[str], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, ["---"] * len(headers), *rows))


def of(table: Table, rows: list[tuple[str, ...]]) -> str:
    """With the headers of the command's own table."""
    return markdown([str(column.header) for column in table.columns], rows)


def tables() -> str:
    turned = [each for each in collapse.runs() if collapse.turned(each) is not None]
    headers = ["", "entropy below half at update", "loss 0.4 nats up at", "at the end, nats up", "least entropy"]
    found = [
        "# Evidence: every table",
        "",
        "Written by `python -m recipes.evidence.tables`. Cells of three figures are seeds 1 / 2 / 3. Least entropy is the mean",
        "over heads in the layer and at the update where it is least. Below half: the first record in which it is.",
        *("", "## a: which comes first?", "", f"{collapse.summary(collapse.runs())}.", ""),
        markdown(headers, [collapse.row(each) for each in turned]),
    ]
    for name, title in {**OF_RUNS, **OF_GRIDS}.items():
        lines = log(name)
        if name in EXPERIMENTS:
            text = of(run.table(EXPERIMENTS[name], lines), run.rows(EXPERIMENTS[name], lines))
        else:
            text = "Test accuracy in %.\n\n" + of(grid.table(lines, CLASSES), grid.rows(lines, CLASSES))
        found += ["", f"## {title}", "", text, "", f"Log: [{name}.jsonl]({name}.jsonl).", "", f"![{title}]({name}.png)"]
    return "\n".join(found) + "\n"


def main() -> None:
    (RESULTS / "tables.md").write_text(tables())
    print(f"wrote {RESULTS / 'tables.md'}")


if __name__ == "__main__":
    main()
