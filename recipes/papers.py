"""Every table and figure of both papers, its commands and what ran small: `python -m recipes.papers` writes README.md here."""

from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_suffix(".txt")
README = Path(__file__).with_name("README.md")
HEAD = """# Every table and figure of both papers: recipe, command, status

**None was run in full here.** The last column links what ran small, with logs (`SMALL=1`, on a CPU); "no log" ran too, "never"
did not. Written by `python -m recipes.papers`.

`DATA_DIR` names ImageNet's folder (`train/`, `val/`), `NANOGPT_DIR` a checkout of nanoGPT. `SMALL=1` gets its data by itself,
without a network from installed packages (none for speech), or from `STABLE_DATA`, a folder of yours with
`mt/{train,valid,test}.{en,de}`, `lm/{train,valid,test}.txt` (a sentence a line, a blank line between documents) and
`asr/manifest.tsv` (columns split, path, text).

The head of each script lists its variants; `DRY_RUN=1` shows the commands of most. Options that follow win over the recipe's;
such a run needs a folder of its own (`--save-dir`, `--output`, `--out_dir`), or the run that is there is taken for it. ST's
Figure 5 is a drawing, its Figure 12 not in our copy, and its Tables 1 to 3 are [counted](../benchmarks/results/parameters.md)
or settings, which tests hold the recipes to.
"""


@dataclass(frozen=True)
class Row:
    what: str
    commands: tuple[str, ...]
    small: str


def papers() -> dict[str, list[Row]]:
    """Of each paper, by its name, the rows of papers.txt."""
    found: dict[str, list[Row]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            rows = found[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            what, commands, small = line.split(" | ")
            rows.append(Row(what, tuple(commands.split("; ")), small))
    return found


def page() -> str:
    """In Markdown."""
    parts = [HEAD]
    for name, rows in papers().items():
        parts.append(f"## {name}\n| what | command | small |\n|---|---|---|")
        parts += [f"| {row.what} | {'; '.join(f'`{one}`' for one in row.commands)} | {row.small} |" for row in rows]
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
    print(f"wrote {README}")
