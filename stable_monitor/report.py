"""`python -m stable_monitor.report RUN [RUN ...] -o report.html`: the records of monitored runs, side by side on one page.

RUN is a directory that holds `monitor.jsonl`, or such a file. The page needs no network: its figures are inline SVG. PNG files
of the same figures are written beside it. Records are read one after another, and drawn as far as pixels can show them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stable_core.extras import extra

from .page import PAGE
from .records import FILE_NAME, Run, in_words
from .remedies import remedy
from .verdicts import Examination, Verdict

with extra("monitor"):
    import numpy as np

    from .curves import mean_entropy, validation_loss
    from .layout import figures
    from .plots import draw
    from .sections import section

PROG = "python -m stable_monitor.report"
RESCUED = ("entropy", "queries", "keys")
ALARM_ROWS = 1000  # the most alarms in the table


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


def table(head: list[str], rows: list[list[Any]], caption: str) -> str:
    """A table that scrolls by itself where it is wide or long, by keys too; the first cell of a row is its head."""
    lines = [
        f"<tr><th scope=row>{escape(str(first))}</th>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>"
        for first, *row in rows
    ]
    heads = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    whole = f"<table><thead><tr>{heads}</tr></thead>\n<tbody>" + "\n".join(lines) + "</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">{whole}</div>'


def last_number(known: tuple[int, float] | None, last: int) -> str:
    """The last (step, loss) as text, with its step unless that is the `last` of all."""
    if known is None:
        return "not recorded"
    step, loss = known
    return f"{loss:.4g}" + ("" if step == last else f" at {step}, none since")


def last_loss(run: Run) -> str:
    return last_number(run.columns.last_loss, run.columns.span[1])


def last_validation(run: Run) -> str:
    found = [(line["step"], loss) for line in run.validations if (loss := validation_loss(line)) is not None]
    return last_number(found[-1], run.validations[-1]["step"]) if found else "not recorded"


def least_entropy_of_all(run: Run) -> str:
    """The layer with the smallest mean entropy in any record, as text."""
    found = run.columns.of_layers.get("entropy")
    if found is None:
        return "not recorded"
    row, column = map(int, np.unravel_index(np.nanargmin(found.values), found.values.shape))
    step = found.steps[row, min(column, found.steps.shape[1] - 1)]
    return f"{list(run.columns.kinds)[column]}: {found.values[row, column]:.3g} nats at {step}"


def least_entropy(run: Run) -> str:
    """The layer with the smallest mean entropy in the last record, as text; a NaN counts as the smallest."""
    entropies = [
        (-1 if value is None else value, f"{name}: {in_words(value, ' nats')}")
        for name, layer in run.columns.last["layers"].items()
        if layer.get("entropy") and layer.get("keys", 0) is not None
        for value in [mean_entropy(layer)]
    ]
    return min(entropies)[1] if entropies else "not recorded"


def summary(runs: list[Run]) -> str:
    head = ["run", "records", "updates", "last loss", "last validation loss"]
    head += ["least mean entropy of the run", "and at the end", "alarms"]
    rows = []
    for run in runs:
        steps = "{} to {}".format(*run.columns.span)
        alarms = f"{len(run.alarms)}, the first at {run.alarms[0]['step']}" if run.alarms else "none"
        entropies = least_entropy_of_all(run), least_entropy(run)
        rows.append([run.name, run.columns.records, steps, last_loss(run), last_validation(run), *entropies, alarms])
    return table(head, rows, "Summary")


def pace(run: Run) -> str:
    """How fast the run went, and the monitor's part of its time, of records that say so."""
    if run.columns.pace is None:
        return ""
    speed, own = run.columns.pace
    return f"<br>{speed:.3g} updates/s; the monitor takes {100 * own:.3g} % of the time"


