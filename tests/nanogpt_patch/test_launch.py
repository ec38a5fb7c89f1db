"""The launcher: upstream's scripts with our model, or, without NANOGPT_DIR, scripts that ask of it what upstream's do."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt_patch.launch import main
from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_monitor.records import load, read
from tests.warm import PYTHON

CHECKOUT = os.environ.get("NANOGPT_DIR")

# What upstream's files do with the model and the settings, in as few lines.
STAND_INS = {
    "model.py": "raise ImportError('the checkout\\'s own model')\n",
    "configurator.py": """
import sys
from ast import literal_eval
for arg in sys.argv[1:]:
    if "=" not in arg:
        exec(open(arg).read())
    else:
        key, val = arg[2:].split("=")
        try:
            val = literal_eval(val)
        except (SyntaxError, ValueError):
            pass
        assert type(val) == type(globals()[key])
        print(f"Overriding: {key} = {val}")
        globals()[key] = val
""",
    "train.py": """
import os, pickle
import numpy as np
import torch
from model import GPTConfig, GPT
out_dir = 'out'
eval_interval = 100
eval_iters = 2
log_interval = 1
always_save_checkpoint = True
init_from = 'scratch'
dataset = 'openwebtext'
gradient_accumulation_steps = 1
batch_size = 4
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
learning_rate = 6e-4
max_iters = 600000
warmup_iters = 0
wandb_run_name = 'gpt2'
weight_decay = 1e-1
grad_clip = 1.0
lr_decay_iters = 600000
min_lr = 6e-5
dtype = 'bfloat16' if torch.cuda.is_available() else 'float16'
device = 'cuda'
compile = True
config_keys = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open('configurator.py').read())
config = {k: globals()[k] for k in config_keys}
master_process = True
os.makedirs(out_dir, exist_ok=True)
torch.manual_seed(1337)
data = np.memmap(os.path.join('data', dataset, 'train.bin'), dtype=np.uint16, mode='r')
def get_batch():
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i:i + block_size].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + block_size].astype(np.int64)) for i in ix])
    return x, y
iter_num = 0
model_args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                  bias=bias, vocab_size=None, dropout=dropout)
if init_from == 'scratch':
    with open(os.path.join('data', dataset, 'meta.pkl'), 'rb') as f:
        model_args['vocab_size'] = pickle.load(f)['vocab_size']
    model = GPT(GPTConfig(**model_args))
else:
    checkpoint = torch.load(os.path.join(out_dir, 'ckpt.pt'), map_location=device)
    for k in ['n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size']:
        model_args[k] = checkpoint['model_args'][k]
    model = GPT(GPTConfig(**model_args))
    model.load_state_dict(checkpoint['model'])
    iter_num = checkpoint['iter_num']
model.to(device)
optimizer = model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), 'cpu')
if init_from == 'resume':
    optimizer.load_state_dict(checkpoint['optimizer'])
