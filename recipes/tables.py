"""Writes results/tables.md, a recipe's tables from its logs: `python -m recipes.tables`, or with the names of recipes after it.

A recipe that has such a page has a tables.py, whose `page()` is what goes there.
"""

import json
import textwrap
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from recipes.command import command

RECIPES = Path(__file__).parent
NAMES = tuple(sorted(path.parent.name for path in RECIPES.glob("*/tables.py")))


@dataclass(frozen=True)
class Section:
    title: str
    table: str  # Markdown
    text: str = ""
    logs: tuple[str, ...] = ()  # files in results/
    picture: str = ""  # likewise


@dataclass(frozen=True)
class Page:
    title: str
    text: str
    sections: list[Section]


@dataclass(frozen=True)
class Settings:
    recipes: tyro.conf.Positional[tuple[Literal[*NAMES], ...]] = NAMES


def log(recipe: str, name: str) -> list[dict[str, Any]]:
    """The lines of results/NAME.jsonl."""
    return [json.loads(line) for line in (RECIPES / recipe / "results" / f"{name}.jsonl").read_text().splitlines()]


def markdown(table: Table) -> str:
    """What a command prints in the terminal."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = ([column.header for column in table.columns], ["---"] * len(table.columns), *rows)
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def written(name: str) -> str:
    """The page of a recipe."""
    page = import_module(f"recipes.{name}.tables").page()
    parts = [f"# {page.title}", paragraph(f"Written by `python -m recipes.tables`. {page.text}")]
    for section in page.sections:
        links = ", ".join(f"[{log}]({log})" for log in section.logs)
        parts += [f"## {section.title}", paragraph(section.text), section.table.strip()]
        parts += [paragraph(f"Log: {links}.")] * bool(links)
        parts += [f"![{section.title}]({section.picture})"] * bool(section.picture)
    return "\n\n".join(filter(None, parts)) + "\n"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 128, break_long_words=False, break_on_hyphens=False)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.tables", description=__doc__)
    for name in settings.recipes:
        path = RECIPES / name / "results" / "tables.md"
        path.write_text(written(name))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    command(main)
