"""--monitor-alarm rescue: a run whose attention collapses under fairseq-train goes on, and its checkpoints are of use."""

import functools

import pytest
import torch
from fairseq.optim import FP16Optimizer
from fairseq.trainer import Trainer

from fairseq_sigma.rescue import RescueOnAlarm
from stable_core import fold_state_dict
from stable_monitor.records import Run, load, read

from .test_monitor import EVERY, SIGMA, STOCK, assert_same, run

LAYER = "decoder.layers.0.encoder_attn"
FLAGS = ("--lr", 0.001, "--weight-decay", 0.01, "--batch-size", 4)  # an epoch is longer than the runs
RESCUE = (EVERY, 1, "--monitor-alarm", "rescue", *FLAGS)


@pytest.fixture
def collapse(monkeypatch):
    """W_q and W_k of a layer are blown up after the second update, in the fp32 copies too, if there are any."""
    train_step = Trainer.train_step

    @functools.wraps(train_step)
    def wrapped(self, samples, raise_oom=False):
        if self.get_num_updates() == 2:
            optimizer = self.optimizer
            copies = dict(
                zip(getattr(optimizer, "fp16_params", []), getattr(optimizer, "fp32_params", []), strict=True)
            )
            with torch.no_grad():
                for name, p in self.get_model().get_submodule(LAYER).named_parameters():
                    if name in ("q_proj.weight", "k_proj.weight") or name.endswith("gamma"):
                        for x in (p, copies.get(p, torch.empty(0))):
                            x *= 60
        return train_step(self, samples, raise_oom)

    monkeypatch.setattr(Trainer, "train_step", wrapped)


def moments(checkpoint) -> list[dict]:
    return list(checkpoint["last_optimizer_state"]["state"].values())


def assert_same_moments(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, x in a.items():
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(b[key])), key


def test_a_rescue_changes_queries_and_keys_and_nothing_else(train, collapse, tmp_path):
    """Against the run that is only warned: the checkpoint of the update after which the alarm rings."""
    warned = run(train, "warned", STOCK, 3, EVERY, 1, *FLAGS, "--store-ema")
    rescued = run(train, "rescued", STOCK, 3, *RESCUE, "--store-ema")
    names = [f"{LAYER}.{x}_proj" for x in "kq"]
    assert rescued["extra_state"]["rescued"] == names
    changed = {f"{name}.{x}" for name in names for x in ("weight", "bias")}
    for key, x in warned["model"].items():
        if key not in changed:
            assert torch.equal(rescued["model"][key], x), key
    for name in names:
        W = warned["model"][f"{name}.weight"]
        norm = torch.linalg.matrix_norm(W, 2)
        torch.testing.assert_close(fold_state_dict(rescued["model"])[f"{name}.weight"], W / norm)
        torch.testing.assert_close(rescued["model"][f"{name}.bias"], warned["model"][f"{name}.bias"] / norm)
    averaged = fold_state_dict(rescued["extra_state"]["ema"])
    for key, x in warned["extra_state"]["ema"].items():
        torch.testing.assert_close(averaged[key], x)
    (theirs, ours), (group, new) = (
        [x["last_optimizer_state"]["state"] for x in (warned, rescued)],
        rescued["last_optimizer_state"]["param_groups"],
    )
    assert len(theirs.keys() - ours.keys()) == 4 and not ours.keys() - theirs.keys()  # the gammas have none yet
    for index, state in ours.items():
        assert_same_moments(state, theirs[index])
    assert group["weight_decay"] == 0.01 and new["weight_decay"] == 0 and len(new["params"]) == 2
    found = Run("run", *load(tmp_path / "rescued"))
    assert [(mark["step"], mark["layer"]) for mark in found.rescues] == [(2, LAYER)]


@pytest.mark.parametrize(
    "arch, flags",
    [
        (STOCK, ("--store-ema", "--ema-fp32", "--ema-decay", 0.9)),
        ((*SIGMA, "--qkv", "joint"), ("--update-freq", 2)),
        (STOCK, ("--memory-efficient-bf16",)),
        (STOCK, ("--amp", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 4, "--checkpoint-activations")),
    ],
    ids=["ema", "sigma", "bf16", "amp"],
)
def test_a_rescued_run_resumes_bitwise(train, collapse, arch, flags, tmp_path):
    straight = run(train, "straight", arch, 5, *RESCUE, *flags)
    run(train, "resumed", arch, 4, *RESCUE, *flags)
    resumed = run(train, "resumed", arch, 5, *RESCUE, *flags)
    assert_same(straight, resumed)
    for a, b in zip(moments(straight), moments(resumed), strict=True):
        assert_same_moments(a, b)
    average, again = (x["extra_state"].get("ema_fp32_params", {}) for x in (straight, resumed))
    assert average.keys() == again.keys() and all(torch.equal(x, again[key]) for key, x in average.items())
    entropies = [min(record["layers"][LAYER]["entropy"]) for record in read(tmp_path / "straight")]
    assert entropies[2] < 0.1 and min(entropies[3:]) > 1


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_fp32_copies_stay_what_they_are(train, collapse, flag, tmp_path, monkeypatch):
    """Those of weights that a rescue leaves alone; the others', and a gamma's, are those of the model."""
    seen, call = [], RescueOnAlarm.__call__

    def wrapped(self, alarm):
        optimizer = self._trainer.optimizer
        before = {p: (copy, copy.clone(), dict(optimizer.optimizer.state[copy]))
                  for p, copy in zip(optimizer.fp16_params, optimizer.fp32_params, strict=True)}  # fmt: skip
        done = call(self, alarm)
        seen.append((before, optimizer, self._trainer.get_model()))
        return done

    monkeypatch.setattr(RescueOnAlarm, "__call__", wrapped)
    run(train, "run", STOCK, 3, *RESCUE, flag)
    ((before, optimizer, model),) = seen
    assert isinstance(optimizer, FP16Optimizer)
    names = {p: name for name, p in model.named_parameters()}
    held = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in optimizer.fp32_params} and len(held) == len(before) + 2 == len(
        names
    )
    rounded = 0
    for p, copy in zip(optimizer.fp16_params, optimizer.fp32_params, strict=True):
        assert torch.equal(copy.to(p.dtype), p) and p in names and copy.grad is not None
        if p not in before or names[p].startswith(tuple(f"{LAYER}.{x}_proj" for x in "qk")):
            assert copy not in optimizer.optimizer.state
        else:
            old, value, state = before[p]
            assert copy is old and torch.equal(copy, value) and optimizer.optimizer.state[copy].keys() == state.keys()
            rounded += not torch.equal(copy, p.float())
    assert rounded > 10
    run(train, "run", STOCK, 5, *RESCUE, flag)  # resumes
    assert min(read(tmp_path / "run")[4]["layers"][LAYER]["entropy"]) > 1
