"""Figures over runs: what is drawn, against the records that it is drawn from, and word error rates against a committed log."""

import json
from pathlib import Path

import pytest

from recipes import figure
from recipes.librispeech import wer

ROOT = Path(__file__).parents[2]


def record(step: int, loss: float | None, sigma: float, entropy: list[float]) -> dict:
    first = {"q": sigma, "k": sigma / 2, "v": sigma / 3, "out": 100.0}
    layer = {
        "kind": "encoder",
        "keys": 8,
        "entropy": entropy,
        "entropy_min": entropy,
        "max_logit": [1.0],
        "bound": [0.0],
    }
    layers = {"blocks.0": {**layer, "sigma": first, "lag": {}}, "blocks.1": {**layer, "sigma": {"qkv": 9.0}, "lag": {}}}
    numbers = {"time": 0.0, "loss": loss, "lr": 0.1, "grad_l2": 1.0, "grad_linf": 0.5}
    return {"step": step, **numbers, "layers": layers, "alarms": []}


@pytest.fixture
def trials(tmp_path) -> list[str]:
    """Three trials of a model and one of another, whose last accuracies are 40, 60, 50 and 70."""
    folders = []
    for name, last in (("plain-20-1", 40), ("plain-20-2", 60), ("plain-20-3", 50), ("sigma-20-1", 70)):
        validations = [{"step": s, "validation": {"top1": x, "loss": 1 - x / 100}} for s, x in ((5, 99), (10, last))]
        lines = [
            record(0, 3.0, last / 10, [1.0, 2.0]),
            validations[0],
            record(5, None, 2.0, [0.5, 1.5]),
            validations[1],
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "monitor.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(str(tmp_path / name))
    return folders


def drawn(tmp_path, *arguments: str) -> list[dict]:
    assert figure.main([*arguments, "--output", str(tmp_path / "figure")]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    return [json.loads(line) for line in (tmp_path / "figure.jsonl").read_text().splitlines()]


def test_all_trials(trials, tmp_path):
    lines = drawn(tmp_path, *trials, "--show", "validation.top1")
    assert [(line["group"], line["run"], line["x"], line["y"]) for line in lines] == [
        ("plain-20", "plain-20-1", [5, 10], [99, 40]),
        ("plain-20", "plain-20-2", [5, 10], [99, 60]),
        ("plain-20", "plain-20-3", [5, 10], [99, 50]),
        ("sigma-20", "sigma-20-1", [5, 10], [99, 70]),
    ]


def test_the_best_and_the_worst_and_what_their_layers_did(trials, tmp_path):
    show = ("loss", "entropy:encoder.0", "sigma:encoder.0", "sigma:encoder.-1")
    lines = drawn(tmp_path, *trials, "--trials", "extremes", "--by", "validation.top1", "--show", *show)
    by_loss = drawn(tmp_path, *trials, "--trials", "extremes", "--show", *show)
    assert lines == by_loss  # the best has the least loss
    assert {(line["run"], line["style"]) for line in lines} == {
        ("plain-20-2", "-"), ("plain-20-1", "--"), ("sigma-20-1", "-")
    }  # fmt: skip
    best = [(line["quantity"], line["x"], line["y"]) for line in lines if line["run"] == "plain-20-2"]
    assert best == [
        ("loss", [0], [3.0]),  # null is no point
        ("entropy:encoder.0", [0, 5], [1.5, 1.0]),
        ("sigma:encoder.0", [0, 5], [6.0, 2.0]),  # of q, not of the output projection
        ("sigma:encoder.-1", [0, 5], [9.0, 9.0]),
    ]


def test_trials_by_rank(trials, tmp_path):
    lines = drawn(tmp_path, *trials, "--trials", "ranked", "--show", "validation.top1")
    assert [(line["group"], line["x"], line["y"]) for line in lines] == [
        ("plain-20", [1, 2, 3], [60, 50, 40]), ("sigma-20", [1], [70])
    ]  # fmt: skip


def test_groups_by_name():
    names = ("sigma-20-3-1", "sigma-20-3-2", "sigma-20-3-1/probe", "sigma", "100-1")
    assert [figure.group_of(name) for name in names] == ["sigma-20-3", "sigma-20-3", "sigma-20-3/probe", "sigma", "100"]


def test_what_there_is_not_is_said(trials, tmp_path):
    for name in ("entropi", "entropy", "entropy:encoder", "loss:encoder.0"):
        with pytest.raises(
            ValueError, match=f"show = '{name}': allowed are loss, .*, validation.NAME, entropy:KIND.INDEX"
        ):
            figure.Settings(runs=(), output=tmp_path, show=(name,))
    for name, message in (
        ("validation.wer", "plain-20-1: nothing of validation.wer is in its validations; it has validation.loss"),
        ("entropy:encoder.7", "nothing of entropy:encoder.7 is in its records; it has encoder.0 to 1"),
        ("entropy:cross.0", "it has encoder.0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            figure.main([*trials, "--show", name, "--output", str(tmp_path / "figure")])


def test_word_error_rates_against_a_setting(tmp_path):
    """The least WER of the committed log is 93.952, the best that fairseq tells of in its last line."""
    log = (ROOT / "recipes/librispeech/results/small-sigma_postln-adagrad-1.log").read_text()
    assert "best_wer 93.952" in log.splitlines()[-1]
    other = (
        "valid on 'dev-other' subset | loss 2 | wer 30.5 | raw_wer 30\nvalid on 'dev-clean' subset | loss 1 | wer 9.5"
    )
    for name, rate, text in (("sigma_postln-1", 0.03, log), ("sigma_postln-2", 0.01, other), ("preln-1", 0.5, other)):
        (tmp_path / name).mkdir()
        head = f"{{'optimization': {{'lr': [{rate}]}}, 'model': Namespace(init_std=0.1), 'warmup_updates': 64000}}"
        (tmp_path / name / "train.log").write_text(f"{head}\n{text}")
    runs = sorted(str(path) for path in tmp_path.iterdir())
    assert wer.main([*runs, "--against", "lr", "--output", str(tmp_path / "wer")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "wer.jsonl").read_text().splitlines()]
    assert [(line["group"], line["x"], line["y"]) for line in lines] == [
        ("preln", [0.5], [30.5]), ("sigma_postln", [0.01, 0.03], [30.5, 93.952])
    ]  # fmt: skip
    logs = [tmp_path / "preln-1" / "train.log"]
    assert [wer.setting(name, logs[0]) for name in ("warmup_updates", "init_std")] == [64000, 0.1]
    logs[0].write_text("nothing")
    with pytest.raises(ValueError, match="tells nothing of lr"):
        wer.main([runs[0], "--against", "lr", "--output", str(tmp_path / "wer")])
