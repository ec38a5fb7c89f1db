"""Trainings side by side: what each returns, and that an error of one ends the others."""

import os
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


def test_sigterm_ends_what_was_started(tmp_path):
    script = f"""
from rich.console import Console
from recipes.side_by_side import Job, side_by_side, start
def run(progressed):
    process = start("-c", "import time; time.sleep(300)")
    open({str(tmp_path / "pid")!r}, "w").write(str(process.pid) + "\\n")
    return process.wait()
side_by_side({{1: Job("run", 1, run)}}, Console(quiet=True))
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(timeout=60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


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
