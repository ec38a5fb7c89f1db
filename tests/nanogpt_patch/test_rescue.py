"""monitor_alarm: a collapsed run is rescued or stopped, and resumed; and σReparam given to a plain checkpoint.

At the rate of these runs attention collapses in the second update. Their data are a single block, so that a resumed run, whose
random numbers train.py draws anew, sees the batches that it would have seen.
"""

import re

import pytest
import torch

from hf_stable.convert_nanogpt import from_nanogpt
from nanogpt_patch.alarm import action
from nanogpt_patch.model import GPT, GPTConfig
from stable_core import sigma_layers
from stable_monitor import Alarm, rescue_checkpoint
from stable_monitor.records import read

from .test_launch import CHECKOUT, TINY, checkout, importable, launch, losses  # noqa: F401

COLLAPSING = [*TINY, "--norm=layernorm", "--attention=dot", "--init=stock", "--learning_rate=0.3", "--monitor_every=1"]
RESCUED = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


@pytest.fixture
def one_block(checkout):  # noqa: F811
    for split in ("train", "val"):
        path = checkout / "data" / "tiny" / f"{split}.bin"
        path.write_bytes(path.read_bytes()[: 2 * 17])
    return checkout


def saved(checkout, out: str, file: str = "ckpt.pt") -> dict:  # noqa: F811
    return torch.load(checkout / out / file, weights_only=False)


def built(checkpoint: dict) -> GPT:
    model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    model.load_state_dict(checkpoint["model"])
    return model


