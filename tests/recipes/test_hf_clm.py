"""StableGPT under Trainer: the command on a few sentences, one process and two, and the paper's settings."""

import json
import math
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

from hf_stable import StableGPTForCausalLM
from recipes.hf_clm import compare, data, prepare, train
from recipes.hf_clm.settings import Settings, claim
from stable_monitor.records import read

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "hf_clm"
TINY = "--size small --lr 3e-3 --warmup 4 --steps 12 --batch-tokens 512 --device-batch 4 --eval-every 6 --save-every 5"
TINY = [*TINY.split(), "--monitor-every", "1"]
GPT = "--norm layernorm --attention dot --init stock".split()


@pytest.fixture(autouse=True, scope="module")
def no_gpu():
    """On which a run would be in bf16, and the processes below are gloo's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda *args, **kwargs: False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def write_text(path: Path, documents: int, seed: int) -> None:
    """Sentences of a small grammar, one a line, a blank line between documents."""
    draw = np.random.default_rng(seed).choice
    people, verbs, things = (
        ["the king", "a farmer", "my sister"],
        ["sees", "buys", "sells"],
        ["corn", "ships", "two horses"],
    )
    blocks = [
        "\n".join(f"{draw(people).capitalize()} {draw(verbs)} {draw(things)}." for _ in range(6))
        for _ in range(documents)
    ]
    path.write_text("\n\n".join(blocks) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What prepare makes of it."""
    place = tmp_path_factory.mktemp("clm")
    write_text(place / "train.txt", 120, 0)
    write_text(place / "valid.txt", 40, 1)
    texts = ["--train", str(place / "train.txt"), "--val", str(place / "valid.txt")]
    assert prepare.main(["--output", str(place / "data"), *texts, "--vocab-size", "300"]) == 0
    return place


def command(folder: Path, output: Path, *options: str) -> list[str]:
    return ["--output", str(output), "--data", str(folder / "data"), *TINY, *options]


@pytest.fixture(scope="module")
def sigma(folder) -> Path:
    """The directory of a finished run of StableGPT with σReparam."""
    assert train.main(command(folder, folder / "runs-1", "--reparam", "sigma")) == 0
    return folder / "runs-1"


@pytest.fixture(scope="module")
def gpt(folder) -> Path:
    """And of one of the GPT beside it."""
    assert train.main(command(folder, folder / "runs-2", *GPT)) == 0
    return folder / "runs-2"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def log(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


# ----------------------------------------------------------------------------------------------------------------- data


def test_tokens_are_the_documents_and_their_ends(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    assert len(tokenizer) == 300
    for name, text in (("train", "train.txt"), ("val", "valid.txt")):
        tokens = np.fromfile(folder / "data" / f"{name}.bin", dtype=np.uint16)
        *documents, rest = tokenizer.decode(tokens).split(prepare.END)
        assert documents == (folder / text).read_text().strip().split("\n\n") and rest == ""


def test_random_blocks_are_those_of_seed_and_index(folder):
    path = folder / "data" / "train.bin"
    tokens = torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))
    blocks = [data.RandomBlocks(path, len(tokens) - 2, 40, seed) for seed in (1, 1, 2)]
    starts = []
    for dataset in blocks:
        for i in range(40):
            item = dataset[i]
            assert torch.equal(item["input_ids"], item["labels"])
            [start] = [s for s in range(3) if torch.equal(item["labels"], tokens[s : s + len(tokens) - 2])]
            starts.append(start)
    assert set(starts[:40]) == {0, 1, 2}
    assert starts[:40] == starts[40:80] != starts[80:]


def test_validation_blocks_are_the_file(folder):
    path = folder / "data" / "val.bin"
    tokens = np.fromfile(path, dtype=np.uint16)
    blocks = data.AllBlocks(path, 100)
    assert len(blocks) == len(tokens) // 100
    assert torch.cat([blocks[i]["labels"] for i in range(len(blocks))]).tolist() == tokens[: len(blocks) * 100].tolist()


