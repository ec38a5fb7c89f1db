"""The evidence: its logs are read back from what the programs wrote, and its README says what the committed logs say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from recipes import runs
from recipes.evidence import collapse, experiments, run, tables
from recipes.evidence.experiments import EXPERIMENTS

EVIDENCE = Path(experiments.__file__).parent


def test_entropy_is_that_of_the_layer_where_it_is_least(tmp_path):
    """Uniform attention over n keys has entropy log(n): 1. A layer with half of that in each head is at 0.5."""
    layers = {
        "uniform": {"kind": "encoder", "keys": 8.0, "entropy": [math.log(8)] * 2},
        "half": {"kind": "decoder", "keys": 16.0, "entropy": [math.log(4)] * 2},
    }
    alarm = {"layer": "half", "kind": "decoder", "entropy": 1.0, "threshold": 1.1}
    records = [
        {"step": 0, "layers": {"uniform": layers["uniform"]}, "alarms": []},
        {"step": 5, "layers": layers, "alarms": [alarm]},
    ]
    (tmp_path / "monitor.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert experiments.curves(tmp_path) == {"recorded": [0, 5], "entropy": [1.0, 0.5], "alarms": 1}


def test_losses_are_in_nats_and_a_nan_is_no_result(tmp_path):
    log = """Namespace(...)
{'_name': None}
{"epoch": 1, "num_updates": "5", "nll_loss": "2"}
{"epoch": 1, "valid_nll_loss": "3", "valid_uer": "40.5"}
{"epoch": 1, "valid_nll_loss": "1", "valid_uer": "20.5"}
"""
    (tmp_path / "train.log").write_text(log)
    read = experiments.fairseq_log(tmp_path, "nll_loss", 0, "")
    assert read == {"result": round(math.log(2), 4), "steps": [5], "losses": [round(2 * math.log(2), 4)]}
    assert experiments.fairseq_log(tmp_path, "uer", 0, "")["result"] == 20.5
    nan = "FloatingPointError: Minimum loss scale reached"
    assert experiments.fairseq_log(tmp_path, "nll_loss", 1, nan)["result"] is None
    with pytest.raises(RuntimeError, match=rf"{tmp_path}: no such file"):
        experiments.fairseq_log(tmp_path, "nll_loss", 1, "Traceback\nno such file\n")


def test_a_run_that_failed_leaves_the_others_in_the_log(tmp_path):
    def fails() -> dict:
        raise RuntimeError("b: out of memory")

    path, console = tmp_path / "log.jsonl", Console(quiet=True)
    with pytest.raises(RuntimeError, match="b: out of memory"):
        runs.run_all({"a": lambda: {"x": 1}, "b": fails}, path, 1, str, console)
    assert path.read_text() == '{"name": "a", "x": 1}\n'
    again = {"a": fails, "b": lambda: {"x": 2}}  # a is there: it is not called
    assert runs.run_all(again, path, 1, str, console) == [{"name": "a", "x": 1}, {"name": "b", "x": 2}]


@pytest.mark.slow  # the test of number_words trains the same models
def test_a_translation_experiment_from_the_command_line(tmp_path, monkeypatch, capsys):
    """DeepNorm with and without σReparam, one layer a side, from the first update to the table."""
    given = EXPERIMENTS["translation"]
    shallow = ("--encoder-layers", "1", "--decoder-layers", "1")
    models = {
        name: replace(given.models[name], options=(*given.models[name].options, *shallow))
        for name in ("deepnorm", "sigma")
    }
    monkeypatch.setitem(EXPERIMENTS, "translation", replace(given, models=models, lrs=(5e-3,)))
    command = ["translation", "--output", str(tmp_path), "--seeds", "1", "--length", "40", "--jobs", "2"]
    run.main(command)
    path = tmp_path / "translation" / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["name"] for line in lines} == {"deepnorm-0.005-1-40", "sigma-0.005-1-40"}
    for line in lines:
        assert line["steps"][-1] == 40 and line["recorded"][-1] == 35 and 0 < min(line["entropy"]) <= 1.0001
        assert line["losses"][0] > line["losses"][-1] and line["result"] < line["losses"][0]
        assert line["result"] == pytest.approx(line["losses"][-1], rel=0.2)  # training and validation, early
    assert (tmp_path / "translation" / "picture.png").stat().st_size > 10_000
    before = path.read_text()
    capsys.readouterr()
    run.main(command)
    assert path.read_text() == before and f"{lines[0]['result']:.3g}" in capsys.readouterr().out


def test_a_loss_turns_where_it_is_well_above_its_lowest_before():
    losses = [3.0, 1.0, 1.35, 0.9, 1.25, 1.31, 0.5]
    assert collapse.turned({"steps": range(0, 35, 5), "losses": losses}) == 25
    assert collapse.turned({"steps": range(0, 25, 5), "losses": losses[:5]}) is None
    assert collapse.turned({"steps": range(0, 15, 5), "losses": [3.0, math.nan, 1.0]}) == 5


def test_which_comes_first_is_that_of_the_logs(tmp_path, capsys):
    assert collapse.summary(collapse.runs()) in " ".join((EVIDENCE / "README.md").read_text().split())
    assert collapse.main([str(tmp_path / "collapse.png")]) == 0
    assert (tmp_path / "collapse.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        collapse.main([str(tmp_path / "no" / "collapse.png")])
    assert f"there is no directory {tmp_path / 'no'}" in capsys.readouterr().err


def test_the_alarm_rang_where_entropy_was_gone():
    """By the alarm of those logs, a tenth of what it had been: of the part of log(keys) in the layer and at the update where
    it is least."""
    for path in (EVIDENCE / "results").glob("*.jsonl"):
        unit = 1 if path.stem in EXPERIMENTS else math.log(17)  # the grid's logs have nats
        for line in map(json.loads, path.read_text().splitlines()):
            least = min(line["entropy"]) / unit
            if least < 0.11:
                assert line["alarms"] > 0, line["name"]
            if least > 0.17:
                assert line["alarms"] == 0, line["name"]


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match=r"jobs = 0: allowed are whole numbers from 1"):
        run.Settings(experiment="depth", jobs=0)


@pytest.mark.parametrize("path", sorted((EVIDENCE / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_each_log_has_three_seeds_and_a_picture_and_is_in_the_tables(path):
    log = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["seed"] for line in log} == {1, 2, 3} and path.with_suffix(".png").exists()
    assert path.stem in tables.TITLES
