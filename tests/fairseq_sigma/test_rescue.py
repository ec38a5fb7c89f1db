"""--monitor-alarm rescue: a run whose attention collapses under fairseq-train goes on, and its checkpoints are of use."""

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from fairseq.optim import FP16Optimizer
from fairseq.trainer import Trainer

from fairseq_sigma import average, export
from fairseq_sigma.rescue import RescueOnAlarm, average_gradients
from stable_core import fold, fold_state_dict, sigma_reparam
from stable_core.bounding import LIMIT
from stable_core.sigma_layers import sigma_layers
from stable_monitor import rescue_checkpoint
from stable_monitor.records import Run, load, read

from .conftest import TINY, USER_DIR
from .test_monitor import EVERY, SIGMA, STOCK, assert_same, run

LAYER = "decoder.layers.0.encoder_attn"
FLAGS = ("--lr", 0.001, "--weight-decay", 0.01, "--batch-size", 4)  # an epoch is longer than the runs
RESCUE = (EVERY, 1, "--monitor-alarm", "rescue", *FLAGS)


def collapsing(train_step):
    """W_q and W_k of a layer are blown up after the second update, in the fp32 copies too, if there are any."""

    @functools.wraps(train_step)
    def wrapped(self, samples, raise_oom=False):
        if self.get_num_updates() == 2:
            own, copies = getattr(self.optimizer, "fp16_params", []), getattr(self.optimizer, "fp32_params", [])
            if isinstance(copies, dict):  # one, of all
                copies = copies[None].data.split([p.numel() for p in own])
            copies = {p: copy.view(p.shape) for p, copy in zip(own, copies, strict=True)}
            with torch.no_grad():
                for name, p in self.get_model().get_submodule(LAYER).named_parameters():
                    if name in ("q_proj.weight", "k_proj.weight") or name.endswith("gamma"):
                        for x in (p, copies.get(p, torch.empty(0))):
                            x *= 60
        return train_step(self, samples, raise_oom)

    return wrapped


