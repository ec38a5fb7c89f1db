"""recipes.tables: the committed pages are those of the committed logs."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest
from rich.table import Table

from recipes import tables

RECIPES = Path(tables.__file__).parent
PAGES = {name: RECIPES / name / "results" / "tables.md" for name in tables.NAMES}


@pytest.mark.parametrize("name", tables.NAMES)
def test_a_page_is_that_of_the_logs_and_what_it_names_is_there(name):
    page = PAGES[name].read_text()
    assert tables.written(name) == page
    for section in import_module(f"recipes.{name}.tables").page().sections:
        assert all((PAGES[name].parent / file).is_file() for file in (*section.logs, section.picture) if file)


def test_every_page_has_its_recipe():
    assert set(RECIPES.glob("*/results/tables.md")) == set(PAGES.values())


def test_the_command_writes_the_pages_of_the_recipes_that_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RECIPES", tmp_path)
    written = tmp_path / "simclr" / "results" / "tables.md"
    written.parent.mkdir(parents=True)
    shutil.copy(PAGES["simclr"].with_name("small.jsonl"), written.parent)
    assert tables.main(["simclr"]) == 0
    assert written.read_text() == PAGES["simclr"].read_text() and capsys.readouterr().out == f"wrote {written}\n"


def test_a_table_of_the_terminal_becomes_markdown():
    table = Table("", "|a|")
    table.add_row("x", "1 / 2")
    assert tables.markdown(table) == "|  | \\|a\\| |\n| --- | --- |\n| x | 1 / 2 |"