# ------------------------------------------------------------------------------------------------------------- training


def test_the_command_learns_and_reports_the_validation_loss(gpt, folder):
    """The loss by hand, of the saved model."""
    model = AutoModelForCausalLM.from_pretrained(gpt / "model").eval()
    tokens = torch.from_numpy(np.fromfile(folder / "data" / "val.bin", dtype=np.uint16).astype(np.int64))
    blocks = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    with torch.no_grad():
        logits = model(blocks).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in log(gpt) if "eval_loss" in entry]
    assert [step for step, _ in evaluated] == [6, 12]
    assert evaluated[-1][1] == pytest.approx(loss.item(), rel=1e-4)
    assert loss < math.log(300) - 0.5
    assert (gpt / "curves.png").stat().st_size > 1000


def test_the_schedule_and_the_monitor(gpt):
    """A linear warm-up, then a cosine to a tenth; a record for each update."""
    records = read(gpt)
    expected = [3e-3 * i / 4 for i in range(4)]
    expected += [3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2) for i in range(8)]
    assert [record["lr"] for record in records] == pytest.approx(expected, rel=1e-5)
    assert list(records[0]["layers"]) == [f"transformer.h.{i}.attn" for i in range(4)]
    assert sum("attention_entropy" in entry for entry in log(gpt)) == 12


def test_a_run_that_ends_early_keeps_the_schedule(folder, tmp_path):
    """nanoGPT's rates with max_iters = 12 and lr_decay_iters = 24, by its formula [ST, App. K]."""
    train.main(command(folder, tmp_path, "--decay-steps", "24"))
    cosine = [(1 + math.cos(math.pi * (i - 4) / (24 - 4))) / 2 for i in range(4, 12)]
    expected = [*(3e-3 * i / 4 for i in range(4)), *(3e-4 + x * (3e-3 - 3e-4) for x in cosine)]
    assert [record["lr"] for record in read(tmp_path)] == pytest.approx(expected, rel=1e-5)


def test_the_saved_folder_generates(gpt, sigma):
    for path in (gpt / "model", sigma / "model", sigma / "folded"):
        generate = pipeline("text-generation", str(path))
        text = generate("The king", max_new_tokens=5, do_sample=False)[0]["generated_text"]
        assert text.startswith("The king") and len(text) > len("The king")


