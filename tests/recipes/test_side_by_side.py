"""Trainings side by side: what each returns, and that an error of one ends the others."""

import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from recipes.side_by_side import Job, side_by_side, start


def test_each_returns_its_own_and_shows_how_far_it_is(capsys):
    def run(progressed, number):
        progressed(number, f"loss {number}")
        return number**2

    jobs = {n: Job(f"run {n}", 5, lambda progressed, n=n: run(progressed, n)) for n in (3, 4)}
    assert side_by_side(jobs, Console()) == {3: 9, 4: 16}
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("run 3", "3/5", "loss 3", "run 4", "4/5", "loss 4"))


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("while_submitting", [False, True])
def test_a_signal_ends_what_was_started_and_starts_nothing_more(tmp_path, sent, while_submitting):
    script = f"""
import os, signal, time
from concurrent.futures import ThreadPoolExecutor
from rich.console import Console
from recipes.side_by_side import Job, side_by_side, start
def run(progressed):
    for _ in range(2):
        process = start("-c", "import time; time.sleep(300)")
        print(process.pid, flush=True)
        process.wait()
for one in (signal.SIGTERM, signal.SIGHUP):  # which nohup has ignored
    signal.signal(one, signal.SIG_DFL)
submit = ThreadPoolExecutor.submit
def slowly(*arguments):
    future = submit(*arguments)
    time.sleep(300 * {while_submitting})
    return future
ThreadPoolExecutor.submit = slowly
side_by_side({{1: Job("run", 1, run)}}, Console(quiet=True))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    child = int(parent.stdout.readline())
    parent.send_signal(getattr(signal, sent))
    more, _ = parent.communicate(timeout=60)
    assert parent.returncode != 0 and more == ""
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_an_error_of_one_ends_the_others(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    begun = []

    def sleeps(progressed):
        begun.append(start("-c", "import time; time.sleep(300)"))
        return begun[0].wait()

    def fails(progressed):
        while not begun:
            time.sleep(0.01)
        raise ValueError("lost")

    begin = time.monotonic()
    with pytest.raises(ValueError, match="lost"):
        side_by_side({name.__name__: Job(name.__name__, 1, name) for name in (fails, sleeps)}, Console(quiet=True))
    assert begun[0].poll() is not None and time.monotonic() - begin < 100