def moments(checkpoint: dict) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's state by the names of the plain model's parameters; of a rescued model gammas come last."""
    names = [name.replace("parametrizations.", "").replace(".original", "") for name in checkpoint["model"]]
    state, groups = checkpoint["optimizer"]["state"], checkpoint["optimizer"]["param_groups"]
    matrices, vectors, gammas = [], [], []
    for name, x in zip(names, checkpoint["model"].values(), strict=True):
        if name.endswith(("weight", "bias")) and name != "lm_head.weight":
            (matrices if x.ndim > 1 else vectors).append(name)
        elif name.endswith("gamma"):
            (gammas if "rescued" in groups[1] else vectors).append(name)
    indices = [index for group in groups for index in group["params"]]
    found = zip([*matrices, *vectors, *gammas], indices, strict=True)
    return {name: state.get(index, {}) for name, index in found if not name.endswith("gamma")}


def test_a_rescued_run_resumes_bitwise_samples_and_converts(one_block):
    settings = [*COLLAPSING, "--monitor_alarm=rescue"]
    whole = losses(launch(one_block, "train.py", *settings, "--max_iters=12", "--out_dir=whole"))
    first = launch(one_block, "train.py", *settings, "--max_iters=6", "--out_dir=cut")
    assert [line.split(":")[0] for line in first.stderr.splitlines() if line.startswith("rescued")] == [
        f"rescued {name.removesuffix('.c_attn')}" for name in RESCUED
    ]
    assert "no optimizer announced it" not in first.stderr
    marks = [mark["layer"] for record in read(one_block / "cut") for mark in record.get("rescues", [])]
    assert [f"{layer}.c_attn" for layer in marks] == RESCUED
    again = losses(launch(one_block, "train.py", *settings, "--max_iters=12", "--out_dir=cut", "--init_from=resume"))
    assert losses(first)[:6] + again == whole
    ours, theirs = saved(one_block, "cut"), saved(one_block, "whole")
    assert ours["iter_num"] == 12 and ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(x, theirs["model"][name]) for name, x in ours["model"].items())
    assert [name for name, _ in sigma_layers(built(ours))] == RESCUED
    for index, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(x, ours["optimizer"]["state"][index][name]) for name, x in state.items())

    if CHECKOUT is None or importable("tiktoken"):
        sample = ["--out_dir=cut", "--device=cpu", "--dtype=float32", "--num_samples=1", "--max_new_tokens=3"]
        sampled = launch(one_block, "sample.py", *sample, "--start=A")
        assert sampled.returncode == 0, sampled.stderr[-2000:]
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        logits = built(ours)(tokens, tokens)[0]
        torch.testing.assert_close(from_nanogpt(ours)(tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_is_rescued_from_its_checkpoint(one_block, capsys):
    stopped = launch(one_block, "train.py", *COLLAPSING, "--monitor_alarm=stop", "--out_dir=a")
    assert stopped.returncode == 3
    (line,) = (line for line in stopped.stderr.splitlines() if line.startswith("nanogpt_patch: "))
    path = one_block / "a" / "ckpt_alarm.pt"
    assert ": transformer.h.0.attn has collapsed" in line and f"rescue_checkpoint {path} NEW/ckpt.pt" in line
    assert not (one_block / "a" / "ckpt.pt").exists()
    before, new = saved(one_block, "a", path.name), one_block / "b" / "ckpt.pt"
    assert before["iter_num"] == len(re.findall(r"iter \d: loss", stopped.stdout)) + 1
    assert rescue_checkpoint.main([str(path), str(new), "--layers", *(x.removesuffix(".c_attn") for x in RESCUED)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("transformer.h.0.attn: |W_q| ")
    now = before["iter_num"]
    resume = [
        "--init_from=resume",
        "--out_dir=b",
        f"--eval_interval={now}",
        f"--max_iters={now}",
    ]  # saves what it loaded
    assert len(losses(launch(one_block, "train.py", *COLLAPSING, *resume))) == 1
    after = saved(one_block, "b")
    assert [name for name, _ in sigma_layers(built(after))] == RESCUED
    old, now = moments(before), moments(after)
    assert old.keys() == now.keys()
    for name, state in old.items():
        if name.endswith("attn.c_attn.weight"):
            assert not now[name]
        else:
            assert state and all(torch.equal(x, now[name][key]) for key, x in state.items()), name
            assert torch.equal(before["model"][name], after["model"][name])


def test_a_plain_checkpoint_is_given_sigma_reparam(one_block):
    settings = [*COLLAPSING, "--learning_rate=0.01", "--max_iters=6", "--eval_interval=6"]
    assert losses(launch(one_block, "train.py", *settings, "--out_dir=a"))
    before = saved(one_block, "a")
    resume = [*settings, "--init_from=resume", "--out_dir=a", "--reparam=sigma"]
    done = launch(one_block, "train.py", *resume)
    assert "From the command line: reparam = sigma, gamma_init = spectral" in done.stdout
    assert len(losses(done)) == 1  # it saves what it has loaded, and makes an update
    after = saved(one_block, "a")
    assert after["model_args"]["reparam"] == "sigma" and len([*sigma_layers(built(after))]) == 8
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(built(after)(tokens)[0], built(before)(tokens)[0], rtol=1e-4, atol=1e-5)
    old, now = moments(before), moments(after)
    assert old.keys() == now.keys() and all(old.values())
    for name, state in old.items():
        assert all(torch.equal(x, now[name][key]) for key, x in state.items()), name
    again = launch(one_block, "train.py", *settings, "--init_from=resume", "--out_dir=a")  # now it is the checkpoint's
    assert losses(again) == losses(done) and "From the checkpoint: reparam = sigma" in again.stdout


def test_what_cannot_be_rescued_is_saved_and_said_in_one_line(tmp_path, capsys):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=5))
    optimizer = model.configure_optimizers(0.1, 0.1, (0.9, 0.95), "cpu")
    model.lm_head.weight.data.fill_(torch.nan)
    tokens = torch.arange(4)[None]
    script = {"model": model, "X": tokens, "Y": tokens, "out_dir": tmp_path, "master_process": True, "iter_num": 6}
    act = action({"monitor_alarm": "rescue", **script}, optimizer)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        act(Alarm(7, "transformer.h.0.attn", torch.nan, 0.1, 1.0, 0.0))
    (line,) = capsys.readouterr().err.splitlines()
    path = tmp_path / "ckpt_alarm.pt"
    assert ended.value.code == 3 and line == (
        "nanogpt_patch: update 7: transformer.h.0.attn has collapsed and was not rescued: transformer.h.0.attn: its entropy is "
        f"not a number, and cannot be rescued: go back to a sound checkpoint; saved {path}"
    )
    assert torch.load(path)["iter_num"] == 7 and not any(sigma_layers(model))
