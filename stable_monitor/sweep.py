"""`python -m stable_monitor.sweep`: a training command at several learning rates, seeds and variants, and its sensitivity.

    python -m stable_monitor.sweep --out runs/sweep --lr 1e-3 1e-2 1e-1 --seed 1 2 3 \\
        --variant plain= --variant sigma='--reparam=sigma' \\
        -- python train.py --learning_rate={lr} --seed={seed} {variant} --out_dir={out}

In the command {lr}, {seed}, {variant} (the variant's flags) and {out} (the run's folder) are filled in. The loss is the
validation's that the monitor recorded in {out}, or without one the mean of its last losses; or what --loss finds in the output.
The same command goes on with the runs that are missing. A run that ends in an error after its first loss has diverged, and is
kept as that.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import as_completed
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from stable_core.extras import extra

from .ending import Children, Claim, as_by_ctrl_c
from .records import FILE_NAME, load

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

    from .outcomes import Outcome, plot, summarise, table
    from .report import report

PROG = "python -m stable_monitor.sweep"
PLACES = ("lr", "seed", "variant", "out")
LAST = 10  # records whose losses are averaged where there was no validation


@dataclass(frozen=True)
class Sweep:
    """What is run.

    Attributes:
        command: with {lr}, {seed}, {variant} and {out} in it.
        variants: flags by name.
        loss: a pattern with one group, that finds the losses in the output, the first one before training; None: the monitor's.
        initial: loss of the untrained model, where it is not the first one found.
    """

    out: Path
    command: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    variants: dict[str, str]
    loss: re.Pattern[str] | None = None
    initial: float | None = None

    def runs(self) -> "list[Run]":
        """Seed by seed, so that a table can be read early."""
        return [Run(self, *run) for run in product(self.seeds, self.lrs, self.variants)]


@dataclass(frozen=True)
class Run:
    """One training."""

    sweep: Sweep
    seed: int
    lr: float
    variant: str

    @property
    def folder(self) -> Path:
        return self.sweep.out / f"{self.variant}-{self.lr:g}-{self.seed}"

    def command(self) -> list[str]:
        flags = self.sweep.variants[self.variant]
        values = {"lr": f"{self.lr:g}", "seed": str(self.seed), "variant": flags, "out": str(self.folder)}
        filled = []
        for word in self.sweep.command:
            if word == "{variant}":
                filled += shlex.split(flags)
                continue
            filled.append(re.sub(r"\{(lr|seed|variant|out)\}", lambda place: values[place[1]], word))
        return filled

    def status(self) -> int | None:
        """The command's exit status; None where it has not ended."""
        path = self.folder / "status"
        return int(path.read_text()) if path.is_file() and path.read_text().strip() else None

    def output(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text(errors="replace") if path.is_file() else ""

    def outcome(self) -> Outcome:
        """What came of a run that has ended.

        Raises:
            ValueError: it has no loss, so that nothing says that training began.
        """
        losses, last = self._losses()
        if not losses:
            said = (self.output().strip() or "nothing").splitlines()[-1]
            how = (
                "the command's output has no match of --loss"
                if self.sweep.loss
                else f"no {FILE_NAME} with a loss there"
            )
            raise ValueError(f"{self.folder}: {how}; it ended with status {self.status()}, and said at last: {said}")
        initial = losses[0] if self.sweep.initial is None else self.sweep.initial
        died = "" if self.status() == 0 else f"ended with status {self.status()}"
        return Outcome(self.variant, self.lr, self.seed, initial, math.nan if died else last, died)

    def _losses(self) -> tuple[list[float], float]:
        """The losses in order, and the one at the end."""
        if self.sweep.loss is not None:
            found = [float(match[1]) for match in self.sweep.loss.finditer(self.output())]
            return found, found[-1] if found else math.nan
        try:
            records, validations = load(self.folder)
        except (FileNotFoundError, ValueError):
            return [], math.nan
        losses = [math.nan if record["loss"] is None else record["loss"] for record in records]
        validated = [line["validation"]["loss"] for line in validations if "loss" in line["validation"]]
        if validated:
            return losses, math.nan if validated[-1] is None else validated[-1]
        return losses, fmean(losses[-LAST:])


def claim(sweep: Sweep) -> None:
    """Writes what is swept into the folder; rates, seeds and variants may be added later.

    Raises:
        ValueError: the folder holds a sweep of another command, or a variant with other flags.
    """
    path = sweep.out / "sweep.json"
    if path.exists():
        before = json.loads(path.read_text())
        if before["command"] != list(sweep.command):
            raise ValueError(
                f"{sweep.out}: it has runs of another command, {shlex.join(before['command'])}; take another --out"
            )
        for name, flags in sweep.variants.items():
            if before["variants"].get(name, flags) != flags:
                raise ValueError(
                    f"{sweep.out}: its variant {name} has {before['variants'][name]!r}; give it another name"
                )
    else:
        before = {"command": list(sweep.command), "variants": {}}
    sweep.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**before, "variants": {**before["variants"], **sweep.variants}}, indent=1) + "\n")


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
        print(f"mkdir -p {folder}; {shlex.join(run.command())} > {folder}/output.txt 2>&1; echo $? > {folder}/status")


def collect(sweep: Sweep, console: Console) -> None:
    """Writes what the runs that have ended say: outcomes.jsonl, table.md, sensitivity.png, and a report a variant.

    Raises:
        ValueError: no run has ended, or one has no loss.
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
        claim(sweep)
        missing = [run for run in sweep.runs() if run.status() is None]
        if args.commands:
            print_commands(missing)
            return 0
        if not args.collect:
            with as_by_ctrl_c():
                show(train(missing, args.jobs), len(missing), len(sweep.runs()), console)
        collect(sweep, console)
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
            try:
                outcome = run.outcome()
            except ValueError:
                (run.folder / "status").unlink()  # the same command tries it again
                raise
            ended = outcome.died or f"loss {outcome.final:.4g}"
            bar.console.print(f"{run.variant} at {run.lr:g}, seed {run.seed}: {ended}", markup=False)
            bar.advance(task)


if __name__ == "__main__":
    sys.exit(main())
