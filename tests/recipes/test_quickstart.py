"""The quickstart: the whole command with a few updates, again after it, and after a run that did not end."""

import itertools
import sys

import pytest

from recipes.gpt.prepare import write
from recipes.quickstart import run, train
from recipes.trainings import Characters
from stable_monitor.records import FILE_NAME, read
from tests.warm import PYTHON

TEXT = "To be, or not to be, that is the question. " * 50


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write(TEXT, folder)
    return folder


def test_the_command_trains_draws_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "shakespeare", lambda: TEXT)
    monkeypatch.setattr(sys, "argv", ["quickstart", "--updates", "20", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "executable", PYTHON)
    assert run.main() == 0
    shown = capsys.readouterr().out
    assert all(label in shown for label, _ in run.LABELS.values())
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "sigma-1" in (tmp_path / "report.html").read_text()
    files = {name: tmp_path / f"{name}-1" / FILE_NAME for name in run.RUNS}
    before = {name: path.read_bytes() for name, path in files.items()}
    assert read(tmp_path / "alone-1")[0]["loss"] == read(tmp_path / "rescued-1")[0]["loss"]  # until the alarm
    files["alone"].write_bytes(before["alone"].splitlines(keepends=True)[0])  # one that was stopped
    others = {name: path.stat().st_mtime_ns for name, path in files.items() if name != "alone"}
    assert run.main() == 0
    assert {name: files[name].stat().st_mtime_ns for name in others} == others
    losses = [record["loss"] for record in read(tmp_path / "alone-1")]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_a_run_that_fails_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", PYTHON)
    with pytest.raises(RuntimeError, match=r"alone: .*no-such-folder"):
        run.train("alone", tmp_path / "no-such-folder", tmp_path, 10, 1, lambda done, note: None)


def test_wrong_updates_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart", "--updates", "15"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2 and "--updates 15: allowed are multiples of 10" in capsys.readouterr().err


def test_the_monitor_changes_nothing_until_it_rescues(text, tmp_path):
    """The run that is left alone is the plain loop's, to the bit."""
    found = train.train("alone", text, tmp_path / "a", 10, 1)
    training = Characters(text, train.LR, 1, {})
    for batch in itertools.islice(training.batches(1), 10):
        training.step(batch)
        training.optimizer.zero_grad()
    assert training.validate() == found
