"""The end of a recipe's page on the site: what each of its scripts says of itself, and the tables of settings that it reads."""

import re
from pathlib import Path

TABLE = re.compile(r"^row <<'TABLE'(?: # (?P<of>[^\n]*))?\n(?P<rows>.*?)^TABLE$", re.MULTILINE | re.DOTALL)


def head(script: str) -> str:
    """The comment at its top, without the marks."""
    lines = script.removeprefix("#!/usr/bin/env bash\n").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def markdown(rows: str) -> str:
    header, *others = ([cell.strip().replace("`", "") for cell in row.split("|")] for row in rows.splitlines())
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *others))


def scripts(folder: Path) -> str:
    """In Markdown, empty for a recipe without scripts."""
    parts = []
    for path in sorted(folder.glob("*.sh")):
        text = path.read_text(encoding="utf-8")
        parts.append(f"### {path.name}\n```text\n{head(text)}\n```")
        parts += [f"{table['of'] or ''}\n\n{markdown(table['rows'])}" for table in TABLE.finditer(text)]
    return "\n\n".join(["\n## The scripts", *parts, ""]) if parts else ""
