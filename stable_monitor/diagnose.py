"""`python -m stable_monitor.diagnose RUN [RUN ...]`: what became of each monitored run, and what to do about it.

RUN is a directory that holds `monitor.jsonl`, or such a file. The exit status is 0 where all runs are healthy, 3 where one is
not, and 1 where one cannot be read. With --json a line of JSON a run: run, verdict, step, layer, why, remedy, guide.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from .records import FILE_NAME, Run
from .remedies import remedy
from .verdicts import Examination, Verdict

PROG = "python -m stable_monitor.diagnose"


def diagnose(run: Path) -> tuple[Verdict, tuple[str, str]]:
    """The verdict of a run, and its remedy.

    Raises:
        OSError, ValueError: the run cannot be read.
    """
    examination, stack = Examination(), ""
    for record in Run.stream(str(run), run).records:
        examination.look(record)
        stack = record.get("stack", "")
    verdict = examination.verdict()
    return verdict, remedy(verdict.verdict, stack, verdict.rescues)


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"directory with {FILE_NAME}, or such a file")
    parser.add_argument("--json", action="store_true", help="a line of JSON a run")
    args = parser.parse_args(argv)
    status = 0
    for run in args.runs:
        try:
            verdict, (what, guide) = diagnose(run)
        except (OSError, ValueError) as error:
            print(f"diagnose: {error}", file=sys.stderr)
            status = 1
            continue
        if args.json:
            print(json.dumps({"run": str(run), **asdict(verdict), "remedy": what, "guide": guide}), flush=True)
        else:
            print(f"{run}: {verdict}" + (f"\n  try: {what}\n  more: {guide}" if what else ""), flush=True)
        if verdict.verdict != "healthy" and status == 0:
            status = 3
    return status


if __name__ == "__main__":
    sys.exit(main())