@pytest.fixture
def collapse(monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", collapsing(Trainer.train_step))


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
        torch.testing.assert_close(fold_state_dict(rescued["model"])[f"{name}.weight"], W * (LIMIT / norm))
        torch.testing.assert_close(rescued["model"][f"{name}.bias"], warned["model"][f"{name}.bias"] * (LIMIT / norm))
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
    assert average.keys() == again.keys()
    assert all(torch.equal(x, again[key]) for key, x in average.items() if not key.endswith(".u"))  # which nobody reads
    entropies = [min(record["layers"][LAYER]["entropy"]) for record in read(tmp_path / "straight")]
    assert entropies[2] < 0.1 and min(entropies[3:]) > 0.6


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_fp32_copies_stay_what_they_are(train, collapse, flag, tmp_path, monkeypatch):
    """Those of weights that a rescue leaves alone; the others', and a gamma's, are those of the model."""
    seen, call = [], RescueOnAlarm.__call__

    def wrapped(self, alarm):
        optimizer = self._trainer.optimizer
        before = {p: (fp32, fp32.clone(), dict(optimizer.optimizer.state[fp32]))
                  for p, fp32 in zip(optimizer.fp16_params, optimizer.fp32_params, strict=True)}  # fmt: skip
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
    for p, fp32 in zip(optimizer.fp16_params, optimizer.fp32_params, strict=True):
        assert torch.equal(fp32.to(p.dtype), p) and p in names and fp32.grad is not None
        if p not in before or names[p].startswith(tuple(f"{LAYER}.{x}_proj" for x in "qk")):
            assert fp32 not in optimizer.optimizer.state
        else:
            old, value, state = before[p]
            assert fp32 is old and torch.equal(fp32, value) and optimizer.optimizer.state[fp32].keys() == state.keys()
            rounded += not torch.equal(fp32, p.float())
    assert rounded > 10
    run(train, "run", STOCK, 5, *RESCUE, flag)  # resumes
    assert min(read(tmp_path / "run")[4]["layers"][LAYER]["entropy"]) > 0.6


@pytest.fixture
def flat(monkeypatch):
    """--fp16 with its one flat copy of all weights, as on a GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(FP16Optimizer, "build_optimizer", FP16Optimizer.build_optimizer.__func__.__wrapped__)


def test_one_flat_copy_is_taken_apart(train, collapse, flat, tmp_path):
    """The run is then bit for bit the one whose copies are apart from the start."""
    apart = run(train, "apart", STOCK, 4, *RESCUE, "--fp16", "--fp16-no-flatten-grads")
    whole = run(train, "whole", STOCK, 2, *RESCUE, "--fp16")
    assert len(moments(whole)) == 1
    whole = run(train, "straight", STOCK, 4, *RESCUE, "--fp16")
    assert_same(apart, whole)
    for a, b in zip(moments(apart), moments(whole), strict=True):
        assert_same_moments(a, b)
    assert len(moments(run(train, "straight", STOCK, 5, *RESCUE, "--fp16"))) == len(moments(apart))  # resumes


def test_what_cannot_be_rescued_ends_with_a_checkpoint_to_rescue(train, collapse, tmp_path, monkeypatch, caplog):
    """And that, rescued by the command, is what the rescue under way would have saved; fairseq-train goes on from it."""
    straight = [run(train, "straight", STOCK, updates, *RESCUE, "--store-ema") for updates in (3, 5)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "consolidate_state_dict", lambda self: None, raising=False)
        stopped = run(train, "run", STOCK, 5, *RESCUE, "--store-ema")
    assert (
        "--monitor-alarm rescue: --zero-sharding os: its optimizer does not hold the weights one by one" in caplog.text
    )
    assert f"stable_monitor.rescue_checkpoint CHECKPOINT OUT --layers {LAYER}" in caplog.text
    assert stopped["optimizer_history"][-1]["num_updates"] == 3 and "rescued" not in stopped["extra_state"]
    path, out = tmp_path / "run" / "checkpoint_last.pt", tmp_path / "out.pt"
    assert rescue_checkpoint.main([str(path), str(out), "--layers", LAYER]) == 0
    for expected, found in zip(
        straight,
        (torch.load(out), run(train, "on", STOCK, 5, *RESCUE, "--store-ema", "--restore-file", out)),
        strict=True,
    ):
        assert_same(expected, found)
        assert found["extra_state"]["rescued"] == expected["extra_state"]["rescued"]
        for a, b in zip(moments(expected), moments(found), strict=True):
            assert_same_moments(a, b)


@pytest.mark.parametrize("arch", [STOCK, SIGMA])
def test_others_read_a_rescued_checkpoint(train, collapse, arch, tmp_path):
    state = run(train, "run", arch, 3, *RESCUE)["model"]
    path, exported, mean = (str(tmp_path / x) for x in ("run/checkpoint_last.pt", "exported.pt", "mean.pt"))
    assert export.main([path, exported]) == 0 and average.main([path, path, mean]) == 0
    tokens = torch.tensor([[4, 5, 6, 2], [7, 8, 9, 2]])
    (trained,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path])
    plain = fold_state_dict(state)
    for file in (path, exported, mean):
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([file])
        if arch is STOCK or file == exported:
            assert not any("parametrizations" in key for key in model.state_dict())
        if file != exported:  # DeepNorm is folded there, too
            folded = model if arch is STOCK else fold(model)
            torch.testing.assert_close(dict(folded.state_dict()), plain, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(*(m.eval()(tokens, torch.tensor([4, 4]), tokens)[0] for m in (model, trained)))


@pytest.fixture
def loaded(monkeypatch):
    """loaded -> (model's state dict, moments by name, average) of the last run when it had loaded its checkpoint."""
    found, load_checkpoint = [], Trainer.load_checkpoint

    def wrapped(self, *args, **kwargs):
        extra = load_checkpoint(self, *args, **kwargs)
        optimizer, model = self.optimizer, self.get_model()
        copies = dict(zip(getattr(optimizer, "fp16_params", []), getattr(optimizer, "fp32_params", []), strict=True))
        held = {name: optimizer.optimizer.state.get(copies.get(p, p), {}) for name, p in model.named_parameters()}
        found[:] = copy.deepcopy((model.state_dict(), held, self.ema.get_model().state_dict() if self.ema else None))
        return extra

    monkeypatch.setattr(Trainer, "load_checkpoint", wrapped)
    return found


PLAIN, SPECTRAL = ("deepnorm_transformer_6l",), (*SIGMA, "--gamma-init", "spectral")


@pytest.mark.parametrize("flag", ["--store-ema", "--bf16", "--fp16"])
def test_a_plain_run_goes_on_with_sigma_reparam(train, loaded, flag, tmp_path, request):
    """Function and moments are the plain run's."""
    run(train, "plain", PLAIN, 3, *FLAGS, flag)
    path = tmp_path / "plain" / "checkpoint_last.pt"
    if flag == "--fp16":
        request.getfixturevalue("flat")
        whole = torch.load(path)
        states = list(whole["last_optimizer_state"]["state"].values())
        flat = {x: torch.cat([state[x].flatten() for state in states]) for x in ("exp_avg", "exp_avg_sq")}
        whole["last_optimizer_state"]["state"] = {0: {"step": states[0]["step"], **flat}}
        whole["last_optimizer_state"]["param_groups"][0]["params"] = [0]
        torch.save(whole, tmp_path / "whole.pt")
    plain = torch.load(path)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if flag == "--store-ema" else {"rtol": 2e-2, "atol": 1e-3}
    again = run(
        train, "sigma", SPECTRAL, 4, *FLAGS, flag, "--restore-file", tmp_path / "whole.pt" if flag == "--fp16" else path
    )
    state, held, average = loaded
    assert any("gamma" in key for key in state)
    folded = {key: x.float() for key, x in fold_state_dict(state).items()}
    torch.testing.assert_close(folded, dict(plain["model"]), **tolerance)
    if flag == "--store-ema":
        torch.testing.assert_close(fold_state_dict(average), dict(plain["extra_state"]["ema"]), **tolerance)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    theirs = dict(zip((name for name, _ in model.named_parameters()), moments(plain), strict=True))
    for name, moment in held.items():
        if name.endswith("gamma"):
            assert moment == {}
        else:
            assert_same_moments(moment, theirs[name.replace("parametrizations.weight.original", "weight")])
    straight = run(
        train, "plain", PLAIN, 4, *FLAGS, flag, "--fp16-no-flatten-grads"
    )  # the next gradient is the same, too
    for key in ("encoder.embed_tokens.weight", "decoder.layers.1.fc2.bias"):
        torch.testing.assert_close(again["model"][key], straight["model"][key], **tolerance)


def test_moments_that_do_not_fit_start_anew_with_a_warning(train, loaded, tmp_path, caplog):
    checkpoint = run(train, "plain", PLAIN, 1, *FLAGS)
    group = checkpoint["last_optimizer_state"]["param_groups"][0]
    checkpoint["last_optimizer_state"]["param_groups"] = [group | {"params": group["params"][:9]}]
    torch.save(checkpoint, tmp_path / "other.pt")
    run(train, "sigma", SPECTRAL, 2, *FLAGS, "--restore-file", tmp_path / "other.pt")
    assert not any(loaded[1].values())
    assert "the optimizer's moments start anew: the saved optimizer has other groups" in caplog.text
    caplog.clear()
    run(train, "tuned", SPECTRAL, 1, *FLAGS, "--finetune-from-model", tmp_path / "other.pt")
    torch.testing.assert_close(dict(fold_state_dict(loaded[0])), dict(checkpoint["model"]), rtol=1e-5, atol=1e-6)
    assert "anew" not in caplog.text and not any(loaded[1].values())


def test_legacy_ddp_averages_what_is_new(monkeypatch):
    """Two processes, of which the other's gradients are all 3."""
    monkeypatch.setattr(distributed_utils, "get_world_size", lambda group: 2)
    monkeypatch.setattr(distributed_utils, "all_reduce", lambda x, group: x.add_(3 / 2))
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    wrapped = LegacyDistributedDataParallel(model, None)
    sigma_reparam(model)
    average_gradients(wrapped, [sigma.gamma for _, sigma in sigma_layers(model)])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    wrapped.all_reduce_grads()
    assert len(list(model.parameters())) == 6 and all((p.grad == 2).all() for p in model.parameters())


SCRIPT = """
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main
from tests.fairseq_sigma.test_rescue import collapsing

Trainer.train_step = collapsing(Trainer.train_step)  # in the spawned processes, too
if __name__ == "__main__":
    cli_main()
"""


@pytest.mark.slow  # tests/stable_monitor/test_rescue.py has two processes
@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_two_processes_are_rescued_and_resume_as_one(train, collapse, backend, corpus, tmp_path):
    flags = [*RESCUE[:4], "--optimizer", "nag", "--lr", 0.1, "--weight-decay", 0.01]
    whole = run(train, "one", STOCK, 5, *flags, "--batch-size", 64)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", corpus, "--user-dir", USER_DIR, "--arch", *STOCK, *TINY, *flags]
    command += ["--batch-size", 32, "--save-dir", tmp_path / "two", "--no-epoch-checkpoints"]
    command += ["--distributed-world-size", 2, "--ddp-backend", backend, "--max-update"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["", *sys.path]).strip(os.pathsep)}
    for updates in (4, 5):
        done = subprocess.run(
            [*map(str, command), str(updates)], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "checkpoint_last.pt", map_location="cpu")
    assert whole["model"].keys() == two["model"].keys() and two["extra_state"]["rescued"]
    for key, x in whole["model"].items():
        torch.testing.assert_close(two["model"][key], x, rtol=2e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}")
