"""`python -m stable_monitor.sweep`: a training command at several learning rates, seeds and variants, and its sensitivity.

    python -m stable_monitor.sweep --out runs/sweep --lr 1e-3 1e-2 1e-1 --seed 1 2 3 \\
        --variant plain= --variant sigma='--reparam=sigma' \\
        -- python train.py --learning_rate={lr} --seed={seed} {variant} --out_dir={out}

In the command {lr}, {seed}, {variant} (the variant's flags) and {out} (the run's folder) are filled in. The loss is the
validation's that the monitor recorded in {out}, or without one the mean of its last losses; or what --loss finds in the output.
The same command goes on with the runs that are missing. A run that ends in an error after its first loss has diverged, and is
kept as that; one that was killed is missing.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import as_completed
from contextlib import closing
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from stable_core.extras import extra

from .ending import Children, Claim, as_by_ctrl_c
from .records import FILE_NAME

with extra("monitor"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from .outcomes import plot, summarise, table
    from .report import report
    from .swept import PLACES, Run, Sweep, claim

PROG = "python -m stable_monitor.sweep"


def train(runs: list[Run], jobs: int) -> Generator[Run, None, None]:
    """Runs commands, `jobs` at a time; yields each run when it has ended."""
    children = Children()
    with children.workers(jobs) as pool:
        futures = {pool.submit(_train, run, children, jobs > 1): run for run in runs}
        for future in as_completed(futures):
            future.result()
            yield futures[future]


def _train(run: Run, children: Children, one_thread: bool) -> None:
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with Claim(folder) as claim, (folder / "output.txt").open("w") as output:
        for path in (folder / FILE_NAME, folder / "status"):  # of a run that was interrupted
            path.unlink(missing_ok=True)
        (folder / "command").write_text(run.line())
        threads = {"OMP_NUM_THREADS": "1"} if one_thread else {}
        process = children.start(
            run.command(),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**threads, **os.environ},
            pass_fds=[claim.descriptor],
        )
        claim.give_to(process.pid)
        status = process.wait()
        if not children.ended:
            (folder / "status").write_text(f"{status}\n")


def print_commands(runs: list[Run]) -> None:
    """A line of shell for each run, for a scheduler: it leaves what `train` leaves."""
    for run in runs:
        folder = shlex.quote(str(run.folder))
        steps = (
            f": > {folder}/running; rm -f {folder}/{FILE_NAME} {folder}/status",
            f"printf '%s\\n' {shlex.quote(run.line().strip())} > {folder}/command",
            f"{run.line().strip()} > {folder}/output.txt 2>&1; echo $? > {folder}/status",
        )
        print(f"mkdir -p {folder}; flock -n {folder}/running sh -c {shlex.quote('; '.join(steps))}")


def collect(sweep: Sweep, console: Console) -> None:
    """Writes what the runs that have ended say: outcomes.jsonl, table.md, sensitivity.png, and a report a variant.

    Raises:
        ValueError: no run has ended, or one has no loss; after writing, that all runs of a variant ended in an error.
    """
    ended = [run for run in sweep.runs() if run.status() is not None]
    if not ended:
        raise ValueError(f"{sweep.out}: no run has ended yet")
    outcomes = [run.outcome() for run in ended]
    lines = (json.dumps({**vars(o), "final": None if math.isnan(o.final) else o.final}) for o in outcomes)
    (sweep.out / "outcomes.jsonl").write_text("".join(f"{line}\n" for line in lines))
    rows = summarise(outcomes)
    (sweep.out / "table.md").write_text(table(rows))
    plot(rows, sweep.out / "sensitivity.png")
    console.print(table(rows), soft_wrap=True, markup=False, highlight=False)
    if missing := len(sweep.runs()) - len(ended):
        console.print(f"{missing} runs have not ended, and are not in it", markup=False)
    for outcome in outcomes:
        if outcome.died:
            console.print(f"{outcome.variant} at {outcome.lr:g}, seed {outcome.seed}: {outcome.died}", markup=False)
    written = [sweep.out / name for name in ("table.md", "sensitivity.png", "outcomes.jsonl")]
    for variant in sweep.variants:
        folders = [run.folder for run in ended if run.variant == variant and (run.folder / FILE_NAME).is_file()]
        if folders:
            report(folders, page := sweep.out / f"{variant}.html")
            written.append(page)
    console.print("wrote " + ", ".join(map(str, written)), soft_wrap=True, markup=False, highlight=False)
    for variant in sweep.variants:
        own = [run for run in ended if run.variant == variant]
        if own and all(run.status() for run in own):
            raise ValueError(
                f"{variant}: every run ended in an error, which is no divergence; {own[0].folder} said at last: "
                f"{own[0].said()}"
            )


def parse(argv: list[str], prog: str = PROG) -> tuple[Sweep, argparse.Namespace]:
    """Raises ValueError for what cannot be swept."""
    description, example, details = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description.replace(PROG, prog),
        epilog=f"{example.replace(PROG, prog)}\n\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep, with a folder in it for each run")
    parser.add_argument("--lr", type=float, nargs="+", required=True, help="evenly spaced in log(rate)")
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--variant", action="append", metavar="NAME=FLAGS", help="may be given several times (default: plain=)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--loss", metavar="PATTERN", help="regular expression with one group, of losses in the output")
    parser.add_argument("--initial", type=float, help="loss of the untrained model (default: the first one found)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--commands", action="store_true", help="print the missing runs' commands for a scheduler")
    how.add_argument("--collect", action="store_true", help="run nothing, and show what has ended")
    parser.add_argument(
        "command", nargs="+", metavar="COMMAND", help="after --, with {lr} {seed} {variant} {out} in it"
    )
    if "--" not in argv and any("{lr}" in word for word in argv):
        raise ValueError("-- is missing: it stands between the options of the sweep and the command")
    args = parser.parse_args(argv)
    variants = dict(_variant(text) for text in args.variant or ["plain="])
    if len(variants) < len(args.variant or [1]):
        raise ValueError("variant: two have the same name")
    if not all(0 < lr < math.inf for lr in args.lr) or len(set(args.lr)) < len(args.lr):
        raise ValueError(f"lr = {args.lr}: allowed are different positive numbers")
    if len(set(args.seed)) < len(args.seed):
        raise ValueError(f"seed = {args.seed}: allowed are different whole numbers")
    if args.jobs < 1:
        raise ValueError(f"jobs = {args.jobs}: allowed are whole numbers from 1")
    pattern = None
    if args.loss is not None:
        try:
            pattern = re.compile(args.loss)
        except re.error as error:
            raise ValueError(f"loss = {args.loss!r}: {error}") from error
        if pattern.groups != 1:
            raise ValueError(f"loss = {args.loss!r}: allowed are patterns with one group, as 'loss ([0-9.]+|nan)'")
    for name in set(re.findall(r"\{([a-z]\w*)\}", " ".join(args.command))) - set(PLACES):
        if meant := get_close_matches(name, PLACES, 1):
            raise ValueError(f"{{{name}}} in the command: do you mean {{{meant[0]}}}?")
    if not (args.commands or args.collect or shutil.which(args.command[0])):
        raise ValueError(
            f"command = {args.command[0]!r}: there is no such program; give its words apart, without quotes"
        )
    for name in ("lr", "out"):
        if not any(f"{{{name}}}" in word for word in args.command) and not (name == "out" and args.loss):
            raise ValueError(f"the command has no {{{name}}} in it: {shlex.join(args.command)}")
    for name in ("seed", "variant"):
        several = len(args.seed) > 1 if name == "seed" else any(variants.values())
        if several and not any(f"{{{name}}}" in word for word in args.command):
            raise ValueError(
                f"the command has no {{{name}}} in it, and its runs would be alike: {shlex.join(args.command)}"
            )
    sweep = Sweep(
        args.out, tuple(args.command), tuple(sorted(args.lr)), tuple(args.seed), variants, pattern, args.initial
    )
    return sweep, args


def _variant(text: str) -> tuple[str, str]:
    name, equals, flags = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"variant = {text!r}: allowed is NAME=FLAGS, and in names letters, numbers and _ . + -")
    return name, flags


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    console = Console()
    try:
        sweep, args = parse(sys.argv[1:] if argv is None else argv, prog)
        claim(sweep, write=not args.collect)
        if not is_even(sweep.lrs):
            uneven = "the rates are not even in log(rate): sensitivity counts most where they are dense"
            print(f"sweep: {uneven}", file=sys.stderr)
        missing = [run for run in sweep.runs() if run.status() is None]
        if args.commands:
            running = [run for run in missing if run.is_running()]
            print_commands([run for run in missing if run not in running])
            if running:
                print(f"sweep: {len(running)} runs are under way, and left out", file=sys.stderr)
            return 0
        if not args.collect:
            with as_by_ctrl_c():
                show(train(missing, args.jobs), len(missing), len(sweep.runs()), console)
        collect(sweep, console)
        if not args.collect and any(run.status() is None for run in sweep.runs()):
            raise ValueError("runs were killed; the same command tries them again")
    except KeyboardInterrupt:
        print("\nsweep: stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 1
    return 0


def show(runs: Generator[Run, None, None], missing: int, total: int, console: Console) -> None:
    """Raises ValueError at the first run that ends without a loss: the command is wrong, and the others would be, too."""
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with closing(runs), Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("runs", total=total, completed=total - missing)
        for run in runs:
            if run.status() is None:
                bar.console.print(f"{run.folder} was killed (is memory full?): {run.said()}", markup=False)
                continue
            try:
                outcome = run.outcome()
            except ValueError:
                if not run.began():
                    (run.folder / "status").unlink()  # the same command tries it again
                raise
            ended = outcome.died or f"loss {outcome.final:.4g}"
            bar.console.print(f"{run.variant} at {run.lr:g}, seed {run.seed}: {ended}", markup=False)
            bar.advance(task)


def is_even(rates: Sequence[float]) -> bool:
    """Whether the rates, in order, are about evenly spaced in log(rate)."""
    steps = [math.log(high / low) for low, high in pairwise(rates)]
    return not steps or max(steps) < 1.5 * min(steps)


if __name__ == "__main__":
    sys.exit(main())
