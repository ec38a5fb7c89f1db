"""Folders whose source is an older version's, and the command that brings it up to date."""

import json
import os
from pathlib import Path

import pytest
import torch

import hf_stable
from hf_stable import SigmaTransformerTokenizer, source
from hf_stable.keywords import CACHE
from hf_stable.note import NOTE
from hf_stable.update import main, update

from .models import run_without_package, stable_gpt, tokens
from .test_saved_as_it_is import llama, with_v

GENERATE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
print(model.generate(torch.tensor({ids}), max_new_tokens=12, do_sample=False).tolist())
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def age(folder: Path) -> None:
    """As a version left it that swallowed `cache`, kept v, and had another file."""
    (folder / "keywords.py").write_text(source.HEADER + (folder / "keywords.py").read_text().replace(
        'if "cache" in kwargs and', 'kwargs.pop("cache", None)\n        if False and'))  # fmt: skip
    (folder / "stable_core_gone.py").write_text(source.HEADER)
    with_v(folder / "model.safetensors")


def generated(folder: Path, ids: torch.Tensor) -> list:
    return json.loads(run_without_package(GENERATE.format(folder=str(folder), ids=ids.tolist())).splitlines()[-1])


def test_an_old_folder_generates_as_it_should_once_updated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, ids, folder = stable_gpt(reparam="sigma", norm="layernorm"), tokens(1, 6), tmp_path / "gpt"
    expected = model.generate(ids, max_new_tokens=12, do_sample=False).tolist()
    model.save_pretrained(folder)
    fresh = contents(folder)
    age(folder)
    (folder / "mine.py").write_text("print('mine')")
    old = contents(folder)
    assert (generated(folder, ids) == expected) == (CACHE == "past_key_values")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: keywords.py, stable_core_gone.py\n"
    kept = {name: old[name] for name in ("model.safetensors", "mine.py")}
    assert contents(folder) == {**fresh, **kept}
    assert generated(folder, ids) == expected
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: up to date\n"


def test_a_stock_models_folder_gets_the_note(tmp_path):
    hf_stable.sigma_reparam(llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = path.read_text()
    config = json.loads(written)
    assert config.pop("transformers_weights") == NOTE
    path.write_text(json.dumps(config))
    before = contents(tmp_path)
    assert update(tmp_path) == ["config.json"]
    assert path.read_text() == written
    assert {**contents(tmp_path), "config.json": before["config.json"]} == before
    assert update(tmp_path) == []


def test_a_tokenizers_source_is_brought_up_too(tmp_path):
    (tmp_path / "dict").write_text("ab 1\n")
    SigmaTransformerTokenizer(tmp_path / "dict").save_pretrained(tmp_path / "saved")
    old = tmp_path / "saved" / "tokenization_sigma_transformer.py"
    new = old.read_text()
    old.write_text(source.HEADER + "old = 1\n")
    assert update(tmp_path / "saved") == ["tokenization_sigma_transformer.py"]
    assert old.read_text() == new


def test_what_is_not_ours_is_refused_and_left_alone(tmp_path, capsys):
    folders = {name: tmp_path / name for name in ("plain", "edited", "foreign", "cut", "list")}
    llama().save_pretrained(folders["plain"])
    for name in ("edited", "foreign", "cut", "list"):
        stable_gpt().save_pretrained(folders[name])
        (folders[name] / "source.py").write_text(source.HEADER)  # old
    (folders["edited"] / "modeling_stable.py").write_text("mine = 1")
    config = json.loads((folders["foreign"] / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "modeling_mine.Mine"
    (folders["foreign"] / "config.json").write_text(json.dumps(config))
    (folders["cut"] / "config.json").write_text("{")
    (folders["list"] / "config.json").write_text("[]")
    capsys.readouterr()  # what saving said
    for folder, message in (
        (folders["plain"], "no folder of this library's: its config.json names no model of hf_stable"),
        (folders["edited"], "modeling_stable.py is not this library's"),
        (folders["foreign"], "config.json: auto_map has modeling_mine.Mine: allowed are configuration_stable_gpt."),
        (folders["cut"], "config.json: no JSON: "),
        (folders["list"], "config.json: no configuration: it holds a list"),
        (tmp_path / "gone", "no folder of this library's"),
    ):
        before = contents(folder) if folder.exists() else None
        assert main([str(folder)]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("update: ") and message in printed and printed.count("\n") == 1, printed
        assert (contents(folder) if folder.exists() else None) == before


@pytest.mark.parametrize("call", ["write_text", "replace"])
def test_a_call_cut_short_leaves_whole_files_and_can_be_repeated(call, tmp_path, monkeypatch):
    stable_gpt().save_pretrained(tmp_path)
    fresh = contents(tmp_path)
    ours = [path for path in tmp_path.glob("*.py") if path.name.startswith("stable_core")]
    for path in ours:
        path.write_text(source.HEADER + "old = 1\n")
    original, calls = getattr(Path if call == "write_text" else os, call), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "write_text" else os, call, full)
        assert main([str(tmp_path)]) == 1
    for path in ours:
        assert path.read_bytes() in (fresh[path.name], (source.HEADER + "old = 1\n").encode())
    assert contents(tmp_path).keys() == fresh.keys() and not list(tmp_path.glob(".*"))
    assert update(tmp_path) and contents(tmp_path) == fresh
