"""`python -m stable_monitor.report RUN [RUN ...] -o report.html`: the records of monitored runs, side by side on one page.

RUN is a directory that holds `monitor.jsonl`, or such a file. The page needs no network: its figures are inline SVG. PNG files
of the same figures are written beside it.
"""

import argparse
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .curves import FIGURES, Value, mean_entropy, number, validation_loss
from .plots import draw
from .records import FILE_NAME, Run, in_words, load

RESCUED = ("entropy", "queries", "keys")
ALARM_ROWS = 1000  # the most alarms in the table
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px/1.45 "DejaVu Sans", Verdana, sans-serif; color: #222; margin: 1.5em 2em; }}
h1 {{ font-size: 20px; margin: 0 0 .6em; }}
nav {{ margin: 1em 0; }}
a {{ color: #2457a6; margin-right: 1em; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .25em 1.2em .25em 0; border-bottom: 1px solid #ddd; }}
th {{ position: sticky; top: 0; background: #fff; }}
.scroll {{ max-height: 22em; overflow: auto; width: fit-content; max-width: 100%; }}
details {{ margin-top: 1.2em; }}
summary {{ font-weight: bold; cursor: pointer; }}
figure {{ margin: 1.6em 0 0; overflow-x: auto; }}
.hot {{ stroke: #e6007e !important; stroke-width: 2.5 !important; }}
#name {{ position: fixed; padding: .1em .5em; background: #222; color: #fff; pointer-events: none; display: none; }}
</style>
<h1>{title}</h1>
{summary}
<nav>{links}</nav>
<p>Lighter curves are deeper layers. Point at a curve for the name of its layer, which lights up in every panel.
{sections}
<div id="name"></div>
<script>
const name = document.getElementById("name"), layers = {{}};
for (const group of document.querySelectorAll('g[id*="/"]')) {{
  const path = group.querySelector(":scope > path");
  if (!path) continue;
  const [run, panel, layer] = group.id.split("/").map(decodeURIComponent);
  group.parentNode.classList.add("panel");
  (group.parentNode.curves ??= []).push({{path, layer, text: `${{layer}} · ${{panel}} · ${{run}}`}});
  (layers[layer] ??= []).push(path);
}}
// How far below or above the point (x, y) the curve passes, in units of the drawing.
function gap(curve, x, y) {{
  const at = curve.points ??= curve.path.getAttribute("d").match(/-?[\\d.]+/g).map(Number);
  if (x < at[0] - 5 || x > at.at(-2) + 5) return Infinity;
  let i = 2;
  while (i < at.length - 2 && at[i] < x) i += 2;
  if (at.length == 2) return Math.abs(at[1] - y);
  const part = Math.min(1, Math.max(0, (x - at[i - 2]) / (at[i] - at[i - 2])));
  return Math.abs(at[i - 1] + part * (at[i + 1] - at[i - 1]) - y);
}}
document.addEventListener("pointermove", event => {{
  for (const path of document.querySelectorAll(".hot")) path.classList.remove("hot");
  const panel = event.target.closest(".panel");
  let nearest = null, least = 10;
  if (panel) {{
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(panel.getScreenCTM().inverse());
    for (const curve of panel.curves) {{
      const distance = gap(curve, point.x, point.y);
      if (distance < least) [nearest, least] = [curve, distance];
    }}
  }}
  name.style.display = nearest ? "block" : "none";
  if (!nearest) return;
  for (const path of layers[nearest.layer]) {{
    path.classList.add("hot");
    path.parentNode.parentNode.append(path.parentNode);  // in front of the others
  }}
  name.textContent = nearest.text;
  name.style.left = `${{Math.min(event.clientX + 14, innerWidth - name.offsetWidth - 5)}}px`;
  name.style.top = `${{event.clientY + 14}}px`;
}});
</script>
"""


def unique_names(paths: list[Path]) -> list[str]:
    """The name of each run's directory, with as many parent directories as make all names differ.

    Raises:
        ValueError: the same run is given twice.
    """
    parts = [(path.parent if path.name == FILE_NAME else path).absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same run is given twice: {', '.join(map(str, paths))}")


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>\n" + "\n".join(lines) + "</table>"


def last_loss(lines: list[dict[str, Any]], loss: Value) -> str:
    """The last finite loss as text, with its step unless that is the last."""
    for line in reversed(lines):
        if (known := loss(line)) is not None:
            since = "" if line is lines[-1] else f" at {line['step']}, none since"
            return f"{known:.4g}{since}"
    return "not recorded"


def least_entropy(run: Run) -> str:
    """The layer with the smallest mean entropy in the last record, as text; a NaN counts as the smallest."""
    entropies = [
        (-1 if value is None else value, f"{name}: {in_words(value, ' nats')}")
        for name, layer in run.records[-1]["layers"].items()
        if layer.get("entropy") and layer.get("keys", 0) is not None
        for value in [mean_entropy(layer)]
    ]
    return min(entropies)[1] if entropies else "not recorded"


def summary(runs: list[Run]) -> str:
    head = ["run", "records", "updates", "last loss", "last validation loss", "least mean entropy at the end", "alarms"]
    rows = []
    for run in runs:
        steps = f"{run.records[0]['step']} to {run.records[-1]['step']}"
        alarms = f"{len(run.alarms)}, the first at {run.alarms[0]['step']}" if run.alarms else "none"
        losses = last_loss(run.records, number("loss")), last_loss(run.validations, validation_loss)
        rows.append([run.name, len(run.records), steps, *losses, least_entropy(run), alarms])
    return table(head, rows)


def alarm_section(runs: list[Run]) -> str:
    rows = [
        [run.name, alarm["step"], alarm["layer"], in_words(alarm.get("entropy")), in_words(alarm.get("threshold"))]
        for run in runs
        for alarm in run.alarms
    ]
    if not rows:
        return ""
    head = ["run", "update", "layer", "entropy (nats)", "threshold (nats)"]
    more = (
        f"<p>The first {ALARM_ROWS} of {len(rows)}; the others are in the runs' {FILE_NAME}."
        if len(rows) > ALARM_ROWS
        else ""
    )
    return (
        f'<details id="alarms" open><summary>Alarms ({len(rows)})</summary>'
        f'<div class="scroll">{table(head, rows[:ALARM_ROWS])}</div>{more}</details>'
    )


def rescue_section(runs: list[Run]) -> str:
    rows = [
        [run.name, rescue["step"], rescue["layer"], *(" → ".join(map(in_words, rescue[key])) for key in RESCUED)]
        for run in runs
        for rescue in run.rescues
    ]
    head = ["run", "after update", "layer", "entropy (nats)", "norm of W_q", "norm of W_k"]
    return f'<details id="rescues" open><summary>Rescues</summary>{table(head, rows)}</details>' if rows else ""


def report(paths: list[Path], out: Path, written: Callable[[Path], None] = lambda path: None) -> None:
    """Writes the page to `out` and `<out's stem>_<figure>.png` beside it; calls `written` with each file, the page last.

    Raises:
        ValueError, OSError: a run cannot be read, or `out` cannot be written; one line that names the file.
    """
    if out.suffix != ".html":
        raise ValueError(f"{out}: the page's name must end in .html")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}")
    runs = [Run(name, *load(path)) for name, path in zip(unique_names(paths), paths, strict=True)]
    sections = [alarm_section(runs), rescue_section(runs)]
    for name, (title, _) in FIGURES.items():
        png = out.with_name(f"{out.stem}_{name}.png")
        svg = draw(name, runs, png)
        if svg is None:
            sections.append(f'<p id="{name}">{title}: not recorded.')
            continue
        written(png)
        link = f'<div><a href="{quote(png.name)}">{escape(png.name)}</a></div>'
        sections.append(f'<figure id="{name}">{svg}{link}</figure>')
    page = PAGE.format(
        title=escape("Training of " + ", ".join(run.name for run in runs)),
        summary=summary(runs),
        links="".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in FIGURES.items()),
        sections="\n".join(sections),
    )
    out.write_text(page, encoding="utf-8")
    written(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stable_monitor.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"directory with {FILE_NAME}, or such a file")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        report(args.runs, args.out, written=lambda path: print(path, flush=True))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
