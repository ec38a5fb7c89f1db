"""The sections of the report's page: a figure's heading, its legend, what it leaves out, and its panels."""

from html import escape

from .curves import EVENLY, HEAT_ROWS, OUTERMOST
from .layout import Figure, Row
from .svg import depth_colors, heat_colors, panel_svg, run_color

LEGEND = {  # of the styles of lines and marks
    "validation": "validation",
    "run-validation": "validation",
    "ceiling": "log(keys)",
    "alarm": "alarm",
    "lost": "alarm: not a number",
    "rescue": "rescue",
    "first-alarm": "first alarm",
}
SAMPLE = '<svg viewBox="0 0 26 12" aria-hidden="true"><path class="{}" {} d="{}"/></svg>'


def section(figure: Figure) -> str:
    """A figure: its heading, its legend, what was left out, and its panels."""
    head = f"<h2>{escape(figure.title)}</h2>"
    if not figure.rows:
        return f'<section id="{figure.name}" class="n1">{head}<p>Not recorded.</p></section>'
    is_one_run = all(len(row.panels) == 1 for row in figure.rows)
    groups = [figure.rows] if is_one_run else [[row] for row in figure.rows]
    width = min(3, max(sum(len(row.panels) for row in group) for group in groups))
    blocks = "".join(f'<div class="row">{"".join(panels(row, figure) for row in group)}</div>' for group in groups)
    notes = legend(figure) + "".join(f"<p>{note}</p>" for note in left_out(figure))
    return f'<section id="{figure.name}" class="n{width}">{head}{notes}{blocks}</section>'


def panels(row: Row, figure: Figure) -> str:
    what = escape(row.label if figure.name == "loss" else f"{row.label} · {row.kind}")
    return "".join(
        f"<figure><h3>{what} <span>{escape('' if row.across else panel.run)}</span></h3>"
        f"{panel_svg(row, panel, figure.span)}{scale(row) if panel.heat is not None else ''}</figure>"
        for panel in row.panels
    )


def scale(row: Row) -> str:
    """The legend of a heat map's colours."""
    low, high = (f"{x:.3g}" for x in (row.axis.low, row.axis.high))
    kind = {"linear": "", "log": ", logarithmic", "symlog": ", logarithmic above 1"}[row.axis.kind]
    colors = ",".join(heat_colors(9))
    return f'<div class="legend"><span>{low}<i style="background:linear-gradient(90deg,{colors})"></i>{high}{kind}</span></div>'


def legend(figure: Figure) -> str:
    lines = [line for row in figure.rows for panel in row.panels for line in panel.lines]
    styles = [line.style.replace(" ", "-") for line in lines]
    styles += [style.replace(" ", "-") for row in figure.rows for panel in row.panels for _, style in panel.marked]
    entries = [
        SAMPLE.format("run", f'stroke="{run_color(line)}"', "M0 6H26") + escape(line.name)
        for line in lines
        if line.style == "run"
    ]
    shown: set[str] = set()
    for style, text in LEGEND.items():
        if style in styles and text not in shown:
            shown.add(text)
            shape = {"alarm": "M10 3l6 6m-6 0l6 -6", "lost": "M10 3l6 6m-6 0l6 -6"}.get(style, "M0 6H26")
            entries.append(SAMPLE.format(style, "", shape) + text)
    depth = max((panel.depth for row in figure.rows for panel in row.panels if panel.heat is None), default=0)
    if depth > 1:
        colors = ",".join("light-dark({},{})".format(*depth_colors(place / 8)) for place in range(9))
        entries.append(f'layer 0<i style="background:linear-gradient(90deg,{colors})"></i>{depth - 1:,}')
    return f'<ul class="legend">{"".join(f"<li>{entry}</li>" for entry in entries)}</ul>' if entries else ""


def left_out(figure: Figure) -> list[str]:
    """What a figure does not show, in words."""
    notes = []
    every = [panel for row in figure.rows for panel in row.panels]
    if any(panel.left_out for panel in every):
        most = max(every, key=lambda panel: panel.left_out)
        notes.append(
            f"{most.depth - most.left_out:,} of {most.depth:,} layers: {EVENLY} evenly spread, and in each panel the "
            f'{OUTERMOST} with the least and the {OUTERMOST} with the largest values; <a href="#heat">all in heat maps</a>.'
        )
    if any(panel.heat is not None and panel.depth > HEAT_ROWS for panel in every):
        notes.append(
            f"Neighbouring layers share one of {HEAT_ROWS} rows, which shows the least entropy, the largest logit and the "
            "largest gradient of them."
        )
    return notes
