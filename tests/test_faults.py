"""Files cut short, foreign or malicious, and a NaN gradient: what is lost, what is not, and what the user is told."""

import importlib
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from stable_core import SigmaReparamConfig, converge, fold_checkpoint, sigma_reparam
from stable_monitor import Monitor
from stable_monitor.records import read
from tests.stable_core.models import reparametrised
from tests.stable_monitor.models import GPT, batch, gpt, train

# ------------------------------------------------------------------------------------------------ the monitor's file


def test_a_record_file_cut_at_any_byte_is_read_and_gone_on_with(tmp_path, caplog):
    train(gpt(), 3, lambda called, _: Monitor(called, 1, path=tmp_path / "whole"))
    whole = (tmp_path / "whole" / "monitor.jsonl").read_bytes()
    first, second, third = whole.splitlines(keepends=True)
    ends = [len(first), len(first + second), len(whole)]
    for size in sorted({*range(0, len(whole), 97), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:2])}):
        path = tmp_path / f"{size}.jsonl"
        path.write_bytes(whole[:size])
        complete = sum(size >= end - 1 for end in ends)  # all but the line's end
        if complete:
            assert [record["step"] for record in read(path)] == list(range(complete))
        else:
            with pytest.raises(ValueError, match="holds no record"):
                read(path)
        kept = whole[:size].count(b"\n")
        Monitor(gpt(), 1, path=path, step=kept).close()
        assert path.read_bytes() == b"".join((first, second, third)[:kept])
    assert not caplog.messages


# ------------------------------------------------------------------------------------------------ one NaN in a gradient


