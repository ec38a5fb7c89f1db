"""`python -m stable_monitor.thin RUN --every 10`: makes the file of a run smaller, by leaving out records.

Every tenth record stays, and so do the first, the last, those with an alarm or a rescue, and all validations. Lines stay as
they are, to the byte; those that `stable_monitor.records.load` leaves out are dropped. What the monitor reads to resume the
alarm is then coarser, too. The new file takes the place of the old one in one step, unless a run has written to that meanwhile.
"""

import argparse
import os
import sys
from pathlib import Path

from .records import FILE_NAME, Records

PROG = "python -m stable_monitor.thin"


def thin(run: str | Path, every: int) -> tuple[int, int]:
    """Thins the file of a run; returns the number of records before and after.

    Raises:
        ValueError, OSError: `every` is below 2; the run cannot be read, or wrote to its file meanwhile.
    """
    if every < 2:
        raise ValueError(f"every = {every}: allowed are whole numbers from 2")
    path = Path(run)
    path = path / FILE_NAME if path.is_dir() else path
    size = path.stat().st_size if path.is_file() else 0  # before it is read: a run may write to it
    records = Records(run)
    new = records.path.with_name(records.path.name + ".thinned")
    before = after = 0
    skipped = False
    waiting: list[bytes] = []  # a record that stays if it is the last, and the validations after it
    try:
        with new.open("wb") as file:
            for line, found in records.lines():
                if "validation" in found:
                    waiting.append(line)
                    continue
                file.writelines(waiting[skipped:])
                stays = bool(before % every == 0 or found["alarms"] or "rescues" in found)
                before, after, skipped = before + 1, after + stays, not stays
                waiting = [line]
            file.writelines(waiting)
            after += skipped
        os.chmod(new, records.path.stat().st_mode)
        if records.path.stat().st_size != size:
            raise ValueError(f"{records.path}: a run has written to it meanwhile; thin it when the run has ended")
        os.replace(new, records.path)
    finally:
        new.unlink(missing_ok=True)
    return before, after


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[1])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"directory with {FILE_NAME}, or such a file")
    parser.add_argument("--every", type=int, required=True, help="which records stay: one in so many")
    args = parser.parse_args(argv)
    for run in args.runs:
        try:
            before, after = thin(run, args.every)
        except (OSError, ValueError) as error:
            print(f"thin: {error}", file=sys.stderr)
            return 1
        print(f"{run}: {after} of {before} records stay", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
