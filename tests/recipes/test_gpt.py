"""recipes/gpt: its stability test's commands, and a small run from data to comparison."""

import json
import os
import pickle
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt_patch.launch import _assigned, check
from nanogpt_patch.model import GPT, STOCK, GPTConfig
from recipes.gpt import compare, muon, prepare
from tests.nanogpt_patch.test_launch import write_scripts
from tests.warm import WARM

RECIPES = Path(prepare.__file__).parent


@pytest.fixture
def checkout(tmp_path) -> Path:
    write_scripts(tmp_path / "nanoGPT")
    return tmp_path / "nanoGPT"


def recipe(checkout: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {"NANOGPT_DIR": str(checkout), "RUNS": str(checkout.parent / "runs"), **environment}
    command = ["bash", str(RECIPES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **WARM, **environment})


def settings_of(checkout: Path, line: str) -> dict:
    """What a command sets, the config files' settings with those of the command line over them."""
    words = shlex.split(line)
    script, arguments = check(words[words.index("nanogpt_patch") + 1 :])
    assert script == checkout / "train.py"
    settings = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        settings |= {name: value} if argument.startswith("--") else _assigned(Path(argument).read_text())
    return settings


def test_alpha_varies_the_norm_of_gpt2_alone(checkout):
    """Attention and first weights are those of the run with LayerNorm, and alpha = 0.5 is RMSNorm [ST, Sections 2 and 3.2]."""
    lines = recipe(checkout, "alpha.sh", DRY_RUN="1").stdout.splitlines()
    models = {}
    for s in (settings_of(checkout, line) for line in lines):
        ours = {name: s[name] for name in ("norm", "attention", "init")} | {"alpha": float(s.get("alpha", 0.475))}
        torch.manual_seed(0)
        config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50, bias=False, **ours)
        assert config.attention == "dot"
        models[ours["alpha"] if ours["norm"] == "stable" else ours["norm"]] = GPT(config).eval()
    stock = [p for p in models["layernorm"].parameters() if p.ndim > 1]
    for model in models.values():
        assert all(map(torch.equal, stock, [p for p in model.parameters() if p.ndim > 1]))
    for model in models.values():
        model.transformer.wpe.weight.data.mul_(1000)  # beside which eps, where each norm has its own, is nothing
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(models[0.5](tokens)[0], models["rmsnorm"](tokens)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(models[0.25](tokens)[0], models["rmsnorm"](tokens)[0], rtol=1e-2)


def test_the_stability_test(checkout):
    lines = recipe(checkout, "warmup.sh", DRY_RUN="1", SEEDS="1 2 3").stdout.splitlines()
    settings = [settings_of(checkout, line) for line in lines]
    assert len(settings) == 18 and {s["warmup_iters"] for s in settings} == {"0"}
    assert sorted({float(s["learning_rate"]) for s in settings}) == pytest.approx([6e-4, 1.2e-3, 2.4e-3])
    assert {(s["norm"], s["extra_seed"]) for s in settings} == {(n, e) for n in ("stable", "layernorm") for e in "123"}


def test_prepared_characters_are_the_text(tmp_path):
    text = "To be, or not to be: that is the question. " * 40
    (tmp_path / "text.txt").write_text(text)
    assert prepare.main(["--output", str(tmp_path / "data"), "--text", str(tmp_path / "text.txt")]) == 0
    meta = pickle.loads((tmp_path / "data" / "meta.pkl").read_bytes())
    parts = [np.fromfile(tmp_path / "data" / f"{name}.bin", np.uint16) for name in ("train", "val")]
    assert "".join(meta["itos"][i] for part in parts for i in part) == text
    assert len(parts[0]) == len(text) * 9 // 10
    assert meta["vocab_size"] == len(set(text)) == len(meta["stoi"])
    assert all(meta["itos"][i] == symbol for symbol, i in meta["stoi"].items())


@pytest.mark.slow  # tests/nanogpt_patch/test_launch.py trains, the tests beside it prepare and compare
def test_small_from_data_to_comparison(checkout, tmp_path):
    (tmp_path / "text.txt").write_text("A plague on both your houses! " * 200)
    prepare.main(["--output", str(tmp_path / "data"), "--text", str(tmp_path / "text.txt")])
    small = {"SMALL": "1", "SCALES": "1", "SEEDS": "1", "ITERS": "4", "DATA_DIR": str(tmp_path / "data")}
    tiny = ["--n_layer=1", "--n_embd=32", "--eval_interval=2", "--log_interval=1", "--monitor_every=2"]

    def run() -> subprocess.CompletedProcess:
        return recipe(checkout, "warmup.sh", *tiny, **small)

    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    runs = tmp_path / "runs" / "gpt_small"
    rows = [json.loads(line) for line in (runs / "warmup.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == ["warmup_gpt2-x1-1", "warmup_stablegpt-x1-1"]
    for row in rows:
        log = (runs / row["run"] / "train.log").read_text()
        assert (
            row["loss"][1] == [float(x) for x in re.findall(r"iter \d+: loss (\S+),", log)] and len(row["loss"][0]) == 5
        )
        assert row["eval_loss"][0][-1] == 4 and row["monitored"] == [2, 4]
        assert row["settings"]["learning_rate"] == "0.001"
    assert (runs / "warmup.png").stat().st_size > 10_000

    before = (runs / "warmup_gpt2-x1-1" / "train.log").read_text()
    (runs / "warmup_stablegpt-x1-1" / "done").unlink()  # as if it had been interrupted
    assert run().returncode == 0
    assert (runs / "warmup_gpt2-x1-1" / "train.log").read_text() == before
    assert "From the checkpoint" not in (runs / "warmup_stablegpt-x1-1" / "train.log").read_text()
    assert (runs / "warmup_stablegpt-x1-1" / "train.log").read_text().count("iter 4: loss") == 2


def test_muon_beside_adamw(tmp_path, capsys):
    """AdamW's losses are those of a plain loop; Muon's start from the same weights; a second call runs nothing again."""
    (tmp_path / "text.txt").write_text("A plague on both your houses! " * 200)
    prepare.main(["--output", str(tmp_path / "data"), "--text", str(tmp_path / "text.txt")])
    command = ["--data", tmp_path / "data", "--output", tmp_path / "muon.jsonl", "--updates", 3, "--batch-size", 2]
    muon.main([*map(str, command), "--reparams", "none"])
    rows = [json.loads(line) for line in (tmp_path / "muon.jsonl").read_text().splitlines()]
    assert [row["optimizer"] for row in rows] == ["adamw", "muon"] and len(rows[1]["loss"]) == 3
    assert rows[0]["loss"][0] == rows[1]["loss"][0] and rows[0]["loss"][1:] != rows[1]["loss"][1:]

    torch.manual_seed(1)
    vocab_size = pickle.loads((tmp_path / "data" / "meta.pkl").read_bytes())["vocab_size"]
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": vocab_size}
    model, losses = GPT(GPTConfig(**sizes, **STOCK)), []
    adamw = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1)
    text = torch.from_numpy(np.fromfile(tmp_path / "data" / "train.bin", np.uint16).astype(np.int64))
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        some = torch.stack([text[i : i + 129] for i in torch.randint(len(text) - 128, (2, 1), generator=draw)[:, 0]])
        loss = model(some[:, :-1], some[:, 1:].contiguous())[1]
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        losses.append(loss.item())
    assert rows[0]["loss"] == pytest.approx(losses, abs=2e-4)

    muon.main([*map(str, command), "--reparams", "none", "sigma"])
    again = [json.loads(line) for line in (tmp_path / "muon.jsonl").read_text().splitlines()]
    assert again[:2] == rows and [row["reparam"] for row in again[2:]] == ["sigma", "sigma"]


def test_what_a_resumed_run_did_again_is_what_counts():
    log = "iter 0: loss 3.0, x\niter 1: loss 2.0, x\niter 1: loss 1.5, x\niter 2: loss 1.0, x\n"
    assert compare.series(compare.TRAINED, log) == [[0, 1, 2], [3.0, 1.5, 1.0]]


@pytest.mark.parametrize(
    ("script", "environment", "error"),
    [
        (["table2.sh", "tiny"], {}, "SIZE = tiny: allowed are small, medium, large, 200"),
        (["table2.sh", "small", "llama"], {}, "KIND = llama: allowed are stable, gpt2"),
        (["warmup.sh"], {"SMALL": "yes"}, "SMALL = yes: allowed are 0, 1"),
        (["warmup.sh"], {"NANOGPT_DIR": "/nowhere"}, "NANOGPT_DIR=/nowhere: a checkout of github.com/karpathy/nanoGPT"),
        (["warmup.sh"], {}, "data/openwebtext/train.bin is missing: run data/openwebtext/prepare.py"),
    ],
)
def test_errors_are_one_line(checkout, script, environment, error):
    done = recipe(checkout, *script, **environment)
    assert done.returncode == 1 and error in done.stderr and done.stderr.count("\n") == 1, done.stderr
