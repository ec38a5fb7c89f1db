"""Tables of the docs that a command prints."""


def table(*rows: tuple, align: str = "---:") -> str:
    """Markdown; the first row is the head, and numbers, such as millions, get two digits. `align` is of all but the first."""
    text = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    text.insert(1, ["---", *[align] * (len(rows[0]) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in text)
