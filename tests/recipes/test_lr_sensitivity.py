"""recipes/lr_sensitivity: its sweep, small, and its README's tables against the logs."""

import json
import math
from pathlib import Path

import pytest
import torch

from recipes.gpt import prepare
from recipes.lr_sensitivity import alarms, figures, logs, run, train
from recipes.lr_sensitivity.train import STACKS, schedule
from stable_monitor.outcomes import Outcome, summarise
from stable_monitor.records import read

RECIPE = Path(run.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    prepare.write("to be, or not to be: that is the question. " * 200, folder)
    return folder


@pytest.mark.parametrize("variant", run.ALL)
def test_each_variant_trains(variant, data, tmp_path):
    flags = run.ALL[variant].split()
    settings = ["--out", str(tmp_path), "--data", str(data), "--lr", "1e-3", "--seed", "1", "--updates", "1"]
    for stack in ("gpt", "vit") if variant == "stable-sigma" else ("gpt",):
        assert train.main([stack, *settings, *flags]) == 0


def test_plain_is_the_model_of_the_stack(data):
    """Our ViT with plain options starts as timm's and GPT's are nanoGPT's: the same loss of the same batch."""
    ours, timms = STACKS["vit"](data, 1e-3, 1, {}), STACKS["vit"](data, 1e-3, 1)
    timms.model.load_state_dict(ours.model.state_dict())
    batch = next(ours.batches(1))
    torch.testing.assert_close(ours.loss(batch), timms.loss(batch))


def test_the_schedule_is_warm_up_and_a_cosine_to_zero():
    assert [round(schedule(u, 200), 4) for u in (0, 4, 9, 100, 199)] == [0.1, 0.5, 0.995, 0.5, 0.0001]


@pytest.mark.parametrize("path", sorted((RECIPE / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_each_log_has_three_seeds_and_a_picture_and_is_in_the_tables(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["seed"] for line in lines} == {1, 2, 3} and path.with_suffix(".png").exists()
    assert path.stem in figures.TITLES


def test_the_readmes_numbers_are_those_of_the_logs():
    readme, tables = (RECIPE / "README.md").read_text(), (figures.RESULTS / "tables.md").read_text()
    assert figures.in_short() in readme
    lost, heard, in_time, sound, false = map(int, tables.splitlines()[-1].strip("| ").split(" | ")[1:])
    told = f"hears {heard} of {lost} lost runs, {in_time} of them in time, and rings in {false} of {sound} sound ones"
    assert told in " ".join(readme.split())
    guide = " ".join((RECIPE.parents[1] / "docs" / "my_run_diverges.md").read_text().split())
    runs = [run for name in figures.TITLES for run in alarms.read(figures.RESULTS / f"{name}.jsonl")]
    more, sooner, wrong = alarms.tell(runs, 0.5, 20.0)
    assert f"{heard}, {in_time} of them before" in guide and f"rings in {false} of {sound} sound runs" in guide
    assert f"hears {more}, {sooner} in time, and rings in {wrong}" in guide


def line(lr: float, final: float | None, losses: list[float], entropy: list[float], logit: float) -> dict:
    layers = {"a": {"entropy": entropy, "logit": [logit] * len(entropy)}}
    return {"lr": lr, "final": final, "steps": [0, 10, 20, 30], "loss": losses, "layers": layers}


def test_an_alarm_is_in_time_where_it_rings_before_the_loss_is_lost():
    slow = line(1e-4, 3.0, [4.0, 3.8, 3.6, 3.4], [1.0, 1.0, 1.0, 1.0], 1.0)
    best = line(1e-3, 2.0, [4.0, 3.0, 2.5, 2.0], [1.0, 0.9, 0.8, 0.7], 9.0)
    near = line(1e-2, 2.05, [4.0, 3.0, 2.5, 2.0], [1.0, 0.25, 0.2, 0.2], 20.0)
    lost = line(1e-1, 3.0, [4.0, 3.0, 3.0, 3.0], [1.0, 0.28, 0.28, 0.05], 200.0)
    nan = line(1.0, None, [4.0, 3.0, 2.5, 9.0], [1.0, 1.0, 1.0, 1.0], 1.0)
    runs = alarms.label([slow, best, near, lost, nan])
    assert [(run.line["lr"], run.lost) for run in runs] == [(1e-3, None), (1e-2, None), (1e-1, 20), (1.0, 30)]
    assert alarms.rings(lost, 0.3, 50.0) == 10 and alarms.rings(lost, 0.1, 50.0) == 30
    assert alarms.rings(near, 0.3, 50.0) is None and alarms.rings(near, 0.3, 0.0) == 10
    assert alarms.tell(runs, 0.3, 50.0) == (1, 1, 0)
    assert alarms.tell(runs, 0.1, 50.0) == (1, 0, 0)
    assert alarms.tell(runs, 0.3, 0.0) == (1, 1, 1)


def test_variants_are_apart_where_every_seed_says_so():
    losses = {"level": (2.0, 2.1), "steep": (2.0, 3.0), "between": (2.0, 2.5)}
    found = [
        Outcome(variant, lr, seed, 4.0, loss + (0.4 * seed if variant == "between" and lr == 1.0 else 0.0))
        for variant, ends in losses.items()
        for lr, loss in zip((0.1, 1.0), ends, strict=True)
        for seed in (1, 2)
    ]
    assert figures.apart(summarise(found)) == [("level", "steep"), ("level", "between")]


def test_a_sweep_becomes_a_log_and_its_figures(data, tmp_path, capsys):
    options = ["gpt", "--data", str(data), "--output", str(tmp_path), "--updates", "2", "--seeds", "1", "--jobs", "1"]
    assert run.main([*options, "--rates", "1e-3", "1e-2", "--variants", "sigma"]) == 0
    log = tmp_path / "gpt.jsonl"
    assert logs.main([str(tmp_path), str(log)]) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    record = read(tmp_path / "sigma-0.001-1")[0]
    layer = record["layers"]["transformer.h.0.attn"]
    found = lines[0]["layers"]["transformer.h.0.attn"]
    assert lines[0]["loss"] == [pytest.approx(record["loss"], abs=1e-4)] and lines[0]["verdict"] == "healthy"
    assert found["entropy"] == [pytest.approx(sorted(layer["entropy"])[1] / math.log(layer["keys"]), abs=1e-3)]
    assert found["logit"] == [pytest.approx(max(layer["max_logit"]), rel=1e-2)]
    assert figures.main([str(log)]) == 0 and log.with_suffix(".png").exists()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert alarms.main([str(log), "--picture", str(tmp_path / "alarms.png")]) == 0
    assert "0 lost runs" in capsys.readouterr().out
