"""Reads paper_settings.txt, the table of the papers' settings."""

import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_suffix(".txt")


@dataclass(frozen=True)
class Section:
    """A table of the papers."""

    place: str
    template: str
    """the command, where {} is a column"""
    columns: tuple[str, ...]
    rows: dict[str, tuple[list[str], str]]
    """setting: what each column says, and where it stands"""

    def of(self, column: str) -> dict[str, tuple[str, str]]:
        """setting: (value, place), of the settings that the paper gives."""
        at = self.columns.index(column)
        found = {name: (values[at].strip("()"), place) for name, (values, place) in self.rows.items()}
        return {name: said for name, said in found.items() if said[0] != "-"}


def _section(text: str, number: str) -> Section:
    head, columns, *rows = text.strip().splitlines()
    place, template = re.fullmatch(r"\[(.*?)\] (.*?)(?:, N = .*)?", head).groups()
    columns, settings = tuple(columns.split()), {}
    for row in rows:
        values, where = row.split("|")
        name, *values = values.split()
        if len(values) not in (1, len(columns)) or not where.strip() or name in settings:
            raise ValueError(
                f"{place}, {row}: allowed are a new name, one value or {len(columns)}, and the place behind a bar"
            )
        values = [number if value == "N" else value for value in values * (len(columns) // len(values))]
        settings[name] = values, where.strip()
    return Section(place, template.replace("N", number) if number else template, columns, settings)


def sections() -> list[Section]:
    """All of them; one that is for several numbers N, once for each."""
    found = []
    for text in re.split(r"\n\n+(?=\[)", TABLE.read_text(encoding="utf-8"))[1:]:
        numbers = re.match(r".*, N = ([\d ]+)", text)
        found += [_section(text, number) for number in (numbers[1].split() if numbers else [""])]
    return found
