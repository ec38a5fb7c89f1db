"""Trainings side by side: what each returns, and that an error of one ends the others."""

import os
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
