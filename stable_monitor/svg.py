"""The report's panels as inline SVG, whose colours the page's style sheet chooses, for light and dark."""

import base64
import io
from html import escape

import numpy as np
from matplotlib import colormaps
from PIL import Image

from .axis import Axis, evenly
from .layout import Line, Panel, Row, alt

WIDTH, HEIGHT = 400, 190  # units of the drawing, a pixel each on a page of three columns
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 8, 22
RUN_COLORS = (
    "#1f77b4",
    "#e07000",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#d64fb0",
    "#7f7f7f",
    "#9a9a00",
    "#14a5b8",
)
MANY = 24  # layers, from which curves are thinner
LEVELS = 128  # colours of a heat map


def depth_colors(depth: float) -> tuple[str, str]:
    """The colours of a layer, on white and on black; deeper layers, up to 1, are lighter."""
    light = colormaps["viridis"](0.93 * depth)  # yellow is hard to see on white, and dark blue on black
    dark = colormaps["viridis"](0.35 + 0.65 * depth)
    return hexadecimal(light), hexadecimal(dark)


def hexadecimal(color: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color[:3])


def run_color(line: Line) -> str:
    return RUN_COLORS[int(line.place) % len(RUN_COLORS)]


def heat_colors(count: int) -> list[str]:
    return [hexadecimal(color) for color in colormaps["magma"](np.linspace(0, 1, count))]


def panel_svg(row: Row, panel: Panel, span: tuple[int, int]) -> str:
    axis = Axis("linear", -0.5, panel.depth - 0.5, []) if panel.heat is not None else row.axis
    if panel.heat is not None:
        axis = axis._replace(ticks=evenly(0, panel.depth - 1, 4, whole=True))
    parts = [frame(axis, span)]
    if panel.heat is not None:
        parts.append(heat_image(row.axis, panel.heat))
    for step, style in panel.marked:
        x = across(np.array([step]), span)[0]
        parts.append(f'<path class="{style.replace(" ", "-")}" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    parts += [drawn(line, row.axis, span) for line in panel.lines]
    if not panel.lines and panel.heat is None:
        parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">not recorded</text>')
    label = escape(alt(row, panel), quote=True)
    many = ' class="many"' if panel.depth > MANY else ""
    return (
        f'<svg{many} viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{label}">{"".join(parts)}</svg>'
    )


def across(steps: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    first, last = span
    part = (steps - first) / (last - first) if last > first else np.full(len(steps), 0.5)
    return LEFT + 4 + part * (WIDTH - LEFT - RIGHT - 8)


def up(values: np.ndarray, axis: Axis) -> np.ndarray:
    return HEIGHT - BOTTOM - axis.place(values) * (HEIGHT - TOP - BOTTOM)


def frame(axis: Axis, span: tuple[int, int]) -> str:
    """The grid, with numbers beside it."""
    lines, texts = [], []
    for tick, y in zip(axis.ticks, up(np.array(axis.ticks), axis), strict=True):
        lines.append(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}")
        texts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    ticks = np.array(evenly(*span, 4, whole=True) if span[0] < span[1] else [span[0]])
    for tick, x in zip(ticks, across(ticks, span), strict=True):
        lines.append(f"M{x:.1f} {TOP}V{HEIGHT - BOTTOM}")
        anchor = "end" if x > WIDTH - 40 else "middle"
        texts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{tick:,.0f}</text>')
    return f'<path class="grid" d="{"".join(lines)}"/>{"".join(texts)}'


def drawn(line: Line, axis: Axis, span: tuple[int, int]) -> str:
    x = across(line.x, span)
    if line.style == "lost":  # on the lower edge
        y = np.full(len(x), float(HEIGHT - BOTTOM))
    else:
        positive = line.y[line.y > 0]
        least = positive.min() if len(positive) else 1
        y = up(
            line.y.clip(least) if axis.kind == "log" else line.y, axis
        )  # a zero is drawn at the least positive value
    name = escape(line.id, quote=True)
    if line.style in ("alarm", "lost"):
        marks = "".join(f"M{a - 3:.1f} {b - 3:.1f}l6 6m-6 0l6 -6" for a, b in zip(x, y, strict=True))
        return f'<path class="{line.style}" id="{name}" d="{marks}"/>'
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    if len(points) == 1:
        points *= 2  # which round ends make a dot
    color = ""
    if line.style == "layer":
        light, dark = depth_colors(line.place)
        color = f' stroke="{light}" style="stroke:light-dark({light},{dark})"'
    elif line.style.startswith("run"):
        color = f' stroke="{run_color(line)}"'
    kind = line.style.replace(" ", "-") + (" dot" if len(x) == 1 else "")
    return f'<path class="{kind}" id="{name}"{color} d="M{" ".join(points)}"/>'


def heat_image(axis: Axis, grid: np.ndarray) -> str:
    """A heat map as a picture, the first layer at the bottom."""
    level = np.where(np.isnan(grid), 0, 1 + axis.place(grid).clip(0, 1) * (LEVELS - 2)).astype(np.uint8)
    image = Image.fromarray(level[::-1])
    image.putpalette([127, 127, 127, *bytes.fromhex("".join(heat_colors(LEVELS - 1)).replace("#", ""))])
    file = io.BytesIO()
    image.save(file, "png", transparency=0)
    data = base64.b64encode(file.getvalue()).decode()
    left = LEFT + 4
    size = f'x="{left}" y="{TOP}" width="{WIDTH - RIGHT - 4 - left}" height="{HEIGHT - TOP - BOTTOM}"'
    return f'<image {size} preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
