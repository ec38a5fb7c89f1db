"""recipes/lr_sensitivity: its sweep, small, and its README's tables against the logs."""

import json
from pathlib import Path

import pytest
import torch

from recipes.gpt import prepare
from recipes.lr_sensitivity import run, train
from recipes.lr_sensitivity.train import STACKS, schedule
from stable_monitor.outcomes import Outcome, summarise, table

RECIPE = Path(run.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    prepare.write("to be, or not to be: that is the question. " * 200, folder)
    return folder


def test_a_small_sweep(data, tmp_path, capsys):
    options = ["gpt", "--data", str(data), "--output", str(tmp_path), "--updates", "2", "--seeds", "1", "--jobs", "1"]
    assert run.main([*options, "--rates", "1e-3", "1e-2", "--variants", "sigma"]) == 0
    assert "| sigma | " in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("variant", run.VARIANTS)
def test_each_variant_trains(variant, data, tmp_path):
    flags = run.VARIANTS[variant].split()
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
def test_the_tables_of_the_readme_are_those_of_the_logs(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    outcomes = [
        Outcome(**{**line, "final": float("nan") if line["final"] is None else line["final"]}) for line in lines
    ]
    assert {outcome.seed for outcome in outcomes} == {1, 2, 3} and path.with_suffix(".png").exists()
    assert table(summarise(outcomes)) in (RECIPE / "README.md").read_text()