checkpoint = None
while True:
    if iter_num % eval_interval == 0 and iter_num > 0:
        X, Y = get_batch()
        losses = {split: model(X, Y)[1].item() for split in ('train', 'val')}
        print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        checkpoint = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': model_args,
                      'iter_num': iter_num, 'config': config}
        torch.save(checkpoint, os.path.join(out_dir, 'ckpt.pt'))
    X, Y = get_batch()
    logits, loss = model(X, Y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if iter_num % log_interval == 0:
        print(f"iter {iter_num}: loss {loss.item():.4f}, mfu {model.estimate_mfu(batch_size, 1.0)}")
    iter_num += 1
    if iter_num > max_iters:
        break
""",
    "sample.py": """
import os
import torch
from model import GPTConfig, GPT
init_from = 'resume'
out_dir = 'out'
start = "x"
num_samples = 10
max_new_tokens = 500
top_k = 200
device = 'cuda'
dtype = 'bfloat16'
exec(open('configurator.py').read())
checkpoint = torch.load(os.path.join(out_dir, 'ckpt.pt'), map_location=device)
model = GPT(GPTConfig(**checkpoint['model_args']))
model.load_state_dict(checkpoint['model'])
model.eval()
print(model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens, temperature=0.8, top_k=top_k)[0].tolist())
""",
}
TINY = [
    "--dataset=tiny", "--device=cpu", "--dtype=float32", "--compile=False", "--n_layer=2", "--n_head=2", "--n_embd=32",
    "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=1", "--max_iters=6", "--eval_interval=6",
    "--eval_iters=2", "--log_interval=1", "--warmup_iters=0", "--learning_rate=0.01",
]  # fmt: skip


def write_scripts(folder: Path) -> None:
    """A copy of NANOGPT_DIR's, or the stand-ins."""
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(Path(CHECKOUT, name).read_text() if CHECKOUT else text)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Scripts, and data of 40 symbols."""
    folder = tmp_path / "nanoGPT"
    write_scripts(folder)
    (folder / "data" / "tiny").mkdir(parents=True)
    ids = np.random.default_rng(0).integers(0, 40, 2000, dtype=np.uint16)
    for split in ("train", "val"):
        ids.tofile(folder / "data" / "tiny" / f"{split}.bin")
    symbols = "".join(map(chr, range(65, 105)))
    meta = {"vocab_size": 40, "itos": dict(enumerate(symbols)), "stoi": {c: i for i, c in enumerate(symbols)}}
    (folder / "data" / "tiny" / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def launch(checkout: Path, script: str, *arguments: str, module: str = "nanogpt_patch") -> subprocess.CompletedProcess:
    command = [PYTHON, *(["-m", module] if module else []), str(checkout / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=checkout if not module else checkout.parent)


def losses(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr[-2000:]
    return re.findall(r"iter \d+: loss ([\d.]+)", done.stdout)


def test_trains_resumes_and_samples(checkout):
    settings = [
        "--alpha=0.25",
        "--reparam=sigma",
        "--norm=rmsnorm",
        "--out_dir=a",
        "--monitor_every=2",
        "--z_loss=1e-4",
    ]
    first = launch(checkout, "train.py", *TINY, *settings)
    assert len(losses(first)) == 7 and float(losses(first)[-1]) < 5
    checkpoint = torch.load(checkout / "a" / "ckpt.pt", weights_only=False)
    chosen = {
        "alpha": 0.25,
        "reparam": "sigma",
        "norm": "rmsnorm",
        "attention": "stable",
        "init": "stable",
        "tau_scale": 1.0,
        "z_loss": 1e-4,
    }
    assert {name: checkpoint["model_args"][name] for name in chosen} == chosen
    assert checkpoint["config"]["alpha"] == 0.25  # what upstream logs to wandb
    assert "transformer.h.0.attn.c_attn.parametrizations.weight.0.gamma" in checkpoint["model"]
    records = read(checkout / "a" / "monitor.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6]
    (validation,) = re.findall(r"step 6: train loss \S+, val loss (\S+)", first.stdout)
    validations = [(line["step"], line["validation"]["loss"]) for line in load(checkout / "a")[1]]
    assert validations[-1] == (6, pytest.approx(float(validation), abs=6e-5))
    printed = [float(losses(first)[step]) for step in (2, 4, 6)]
    assert [record["loss"] for record in records] == pytest.approx(printed, abs=6e-5)  # the script prints four digits

    shown = re.findall(
        r"iter (\d+): attention entropy (\S+) nats, least layer (\S+), largest logit (\S+)", first.stdout
    )
    for record, (step, *numbers) in zip(records, shown, strict=True):
        layers = record["layers"].values()
        means = [sum(layer["entropy"]) / len(layer["entropy"]) for layer in layers]
        largest = max(max(layer["max_logit"]) for layer in layers)
        assert int(step) == record["step"]
        assert [float(x) for x in numbers] == pytest.approx([sum(means) / 2, min(means), largest], rel=1e-3)

    again = launch(
        checkout,
        "train.py",
        *TINY,
        "--out_dir=a",
        "--init_from=resume",
        "--max_iters=8",
        "--monitor_every=2",
        "--log_interval=3",
    )
    assert "attention entropy" not in again.stdout  # the script says nothing of update 8
    assert re.findall(r"iter (\d+): loss", again.stdout) == ["6"], again.stderr[-2000:]
    assert "From the checkpoint: alpha = 0.25" in again.stdout
    assert "From the checkpoint: tau_scale" not in again.stdout
    steps = [record["step"] for record in read(checkout / "a" / "monitor.jsonl")]
    assert steps[:3] == [2, 4, 6] and steps[-1] == 8

    if CHECKOUT is None or importable("tiktoken"):
        sample = [
            "--out_dir=a",
            "--device=cpu",
            "--dtype=float32",
            "--num_samples=1",
            "--max_new_tokens=30",
            "--start=A",
        ]
        sampled = launch(checkout, "sample.py", *sample)
        assert sampled.returncode == 0, sampled.stderr[-2000:]
        assert sampled.stdout


def importable(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def test_extra_seed(checkout):
    runs = [
        losses(launch(checkout, "train.py", *TINY, f"--out_dir=seed{seed}", f"--extra_seed={seed}")) for seed in (0, 1)
    ]
    assert len(runs[0]) == len(runs[1]) == 7 and runs[0] != runs[1]


@pytest.mark.skipif(CHECKOUT is None, reason="NANOGPT_DIR does not name a checkout of karpathy/nanoGPT")
def test_stock_settings_have_upstreams_loss_curve(checkout):
    stock = [f"--{name}={value}" for name, value in STOCK.items()]
    theirs = losses(launch(checkout, "train.py", *TINY, "--dropout=0.1", "--out_dir=theirs", module=""))
    ours = losses(launch(checkout, "train.py", *TINY, "--dropout=0.1", "--out_dir=ours", *stock))
    assert theirs == ours and len(ours) == 7
    states = [torch.load(checkout / out / "ckpt.pt", weights_only=False)["model"] for out in ("theirs", "ours")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_config_files_are_found_here_in_the_checkout_and_in_the_package(checkout):
    (checkout / "config").mkdir()
    (checkout / "config" / "theirs.py").write_text(
        "out_dir = 'b'\nlearning_rate = 2 * 1e-3\ngrad_clip: float = 1\ntau_scale = 0.5\n"
    )
    (checkout.parent / "mine.py").write_text("alpha = 0.125\n")
    run = ["config/train_gpt.py", "config/stock.py", "config/theirs.py", "mine.py", *TINY]
    assert losses(launch(checkout, "train.py", *run))
    args = torch.load(checkout / "b" / "ckpt.pt", weights_only=False)["model_args"]
    assert {k: args[k] for k in ("norm", "tau_scale", "alpha")} == {
        "norm": "layernorm",
        "tau_scale": 0.5,
        "alpha": 0.125,
    }


def test_wrong_arguments_are_one_line(checkout, monkeypatch, capsys):
    """In this process, as importing takes longer; the last one, whose end is the usage, as a command too."""
    monkeypatch.chdir(checkout.parent)
    (checkout / "typo.py").write_text("alhpa = 0.3\n")
    (checkout / "value.py").write_text("norm = 'batch'\n")
    (checkout / "syntax.py").write_text("norm = \n")
    (checkout / "annotated.py").write_text("n_layer, leraning_rate = 2, 3.0\n")
    for arguments, error in (
        (
            ["train.py", "--alhpa=0.3"],
            "--alhpa is no setting; did you mean alpha? there are alpha, always_save_checkpoint, attention, ",
        ),
        (["train.py", "typo.py"], "typo.py: alhpa is no setting; did you mean alpha? there are alpha,"),
        (["train.py", "--alpha=0"], "--alpha = 0 is of type int: allowed is float, as in 0.475"),
        (["train.py", "--norm=batch"], "norm = 'batch': allowed are 'layernorm', 'rmsnorm', 'stable', 'none'"),
        (["train.py", "value.py"], "norm = 'batch': allowed are"),
        (["train.py", "syntax.py"], "syntax.py: line 1: invalid syntax"),
        (["train.py", "annotated.py"], "annotated.py: leraning_rate is no setting"),
        (["train.py", "--wandb_run_name=lr=3"], "--wandb_run_name=lr=3: settings are --name=value, with one ="),
        (
            ["train.py", "--init_from=gpt2", "--norm=none"],
            "norm = 'none': with init_from = 'gpt2' allowed is 'layernorm'",
        ),
        (["train.py", "--alpha"], "--alpha: settings are --name=value"),
        (
            ["train.py", "config/train_gpt5.py"],
            "is no config file, here or in the checkout; this package has config/200.py",
        ),
        (["train.py", "--methods=none_such"], "methods = 'none_such': allowed are modules that Python finds"),
        (["train.py", "--monitor_every=-1"], "monitor_every = -1: allowed are whole numbers from 0, which is for none"),
        (["train.py", "--monitor_alarm=halt"], "monitor_alarm = 'halt': allowed are 'warn', 'stop', 'rescue'"),
        (["train.py", "--monitor_alarm=stop"], "monitor_alarm = 'stop': it needs monitor_every, the updates from one"),
        (["gone.py"], "gone.py is not there: give a script of a nanoGPT checkout"),
        (["."], "nanoGPT is a folder: give a script of a nanoGPT checkout"),
        (["--alpha=0.3"], "usage: python -m nanogpt_patch PATH/TO/nanoGPT/{train,sample,bench}.py"),
    ):
        given = arguments if arguments[0].startswith("--") else [str(checkout / arguments[0]), *arguments[1:]]
        assert main(given) == 2
        told = capsys.readouterr().err
        assert error in told and told.startswith("nanogpt_patch: ") and told.count("\n") == 1
    done = subprocess.run([PYTHON, "-m", "nanogpt_patch", *given], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == told


def test_qk_clip_keeps_logits_under_its_threshold(checkout):
    """Of GPT-2's first weights they are about 0.01."""
    stock = ["--norm=layernorm", "--attention=dot", "--init=stock", "--z_loss=1e-4", "--learning_rate=1e-6"]
    assert losses(launch(checkout, "train.py", *TINY, *stock, "--out_dir=clipped", "--qk_clip=1e-4"))
    saved = torch.load(checkout / "clipped" / "ckpt.pt", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    block = model.transformer.h[0]
    x = block.ln_1(model.transformer.wte(torch.arange(saved["model_args"]["vocab_size"])))
    q, k, _ = block.attn.c_attn(x).unflatten(-1, (3, model.config.n_head, -1)).permute(1, 2, 0, 3)
    assert 1e-5 < (q @ k.mT * q.shape[-1] ** -0.5).max() < 1e-3
