"""--on-alarm rescue of the vision trainer: the collapsed run goes on, with its average, and the same command resumes it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recipes.vision import engine, train
from stable_core.checkpoint_file import read_checkpoint
from stable_core.folding import fold_state_dict
from stable_monitor import rescue_checkpoint
from stable_monitor.records import read
from tests.recipes.test_vision import Stop, settings

COLLAPSING = "--lr 0.3 --monitor-every 1 --on-alarm rescue --ema-decay 0.9 --epochs 3 --batch-size 256"


def interrupt(patch: pytest.MonkeyPatch, before: int) -> None:
    """Interrupts a run in the forward pass of this update."""
    criterion, updates = train.criterion, []

    def stopping(*args):
        loss_of = criterion(*args)

        def stop(model: nn.Module, batch: list) -> torch.Tensor:
            updates.append(1)
            if len(updates) == before:
                raise Stop
            return loss_of(model, batch)

        return stop

    patch.setattr(train, "criterion", stopping)


def test_a_rescued_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch, capsys):
    averaging, kept = engine.ModelEmaV3.update, engine._Loop._reparametrise_average

    def update(self, model, step=None):
        """Names, and one tensor by hand: timm pairs tensors by their order."""
        ours, theirs = self.module.state_dict(), model.state_dict()
        assert list(ours) == list(theirs)
        name = next((name for name in ours if name.endswith("attn.qkv.parametrizations.weight.0.gamma")), "norm.bias")
        expected = ours[name].lerp(theirs[name], 1 - self.get_decay(step))
        averaging(self, model, step)
        torch.testing.assert_close(self.module.state_dict()[name], expected)

    def keeps(self):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = self.ema.module(images)
            kept(self)
            torch.testing.assert_close(self.ema.module(images), before, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(engine.ModelEmaV3, "update", update)
    monkeypatch.setattr(engine._Loop, "_reparametrise_average", keeps)
    whole = train.train(settings(tmp_path / "whole", COLLAPSING))
    assert "rescued blocks." in capsys.readouterr().err
    marks = {mark["layer"] for record in read(tmp_path / "whole") for mark in record.get("rescues", [])}
    assert marks and "blocks.0.attn" in marks
    with monkeypatch.context() as patch:
        interrupt(patch, before=12)
        with pytest.raises(Stop):
            train.train(settings(tmp_path / "cut", COLLAPSING))
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    resumed = train.train(settings(tmp_path / "cut", COLLAPSING))
    for row in (*whole, *resumed):
        for name in ("seconds", "images_per_second"):
            row.pop(name)
    assert resumed == whole and len(whole) == 3
    for file in ("model.safetensors", "checkpoint-3/model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / file) for run in ("cut", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    gammas = {name.partition(".qkv.")[0] for name in ours if name.endswith("gamma")}
    assert gammas == marks
    ours, theirs = (read_checkpoint(tmp_path / run / "checkpoint-3" / "optimizer.bin") for run in ("cut", "whole"))
    for index, state in theirs["state"].items():
        assert all(torch.equal(x, ours["state"][index][name]) for name, x in state.items())
    assert ours["param_groups"] == theirs["param_groups"]


def test_a_stopped_run_may_go_on_with_rescue(tmp_path):
    options = COLLAPSING.replace("--ema-decay 0.9 --epochs 3", "--accumulation 2 --epochs 1")
    with pytest.raises(engine.EntropyCollapse):
        train.train(settings(tmp_path, f"{options} --on-alarm stop"))
    rows = train.train(settings(tmp_path, options))
    assert [row["epoch"] for row in rows] == [1] and "stopped" not in rows[0]


def test_what_cannot_be_rescued_ends_the_run_and_says_why(tmp_path, monkeypatch):
    def refuse(alarm):
        raise ValueError(f"{alarm.layer}: its weights are sharded already; bound them before fully_shard")

    monkeypatch.setattr(engine, "Rescue", lambda *_: refuse)
    with pytest.raises(engine.NotRescued, match=r"entropy collapse in blocks.0.attn.*not rescued: .*sharded"):
        train.train(settings(tmp_path, COLLAPSING))
    assert "sharded" in json.loads((tmp_path / "log.jsonl").read_text())["stopped"]


def test_a_checkpoint_is_rescued_and_the_command_goes_on_with_it(tmp_path, monkeypatch, capsys):
    """Weights, moments and the average's function are what they were, but for queries, keys and values of the two layers."""
    options = COLLAPSING.replace("--on-alarm rescue", "--on-alarm warn")
    with monkeypatch.context() as patch:
        interrupt(patch, before=7)
        with pytest.raises(Stop):
            train.train(settings(tmp_path / "old", options))
    attentions = ["blocks.0.attn", "blocks.1.attn"]
    assert rescue_checkpoint.main([str(tmp_path / "old"), str(tmp_path / "new"), "--layers", *attentions]) == 0
    assert f"wrote {tmp_path / 'new'}: have the command that trained" in capsys.readouterr().out
    old, new = ({path.name: path for path in (tmp_path / run / "checkpoint-1").iterdir()} for run in ("old", "new"))
    assert old.keys() == new.keys()

    before, after = (load_file(files["model.safetensors"]) for files in (old, new))
    inside = tuple(f"{name}.qkv." for name in attentions)
    assert {name for name in before.keys() ^ after.keys() if not name.startswith(inside)} == set()
    assert all(torch.equal(x, after[name]) for name, x in before.items() if not name.startswith(inside))
    before, after = (read_checkpoint(files["optimizer.bin"]) for files in (old, new))
    assert len(after["param_groups"][0]["params"]) == len(before["param_groups"][0]["params"]) + 2
    forgotten = 0
    for theirs, ours in zip(before["param_groups"], after["param_groups"], strict=True):
        for index, other in zip(theirs["params"], ours["params"], strict=False):
            state = after["state"].get(other, {})
            forgotten += not state
            assert all(torch.equal(x, before["state"][index][name]) for name, x in state.items())
    assert forgotten == 4  # weight and bias of each qkv
    before, after = (read_checkpoint(files["custom_checkpoint_0.pkl"]) for files in (old, new))
    torch.testing.assert_close(fold_state_dict(after), dict(before), rtol=1e-4, atol=1e-5)

    rows = train.train(settings(tmp_path / "new", options))
    assert [row["epoch"] for row in rows] == [1, 2, 3] and rows[0]["updates"] == 5
    assert {name for name in load_file(tmp_path / "new" / "checkpoint-3" / "model.safetensors") if "gamma" in name} == {
        f"{name}.qkv.parametrizations.weight.0.gamma" for name in attentions
    }
