"""Trainings side by side in processes of their own, as many at a time as there are cores, with a progress bar each."""

import os
import subprocess
import sys
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from stable_monitor.ending import Children

Key = TypeVar("Key", bound=Hashable)
Progressed = Callable[[int, str], None]  # how many updates are done, and a note
children = Children()


class Job(NamedTuple):
    """What is shown of a training, and what runs it; that is given a `Progressed`."""

    label: str
    updates: int
    run: Callable[[Progressed], Any]


def start(*arguments: Any, **settings: Any) -> subprocess.Popen:
    """Python with these arguments, on one thread: two threads of two runs on two cores would wait for each other."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return children.start([sys.executable, *map(str, arguments)], env=env, text=True, **settings)


def side_by_side(jobs: dict[Key, Job], console: Console) -> dict[Key, Any]:
    """What each job's `run` returns. An error of one, or Ctrl-C, ends all."""
    columns = ("{task.description:31}", BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), "{task.fields[note]}")
    workers = max(1, min(len(jobs), os.cpu_count() or 1))
    with Progress(*columns, console=console) as progress, children.workers(workers) as pool:

        def run(job: Job, task: Any) -> Any:
            progress.start_task(task)
            return job.run(lambda done, note: progress.update(task, completed=done, note=note))

        waiting = {}
        for key, job in jobs.items():
            task = progress.add_task(job.label, total=job.updates, start=False, note="")
            waiting[key] = pool.submit(run, job, task)
        return {key: future.result() for key, future in waiting.items()}
