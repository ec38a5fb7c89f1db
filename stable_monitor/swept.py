"""What a sweep runs: its command at each rate, seed and variant, and what is found in the folder of each."""

import json
import math
import re
import shlex
import signal
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from .ending import Claim
from .outcomes import Outcome
from .records import FILE_NAME, load

PLACES = ("lr", "seed", "variant", "out")
NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf)", re.IGNORECASE)
KILLED = {signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM}  # from outside, as where memory is full
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
        """The command's exit status; None where it has not ended, was killed, or was another command."""
        path, trained = self.folder / "status", self.folder / "command"
        if trained.is_file() and trained.read_text() != self.line():
            return None
        status = int(path.read_text()) if path.is_file() and path.read_text().strip() else None
        return None if status is not None and (-status in KILLED or status - 128 in KILLED) else status

    def line(self) -> str:
        """The command as a line of shell, as the file `command` in the folder has it."""
        return shlex.join(self.command()) + "\n"

    def is_running(self) -> bool:
        if not self.folder.is_dir():
            return False
        try:
            with Claim(self.folder):
                return False
        except ValueError:
            return True

    def output(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text(errors="replace") if path.is_file() else ""

    def outcome(self) -> Outcome:
        """What came of a run that has ended.

        Raises:
            ValueError: it has no loss, so that nothing says that training began, or none of the untrained model.
        """
        losses, last = self._losses()
        if not losses:
            how = (
                "the command's output has no match of --loss"
                if self.sweep.loss
                else f"no {FILE_NAME} with a loss there"
            )
            raise ValueError(
                f"{self.folder}: {how}; it ended with status {self.status()}, and said at last: {self.said()}"
            )
        initial = losses[0] if self.sweep.initial is None else self.sweep.initial
        died = "" if self.status() == 0 else f"ended with status {self.status()}"
        only = self.sweep.loss is not None and self.sweep.initial is None and len(losses) == 1 and not died
        if only or not math.isfinite(initial):
            raise ValueError(
                f"{self.folder}: its first loss, {initial}, is not the untrained model's; give that by --initial"
            )
        return Outcome(self.variant, self.lr, self.seed, initial, math.nan if died else last, died)

    def began(self) -> bool:
        """Whether it has a loss."""
        return bool(self._losses()[0])

    def said(self) -> str:
        """The last line of its output."""
        return (self.output().strip() or "nothing").splitlines()[-1]

    def _number(self, match: re.Match[str]) -> float:
        start = match.end(1) - len(match[1].lstrip())
        number = NUMBER.match(match.string, start)  # beyond the group, which may end at the e of 1.2e+06
        if number is None or re.search(r"\w", match.string[number.end() : match.end(1)]):
            raise ValueError(f"{self.folder}: --loss finds {match[1]!r} in the output, which is no number")
        return float(number[0])

    def _losses(self) -> tuple[list[float], float]:
        """The losses in order, and the one at the end."""
        if self.sweep.loss is not None:
            found = list(map(self._number, self.sweep.loss.finditer(self.output())))
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


def claim(sweep: Sweep, write: bool = True) -> None:
    """Writes what is swept into the folder; rates, seeds and variants may be added later.

    The command may be mended until a run of it has ended.

    Raises:
        ValueError: the folder holds a sweep of another command, or a variant with other flags.
    """
    path = sweep.out / "sweep.json"
    if path.exists():
        before = json.loads(path.read_text())
        was = Sweep(sweep.out, tuple(before["command"]), sweep.lrs, sweep.seeds, before["variants"])
        if was.command != sweep.command and any(run.status() is not None for run in was.runs()):
            raise ValueError(
                f"{sweep.out}: it has runs of another command, {shlex.join(before['command'])}; take another --out"
            )
        for name, flags in sweep.variants.items():
            if before["variants"].get(name, flags) != flags:
                raise ValueError(
                    f"{sweep.out}: its variant {name} has {before['variants'][name]!r}; give it another name"
                )
    else:
        before = {"variants": {}}
    if not write:
        return
    sweep.out.mkdir(parents=True, exist_ok=True)
    now = {"command": sweep.command, "variants": {**before["variants"], **sweep.variants}}
    path.write_text(json.dumps(now, indent=1) + "\n")