def verdict_section(runs: list[Run], verdicts: list[Verdict]) -> str:
    """What became of each run, and what to try."""
    items = []
    for run, verdict in zip(runs, verdicts, strict=True):
        what, guide = remedy(verdict.verdict, run.columns.last.get("stack", ""), verdict.rescues)
        more = f"<br>Try: <code>{escape(what)}</code><br>More: {escape(guide)}" if what else ""
        items.append(f"<li><strong>{escape(run.name)}</strong>: {escape(str(verdict))}{more}{pace(run)}</li>")
    healthy = sum(verdict.verdict == "healthy" for verdict in verdicts)
    head = f"<h2>{healthy} of {len(runs)} runs healthy</h2>"
    return f'<section id="verdict">{head}<ul class="scroll" tabindex="0" aria-label="Verdicts">{"".join(items)}</ul></section>'


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
        f"{table(head, rows[:ALARM_ROWS], 'Alarms')}{more}</details>"
    )


def rescue_section(runs: list[Run]) -> str:
    rows = [
        [run.name, rescue["step"], rescue["layer"], *(" → ".join(map(in_words, rescue[key])) for key in RESCUED)]
        for run in runs
        for rescue in run.rescues
    ]
    head = ["run", "after update", "layer", "entropy (nats)", "norm of W_q", "norm of W_k"]
    if not rows:
        return ""
    return f'<details id="rescues" open><summary>Rescues</summary>{table(head, rows, "Rescues")}</details>'


def thinned_note(runs: list[Run]) -> str:
    """What was left out of long runs."""
    found = [series for run in runs for series in (*run.columns.of_model.values(), *run.columns.of_layers.values())]
    widest = max((series.interval for series in found), default=0)
    if not widest:
        return ""
    return f"<p>Of long runs, the least and the largest value in every {widest:,} updates or fewer are drawn.</p>"


def report(
    paths: list[Path], out: Path, written: Callable[[Path], None] = lambda path: None, reload: int | None = None
) -> None:
    """Writes the page to `out` and `<out's stem>_<figure>.png` beside it; calls `written` with each file, the page last.

    A browser loads the page anew every `reload` seconds.

    Raises:
        ValueError, OSError: a run cannot be read, or `out` cannot be written; one line that names the file.
    """
    if out.suffix != ".html":
        raise ValueError(f"{out}: the page's name must end in .html")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}")
    runs = [Run.stream(name, path) for name, path in zip(unique_names(paths), paths, strict=True)]
    examinations = [Examination() for _ in runs]
    for run, examination in zip(runs, examinations, strict=True):
        run.collect(examination.look)
    verdicts = [examination.verdict() for examination in examinations]
    sections, links = [], []
    for figure in figures(runs):
        links.append(f'<a href="#{figure.name}">{escape(figure.title)}</a>')
        sections.append(section(figure))
        if figure.rows:
            png = out.with_name(f"{out.stem}_{figure.name}.png")
            draw(figure, png)
            written(png)
            link = f'<p><a href="{quote(png.name)}">{escape(png.name)}</a></p></section>'
            sections[-1] = sections[-1].removesuffix("</section>") + link
    page = PAGE.format(
        title=escape("Training of " + ", ".join(run.name for run in runs)),
        summary=verdict_section(runs, verdicts)
        + summary(runs)
        + thinned_note(runs)
        + alarm_section(runs)
        + rescue_section(runs),
        links="".join(links),
        sections="\n".join(sections),
        reload="" if reload is None else f'<meta http-equiv="refresh" content="{reload}">',
    )
    out.write_text(page, encoding="utf-8")
    written(out)


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0].replace(PROG, prog))
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"directory with {FILE_NAME}, or such a file")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    parser.add_argument("--watch", type=int, metavar="SECONDS", help="write it anew every so often, until Ctrl-C")
    args = parser.parse_args(argv)
    if args.watch is not None and args.watch < 1:
        parser.error(f"argument --watch: {args.watch}: allowed are whole numbers from 1")
    if args.watch is not None:
        watch(args.runs, args.out, args.watch)
    try:
        report(args.runs, args.out, written=lambda path: print(path, flush=True))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


def watch(paths: list[Path], out: Path, seconds: int) -> None:
    """Writes the report every so many seconds, until Ctrl-C; what is wrong is said, and may be right the next time."""
    said = ""
    try:
        while True:
            try:
                report(paths, out, reload=seconds)
            except (OSError, ValueError) as error:
                if str(error) != said:
                    print(f"report: {error}; tried again every {seconds} seconds", file=sys.stderr)
                said = str(error)
            time.sleep(seconds)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    sys.exit(main())
