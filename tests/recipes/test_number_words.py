"""recipes/number_words: its data against numbers known by heart, and the whole command with a few updates and sentences."""

import sys
from pathlib import Path

import pytest

from recipes.number_words import run as recipe
from recipes.number_words.run import RUNS, SIZES, losses, prepare
from tests.warm import PYTHON

RECIPE = Path(recipe.__file__).parent


def test_the_parallel_text_is_number_words(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "fairseq", lambda *args: None)  # binarises it, in the next test but one
    monkeypatch.setattr(recipe, "finish", lambda *args: None)
    prepare(tmp_path)
    pairs = {}
    for split, size in SIZES.items():
        english, german = ((tmp_path / "text" / f"{split}.{l}").read_text().splitlines() for l in ("en", "de"))
        assert len(english) == len(german) == size
        pairs |= dict(zip(english, german, strict=True))
    assert len(pairs) == sum(SIZES.values())  # no test number is a training number
    ones = {
        "one": "ein",
        "two": "zwei",
        "three": "drei",
        "four": "vier",
        "five": "fünf",
        "six": "sechs",
        "seven": "sieben",
    }
    for english, german in pairs.items():
        words = english.split()
        if words[0] in ones and words[1:2] == ["hundred"]:
            assert german.replace(" ", "").startswith(f"{ones[words[0]]}hundert")


def test_a_log_is_read_in_nats(tmp_path):
    (tmp_path / "log").write_text('{"epoch": 1, "loss": "2.000", "num_updates": "5"}\n{"train_loss": "9"}\nother\n')
    curve = losses(tmp_path / "log")
    assert list(curve) == [5] and abs(curve[5] - 1.386294) < 1e-5


def test_the_command_trains_translates_and_draws(tmp_path, monkeypatch, capsys):
    runs = (RUNS[0], RUNS[-1])  # each differs by its arch and rate alone, and the last one by gamma's start
    monkeypatch.setattr(recipe, "RUNS", runs)
    monkeypatch.setattr(recipe, "SIZES", {"train": 5 * 48, "valid": 10, "test": 12})
    monkeypatch.setattr(sys, "argv", ["number_words", "--steps", "5", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "executable", PYTHON)
    assert recipe.main() == 0
    shown = capsys.readouterr().out
    for run in runs:
        assert run.label in shown
        assert max(losses(tmp_path / f"{run.name}-1" / "train.log")) == 5
    assert shown.count("->") == 10
    assert (tmp_path / "number_words.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    for run in runs:
        assert f"{run.name}-1/entropy/decoder.layers.17.encoder_attn" in page


def test_wrong_steps_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["number_words", "--steps", "0"])
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    assert ended.value.code == 2 and "--steps 0: allowed are whole numbers from 5" in capsys.readouterr().err


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_losses_of_the_page_are_those_of_the_logs(run):
    logs = [losses(RECIPE / "results" / f"{run.name}-{seed}.log") for seed in (1, 2, 3)]
    row = f"{run.label} | {run.lr} | {' / '.join(f'{curve[240]:.2f}' for curve in logs)} |"
    assert row in (RECIPE / "results" / "tables.md").read_text()