def test_the_folded_model_is_the_reparametrised_one(sigma):
    x = torch.randint(300, (2, 50), generator=torch.Generator().manual_seed(0))
    plain, folded = (AutoModelForCausalLM.from_pretrained(sigma / name).eval() for name in ("model", "folded"))
    assert not any("parametrizations" in name for name in folded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(folded(x).logits, plain(x).logits, rtol=1e-4, atol=1e-5)


def test_weight_decay_is_of_matrices_alone(folder, tmp_path):
    """AdamW: with decay an update subtracts lr * decay * W more."""
    after = {}
    for decay in ("0", "0.5"):
        options = ["--reparam", "sigma", "--steps", "1", "--warmup", "0", "--weight-decay", decay]
        train.main(command(folder, tmp_path / decay, *options))
        after[decay] = weights(tmp_path / decay)
    settings = tyro.cli(Settings, args=command(folder, tmp_path / "0", "--reparam", "sigma"))
    set_seed(settings.seed)
    model = StableGPTForCausalLM(settings.config(vocab_size=300))
    decayed = set()
    for name, W in model.named_parameters():
        difference = after["0"][name] - after["0.5"][name]
        if difference.any():
            decayed.add(name)
            torch.testing.assert_close(difference, 3e-3 * 0.5 * W.detach(), rtol=0, atol=1e-6)
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = {f"transformer.h.{i}.{layer}.parametrizations.weight.original" for i in range(4) for layer in layers}
    assert decayed == expected | {"transformer.wte.weight", "transformer.wpe.weight"}


@pytest.mark.parametrize("collapsing", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(collapsing, folder, sigma, tmp_path, monkeypatch):
    """The collapsing one is rescued before it is interrupted, and again afterwards."""
    options, finished = ["--reparam", "sigma"], sigma
    if collapsing:
        options, finished = [*GPT, "--lr", "0.1", "--warmup", "0", "--on-alarm", "rescue"], tmp_path / "finished"
        assert train.main(command(folder, finished, *options)) == 0
        assert [record["step"] for record in read(finished) if "rescues" in record] == [2, 11]
    arguments = command(folder, tmp_path / "run", *options)
    original, calls = data.RandomBlocks.__getitem__, []

    def interrupted(self, index):
        calls.append(index)
        if index == 4 * 8 and len(calls) < 4 * 10:  # in the ninth update
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(data.RandomBlocks, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments)
    (tmp_path / "run" / "checkpoint-8").mkdir()  # one that was cut short
    calls.clear()
    monkeypatch.setattr(data.RandomBlocks, "__getitem__", lambda self, i: (calls.append(i), original(self, i))[1])
    assert train.main(arguments) == 0
    assert min(calls) == 4 * 5
    whole, resumed = weights(finished), weights(tmp_path / "run")
    assert resumed.keys() == whole.keys() and any(name.endswith(".u") for name in whole)
    for name, W in whole.items():
        assert torch.equal(resumed[name], W), name
    losses = [[(record["step"], record["loss"]) for record in read(run)] for run in (finished, tmp_path / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert not any("parametrizations" in name for name in load_file(tmp_path / "run" / "folded" / "model.safetensors"))


# Accelerate has FSDP for accelerators alone. Told that two gloo processes are that, it shards them all the same.
FSDP2_ON_CPU = """
import faulthandler
import sys

from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

faulthandler.dump_traceback_later(100, exit=True)  # processes that wait for each other
begin, save_model = state.PartialState.__init__, Trainer.save_model

def begin_as_gpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

def save_sharded(self, *args, **kwargs):
    assert isinstance(self.model.transformer.h[0], FSDPModule)
    save_model(self, *args, **kwargs)

state.PartialState.__init__, Trainer.save_model = begin_as_gpus, save_sharded
from recipes.hf_clm.train import main

sys.exit(main())
"""


@pytest.mark.slow  # tests/engines has both engines
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_are_one_with_the_whole_batch(engine, folder, sigma, tmp_path):
    (tmp_path / "fsdp2.py").write_text(FSDP2_ON_CPU)
    script = [str(tmp_path / "fsdp2.py")] if engine == "fsdp2" else ["-m", "recipes.hf_clm.train"]
    launch = [
        "accelerate.commands.launch",
        "--config_file",
        str(RECIPE / "configs" / f"{engine}.yaml"),
        "--num_processes",
        "2",
    ]
    options = command(folder, tmp_path / "run", "--reparam", "sigma", "--device-batch", "2")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *launch, *script, *options], env=env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(sigma), weights(tmp_path / "run")
    assert two.keys() - one.keys() <= {"lm_head.weight"}  # a sharded model's state dict holds the tied weight twice
    for name, W in one.items():
        torch.testing.assert_close(two[name], W, rtol=2e-3, atol=5e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert [record["step"] for record in read(tmp_path / "run")] == list(range(12))
    assert done.stdout.count("what it writes") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ("--lr 1e20 --monitor-every 50", r"stopped after 10 updates: the loss is (nan|inf)"),
        ("--lr 1 --on-alarm stop", r"stopped after \d updates: attention entropy collapsed"),
    ],
)
def test_a_run_that_fails_is_stopped_and_says_why(options, message, folder, tmp_path):
    arguments = command(folder, tmp_path, *GPT, "--warmup", "0", "--grad-clip", "0", *options.split())
    with pytest.raises(train.Stopped, match=message):
        train.main(arguments)
    assert (tmp_path / "curves.png").exists() and not (tmp_path / "model").exists()


def test_runs_side_by_side(gpt, sigma, tmp_path, capsys):
    assert compare.main([str(sigma), str(gpt), "--output", str(tmp_path / "both")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == ["runs-1", "runs-2"]
    assert rows[1]["settings"]["norm"] == "layernorm" and rows[1]["eval_loss"][0] == [6, 12]
    for record, entropy in zip(read(gpt), rows[1]["entropy"], strict=True):
        assert entropy == pytest.approx(min(np.mean(x["entropy"]) for x in record["layers"].values()), abs=1e-4)
    assert (tmp_path / "both.png").stat().st_size > 1000
    shown = " / ".join(f"{row['eval_loss'][1][-1]:.3f}" for row in rows)
    assert shown in " ".join(capsys.readouterr().out.split())


# --------------------------------------------------------------------------------------------------------- the commands


def script(folder: Path, *args, gpus: int = 0, **env: str) -> subprocess.CompletedProcess:
    """stablegpt.sh showing its commands, with a python that counts so many GPUs, beside no .venv."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f"#!/bin/sh\necho {gpus}\n")
    (folder / "bin" / "python").chmod(0o755)
    (folder / "home" / "recipes").mkdir(parents=True)
    (folder / "home" / "recipes" / "hf_clm").symlink_to(RECIPE)
    given = {"SMALL": "0", "DRY_RUN": "1", "RUNS": "runs", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    shell = ["bash", str(folder / "home" / "recipes" / "hf_clm" / "stablegpt.sh"), *args]
    return subprocess.run(shell, env={**os.environ, **given, **env}, capture_output=True, text=True, cwd=folder)


def settings_of(line: str) -> Settings:
    words = shlex.split(line)
    return tyro.cli(Settings, args=words[words.index("recipes.hf_clm.train") + 1 :])


def test_a_full_run_prepares_and_launches_on_all_gpus(tmp_path):
    preparation, line = script(tmp_path, "L", "gpt", "3", gpus=8).stdout.splitlines()
    assert tyro.cli(prepare.Settings, args=shlex.split(preparation)[3:]) == prepare.Settings(
        output=Path("runs/hf_clm/data")
    )
    given = settings_of(line)
    assert (given.output, given.data) == (Path("runs/hf_clm/L-gpt-2.5e-4-2000-3"), Path("runs/hf_clm/data"))
    assert (given.workers, given.compile, given.seed, given.accumulation(1024, 8)) == (4, True, 3, 5)
    words = shlex.split(line)
    assert words[:2] == ["accelerate", "launch"] and words[words.index("--num_processes") + 1] == "8"
    assert Path(words[words.index("--config_file") + 1]).resolve() == RECIPE / "configs" / "ddp.yaml"


def test_stability_runs_and_ablations(tmp_path):
    options = ["--alpha", "0.25", "--n-head", "8", "--tau-scale", "2", "--init", "xavier"]
    env = {"WARMUP": "0", "LR": "1.2e-3", "STEPS": "100000", "ENGINE": "fsdp2"}
    line = script(tmp_path, "S", "stable", "1", *options, gpus=2, **env).stdout.splitlines()[-1]
    given = settings_of(line)
    assert (given.warmup, given.lr, given.steps) == (0, 1.2e-3, 100_000)
    assert given.decay_steps == 600_000  # "including all learning rate settings" [ST, App. K]
    config = given.config()
    assert (config.alpha, config.n_head, config.tau_scale, config.init) == (0.25, 8, 2.0, "xavier")
    assert "fsdp2.yaml" in line


def test_the_small_run_for_two_updates(tmp_path):
    (tmp_path / "lm").mkdir()
    write_text(tmp_path / "lm" / "train.txt", 300, 0)
    write_text(tmp_path / "lm" / "valid.txt", 50, 1)
    env = {"SMALL": "1", "STABLE_DATA": str(tmp_path), "RUNS": str(tmp_path), "STEPS": "2"}
    preparation, line = script(tmp_path, "S", "gpt", **env).stdout.splitlines()
    assert prepare.main(shlex.split(preparation)[3:]) == 0 and train.main(shlex.split(line)[3:]) == 0
    run = tmp_path / "hf_clm_small" / "small-gpt-3e-2-0-1"
    assert [record["step"] for record in read(run)] == [0] and (run / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "args, env, message",
    [
        ([], {}, "SIZE = : allowed are S, M, L"),
        (["S", "bert"], {}, "KIND = bert: allowed are stable, gpt"),
        (["S"], {"SMALL": "yes"}, "SMALL = yes: allowed are 0, 1"),
        (["S"], {"ENGINE": "deepspeed"}, "ENGINE = deepspeed: allowed are ddp, fsdp2"),
        (
            ["S"],
            {"SMALL": "1", "STABLE_DATA": "nowhere", "DRY_RUN": "0"},
            "nowhere/lm/train.txt is missing: STABLE_DATA names your folder with lm/; unset, some is fetched",
        ),
    ],
)
def test_mistakes_in_the_script_get_one_line(args, env, message, tmp_path):
    done = script(tmp_path, *args, **env)
    assert done.returncode == 1 and done.stderr == f"stablegpt.sh: {message}\n"


@pytest.mark.parametrize(
    "module, args, message",
    [
        (train, "--lr 0", "lr = 0.0: allowed are numbers above 0"),
        (train, "--alpha 0.7", "alpha = 0.7: allowed are numbers from 0 to 0.5"),
        (train, "--n-head 3", "n_head = 3: allowed are divisors of n_embd = 128"),
        (train, "--warmup 12", "warmup = 12: allowed are numbers from 0 to under steps, 12"),
        (train, "--decay-steps 11", "decay_steps = 11: allowed are numbers from steps, 12"),
        (train, "--betas 0.9 1", "betas = (0.9, 1.0): allowed are numbers from 0 to under 1"),
        (train, "--norm batchnorm", "invalid choice 'batchnorm'"),
        (prepare, "--train missing.txt", "train and val: allowed are both, or neither for OpenWebText"),
        (prepare, "--train missing.txt --val missing.txt", "missing.txt: no such file"),
        (prepare, "--vocab-size 70000", "vocab_size = 70000: allowed are whole numbers from 257 to 65536"),
        (compare, ".", "runs = .: allowed are directories of finished runs"),
    ],
)
def test_a_bad_setting_is_told(module, args, message, folder, tmp_path, capsys):
    first = command(folder, tmp_path / "run") if module is train else ["--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        module.main([*first, *args.split()])
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stopped.value.code == 2 and message in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ("--data nowhere", "train: nowhere: holds no tokenizer/; python -m recipes.hf_clm.prepare makes such a folder"),
        (
            "--batch-tokens 500",
            "train: batch_tokens = 500: allowed are multiples of 512: device_batch = 4 blocks of 128 in",
        ),
        ("--data short", "train: short/train.bin holds 100 tokens: allowed are files with block_size = 128 or more"),
        ("--seed 2", "train: seed = 2: the run in"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_what_cannot_be_done_is_told_in_a_line(options, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "data" / "tokenizer", tmp_path / "short" / "tokenizer")
    np.zeros(100, dtype=np.uint16).tofile(tmp_path / "short" / "train.bin")
    arguments = command(folder, tmp_path / "run")
    claim(tyro.cli(Settings, args=arguments))
    monkeypatch.setattr(sys, "argv", ["train", *arguments, *options.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("recipes.hf_clm.train", run_name="__main__")
    assert message in stopped.value.code and "\n" not in stopped.value.code


def test_openwebtext_needs_datasets(tmp_path, monkeypatch, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    monkeypatch.setattr(prepare.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="OpenWebText comes through datasets, which is missing: pip install datasets"):
        prepare.main(["--output", str(tmp_path)])
