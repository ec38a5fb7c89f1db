"""The temperature intervention: what it does to attention, that runs share their past, and the command with little data."""

import json
from itertools import islice

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from recipes.temperature_intervention import temperature_intervention as recipe
from recipes.temperature_intervention.temperature_intervention import FIGURES, NONE, Run, Setting, main, read, train


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    monkeypatch.setattr(recipe, "IMAGES", 2 * recipe.BATCH)
    monkeypatch.setattr(recipe, "HESSIAN_IMAGES", 8)


def test_runs_are_the_same_until_the_intervention():
    undisturbed, changed = (list(islice(train(s, 1, 10), 4)) for s in (NONE, Setting(0.2, 0.1)))
    assert changed[:2] == undisturbed[:2]
    assert [row["tau"] for row in changed] == [1, 1, 0.1, 0.1]
    assert changed[2]["entropy"] < undisturbed[2]["entropy"]
    assert changed[2]["hessian"] != undisturbed[2]["hessian"]  # measured at the new temperature
    assert changed[2]["loss"] != undisturbed[2]["loss"]
    assert next(train(NONE, 2, 10))["loss"] != undisturbed[0]["loss"]


def test_the_entropy_is_that_of_logits_divided_by_tau(monkeypatch):
    """Against softmax written out, on the first batch of a model whose logits are large enough to matter."""
    seen, settings = [], {}

    class Spy(VisionTransformer):
        def __init__(self, **given):
            super().__init__(**given)
            settings.update(given)
            self.blocks[0].attn.qkv.weight.data.mul_(3)
            self.blocks[0].attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))

    monkeypatch.setattr(recipe, "VisionTransformer", Spy)
    entropies = {}
    for tau in (1, 0.1):
        entropies[tau] = next(train(Setting(0, tau), 1, 10))["entropy"]
    x = seen[0]
    torch.manual_seed(1)  # the model as it was before its first update
    attention = Spy(**settings).blocks[0].attn
    q, k, _ = attention.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    for tau, entropy in entropies.items():
        p = (q @ k.mT * attention.scale / tau).softmax(-1)
        assert entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item(), abs=2e-4)
    assert entropies[0.1] < entropies[1] - 0.5


def test_the_command_draws_and_does_not_repeat_finished_runs(tmp_path, monkeypatch, capsys):
    command = ["--figure", "2", "--seeds", "1", "--epochs", "10", "--output", str(tmp_path)]
    monkeypatch.setattr(recipe, "sharpness", lambda *args, **settings: torch.arange(5.0, 0, -1))
    trained = []

    def interrupted(setting, seed, epochs):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(setting)
        yield from train(setting, seed, epochs)

    monkeypatch.setattr(recipe, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert list(read(tmp_path / "log.jsonl")) == [Run(setting, 1, 10) for setting in FIGURES[2][:2]]
    trained.clear()
    assert main(command) == 0
    assert trained == [FIGURES[2][2]]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["rows"]) for line in lines] == [10] * 3
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    assert "figure2.png" in capsys.readouterr().out.replace("\n", "")  # rich breaks a long path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "25"], "--epochs 25: allowed are multiples of 10"),
        (["--seeds", "1", "1"], "--seeds 1 1: allowed are whole numbers from 0, each once"),
        (["--figure", "3"], "invalid choice"),
    ],
)
def test_a_bad_value_is_told_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