@pytest.mark.parametrize("width", [32, 96], ids=["exact SVD", "iterated"])
def test_a_nan_in_one_gradient_stays_with_its_sigma_and_the_monitor_names_the_layer(width, tmp_path, caplog):
    torch.manual_seed(0)
    model = sigma_reparam(GPT(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sick = model.h[1].attn.c_attn.parametrizations.weight
    with Monitor(model, 1, optimizer=optimizer, path=tmp_path) as monitor:
        for step in range(2):
            loss = model(*batch(step))[1]
            loss.backward()
            if step == 1:
                sick.original.grad[width + 3, 5] = torch.nan  # of the keys
            optimizer.step()
            monitor.step(loss)
            optimizer.zero_grad()
        assert not caplog.messages
        # The three sigmas of a packed weight are apart, and so is every other layer.
        assert sick[0].sigma().isfinite().tolist() == [True, False, True]
        assert sick[0].u.split(width)[1].isnan().all()
        for layer in reparametrised(model):
            assert layer is sick[0] or layer.u.isfinite().all()
        loss = model(*batch(2))[1]
        loss.backward()
        monitor.step(loss)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("update 2: entropy collapse in h.1.attn: not a number")
    last = read(tmp_path)[-1]
    assert last["loss"] is None and [alarm["layer"] for alarm in last["alarms"]] == ["h.1.attn"]
    with pytest.raises(ValueError, match=r"^h\.1\.attn\.c_attn: it holds NaN or inf; go back to a sound"):
        converge(model)

    with torch.no_grad():  # mended, it needs nothing else
        sick.original[width + 3, 5] = 0.0
    assert converge(model)(*batch(2))[1].isfinite()


def test_a_nan_in_one_projection_reaches_those_that_share_its_sigma_alone():
    layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
    sigma_reparam(layers, SigmaReparamConfig(qkv="qk_joint"))
    for W in layers.parameters():
        W.grad = torch.ones_like(W)
    layers["q_proj"].parametrizations.weight.original.grad[0, 0] = torch.nan
    torch.optim.SGD(layers.parameters(), lr=0.1).step()
    assert [layer.weight.isfinite().all().item() for layer in layers.values()] == [False, False, True, True]


# ------------------------------------------------------------------------------------------------ checkpoints of others


def run_fold(checkpoint: Path, out: Path) -> int:
    return fold_checkpoint.main([str(checkpoint), str(out)])


def run_convert(*args) -> int:
    from hf_stable.convert import main

    return main([*map(str, args)])


def run_fairseq(command: str, *args) -> int:
    return importlib.import_module(f"fairseq_sigma.{command}").main([*map(str, args)])


USER_DIR = Path(__file__).parents[1] / "plugins" / "fairseq_sigma"
VIT = "sigma_vit_small_patch16_224"
COMMANDS = {
    "stable_core.fold_checkpoint": run_fold,
    "convert nanogpt": lambda path, out: run_convert("nanogpt", path, out),
    "convert fairseq": lambda path, out: run_convert(
        "fairseq", path, out, "--data", path.parent, "--user-dir", USER_DIR
    ),
    "convert timm": lambda path, out: run_convert(
        "timm", VIT, out, "--device-modules", "timm_stable", "--checkpoint", path, "--model-kwargs", "depth=1"
    ),
    "fairseq_sigma.export": lambda path, out: run_fairseq("export", path, out),
    "fairseq_sigma.average": lambda path, out: run_fairseq("average", path, path, out),
    "fairseq_sigma.transcribe": lambda path, out: run_fairseq("transcribe", path, out),
}


@pytest.fixture(autouse=True)
def no_handler_of_a_test_that_is_over(monkeypatch):
    """fairseq's commands leave one on the root logger; to a closed stream, `logging` prints a traceback of its own."""
    root = logging.getLogger()
    open_ones = [handler for handler in root.handlers if not getattr(getattr(handler, "stream", None), "closed", False)]
    monkeypatch.setattr(root, "handlers", open_ones)


def refuses(command: str, path: Path, capsys) -> None:
    """In one line that begins with the command's name, without a result."""
    out = path.parent / "out"
    assert COMMANDS[command](path, out) == 1
    printed = capsys.readouterr().err
    name = command.split()[0].rpartition(".")[2]
    assert printed.startswith(f"{name}: ") and printed.count("\n") == 1 and "\x1b" not in printed, printed
    assert not out.exists()


def saved(content, path: Path, **options) -> bytes:
    torch.save(content, path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_and_foreign_checkpoints_are_refused_in_one_line(command, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    state = {"model": nn.Linear(30, 30).state_dict(), "model_args": {}, "cfg": {"model": {}, "task": {}}}
    whole = saved(state, path)
    legacy = saved(state, path, _use_new_zipfile_serialization=False)
    foreign = [b"\x89PNG\r\n\x1a\n" + bytes(100), b"model: large\n", saved([1, 2], path), saved({"a": 1}, path)]
    cut = [file[:size] for file in (whole, legacy) for size in (0, 1, 100, len(file) // 2, len(file) - 1)]
    for content in (*foreign, *cut, pickle.dumps({"model": 1}), saved({"model": 1, "cfg": {"model": {}}}, path)):
        path.write_bytes(content)
        refuses(command, path, capsys)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


FORMATS = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_executes_what_a_checkpoint_holds(command, form, tmp_path, capsys):
    path, sprung = tmp_path / "checkpoint.pt", tmp_path / "sprung"
    FORMATS[form]({"model": {"weight": Trap(sprung)}, "cfg": Trap(sprung), "model_args": Trap(sprung)}, path)
    refuses(command, path, capsys)
    assert not sprung.exists()
    with path.open("rb") as file:  # it is a trap
        pickle.load(file) if form == "pickle" else torch.load(path, weights_only=False)
    assert sprung.exists()


def test_fairseqs_own_loading_executes_nothing(tmp_path):
    """fairseq-generate, and resuming."""
    importlib.import_module("fairseq_sigma")  # whose mends allow some classes
    from fairseq import checkpoint_utils

    path, sprung = tmp_path / "checkpoint.pt", tmp_path / "sprung"
    torch.save({"model": {}, "args": None, "cfg": Trap(sprung)}, path)
    with pytest.raises(pickle.UnpicklingError, match=r"io\.open"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert not sprung.exists()


@pytest.mark.parametrize("command", ["gpt2", "folded"])
def test_no_command_executes_what_a_models_folder_holds(command, tmp_path, capsys):
    sprung, model = tmp_path / "sprung", tmp_path / "model"
    model.mkdir()
    torch.save({"wte.weight": Trap(sprung)}, model / "pytorch_model.bin")
    (model / "code.py").write_text(f"open({str(sprung)!r}, 'w')\n")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 8, "n_head": 1}
    remote = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.GPT"}}
    for settings in (config, {**config, **remote}):
        (model / "config.json").write_text(json.dumps(settings))
        assert run_convert(command, model, tmp_path / "out") == 1
        printed = capsys.readouterr().err.splitlines()
        assert printed[-1].startswith("convert: "), printed
        assert not sprung.exists() and not (tmp_path / "out").exists()
