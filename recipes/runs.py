"""Many short runs, each in a process of one thread, a few at a time; their log has one JSON object a run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stable_monitor.ending import Children

_children = Children()


def python(*arguments: object, **environment: str) -> tuple[int, str]:
    """Runs `python ARGUMENTS` to its end; returns the exit status and what it said."""
    return call(sys.executable, *arguments, **environment)


def call(*command: object, **environment: str) -> tuple[int, str]:
    """Runs any command likewise."""
    process = _children.start(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = process.communicate()
    return process.returncode, output


def last_line(output: str) -> str:
    return (output.strip() or "killed").splitlines()[-1]


def run_all(
    jobs: dict[str, Callable[[], dict]], path: Path, workers: int, describe: Callable[[dict], str], console: Console
) -> list[dict]:
    """The log of `jobs`, a line each: what the job returns, with its name. Runs those that the file at `path` does not hold."""
    log = {line["name"]: line for line in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar, _children.workers(workers) as pool:
        task = bar.add_task("runs", total=len(jobs), completed=sum(name in log for name in jobs))
        futures = {pool.submit(job): name for name, job in jobs.items() if name not in log}
        for future in as_completed(futures):
            line = {"name": futures[future], **future.result()}
            log[line["name"]] = line
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            console.print(describe(line), highlight=False)
            bar.advance(task)
    return [log[name] for name in jobs]
