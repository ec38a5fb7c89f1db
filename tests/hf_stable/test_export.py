"""Saved folders in a process that has never heard of this project, and what export refuses."""

import json
import subprocess
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers

import hf_stable
from hf_stable import SigmaViTConfig, SigmaViTForImageClassification, StableGPTForCausalLM, export, source
from stable_core import SigmaReparamConfig
from tests.warm import PYTHON

from .models import disturbed, run_without_package, stable_gpt, tokens

GENERATE = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, again = {folder!r}, {again!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = model.generate(torch.tensor({ids}), max_new_tokens=20, do_sample=False)
model.save_pretrained(again)  # what was loaded can be saved and loaded in turn
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert torch.equal(ids, model.generate(torch.tensor({ids}), max_new_tokens=20, do_sample=False))
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
print(ids.tolist(), type(base).__name__, AutoConfig.from_pretrained(folder, trust_remote_code=True).reparam)

torch.manual_seed(0)  # and it trains there: u and v follow W in the optimizer's step
model = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.tensor({ids}), labels=torch.tensor({ids})).loss.backward()
optimizer.step()
print(torch.cat([x.double().flatten() for x in model.state_dict().values()]).norm().item())
"""


@pytest.mark.parametrize("folded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stable_gpt_generates_without_the_package(tmp_path, monkeypatch, folded):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, ids = stable_gpt(reparam="sigma", qkv="qk_joint", gamma_init="spectral"), tokens(2, 6)
    if folded:
        export(model, tmp_path / "saved", folded=True)
    else:
        model.save_pretrained(tmp_path / "saved")
    script = GENERATE.format(folder=str(tmp_path / "saved"), again=str(tmp_path / "again"), ids=ids.tolist())
    generated, norm = run_without_package(script).splitlines()
    expected = model.generate(ids, max_new_tokens=20, do_sample=False).tolist()
    assert generated == f"{expected} StableGPTModel {'none' if folded else 'sigma'}"

    torch.manual_seed(0)
    here = StableGPTForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path / "saved"))
    optimizer = torch.optim.SGD(here.parameters(), lr=0.1)
    here(ids, labels=ids).loss.backward()
    optimizer.step()
    assert float(norm) == torch.cat([x.double().flatten() for x in here.state_dict().values()]).norm().item()


CLASSIFY = """
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({folder!r}, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.load({images!r})).logits, {logits!r})
"""


def test_a_sigma_vit_classifies_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    settings = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_attention_heads": 2}
    model = disturbed(SigmaViTForImageClassification(SigmaViTConfig.preset("small", num_hidden_layers=2, **settings)))
    model.eval().save_pretrained(tmp_path / "vit")
    torch.save(images := torch.randn(2, 3, 16, 16), tmp_path / "images.pt")
    files = {name: str(tmp_path / f"{name}.pt") for name in ("images", "logits")}
    run_without_package(CLASSIFY.format(folder=str(tmp_path / "vit"), **files))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(images).logits, rtol=1e-4, atol=1e-5)


def test_the_folder_is_that_of_a_hub_repository(tmp_path):
    stable_gpt().save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_stable_gpt.py"} <= names
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_stable_gpt.StableGPTConfig",
        "AutoModel": "modeling_stable_gpt.StableGPTModel",
        "AutoModelForCausalLM": "modeling_stable_gpt.StableGPTForCausalLM",
    }
    code = "".join(path.read_text() for path in (tmp_path / "saved").glob("*.py"))
    assert "from stable_core" not in code and "import stable_core" not in code


def test_a_file_of_somebody_elses_is_not_overwritten(tmp_path):
    (tmp_path / "modeling_stable.py").write_text("mine")
    with pytest.raises(
        ValueError, match=r"modeling_stable\.py is not this library's: save the model to a folder without"
    ):
        stable_gpt().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["modeling_stable.py"]
    assert (tmp_path / "modeling_stable.py").read_text() == "mine"


def test_export_refuses_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ValueError, match="is there and not empty: allowed is a new or an empty folder"):
            export(stable_gpt(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_export_cut_short_leaves_nothing(tmp_path, monkeypatch):
    def cut_short(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", cut_short)
    with pytest.raises(KeyboardInterrupt):
        export(stable_gpt(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_of_another_librarys_model(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, bos_token_id=0, eos_token_id=0)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), tokens(2, 8)
    before = model(ids).logits
    hf_stable.sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"))
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel with σReparam .*: only folded does it load without this library"
    ):
        export(model, tmp_path / "out")
    export(model, tmp_path / "out", folded=True)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(plain.eval()(ids).logits, before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="nothing to fold"):
        export(plain, tmp_path / "out2", folded=True)


@pytest.mark.parametrize("step", ["first", "again"])
def test_push_to_hub_takes_the_source_along(tmp_path, monkeypatch, step):
    committed = []

    def no_card(*_, **__):  # as where the hub cannot be reached, but without waiting for it
        raise huggingface_hub.errors.LocalEntryNotFoundError("no card")

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lambda self, **commit: committed.append(commit))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_branch", lambda self, **_: None)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "mine.py").write_text("not for everybody")
    if step == "again":
        stable_gpt().save_pretrained(tmp_path / "gpt")
    stable_gpt().save_pretrained(tmp_path / "gpt", push_to_hub=True, repo_id="somebody/gpt")
    files = {operation.path_in_repo for commit in committed for operation in commit["operations"]}
    assert {"config.json", "model.safetensors", "modeling_stable_gpt.py", "stable_core_sigma_reparam.py"} <= files
    assert "mine.py" not in files


def test_a_model_that_brings_its_own_code_folds(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, ids = stable_gpt(reparam="sigma"), tokens(2, 6)
    model.save_pretrained(tmp_path / "gpt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "gpt")!r}, trust_remote_code=True)
import hf_stable
assert "transformers_modules" in type(model).__module__
hf_stable.export(model, {str(tmp_path / "plain")!r}, folded=True)
"""
    subprocess.run([PYTHON, "-c", script], check=True, cwd=tmp_path)
    plain = StableGPTForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_truncated_file_is_an_error(tmp_path):
    stable_gpt().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{tmp_path}: a file of weights is damaged: "):
        StableGPTForCausalLM.from_pretrained(tmp_path)


def test_every_file_that_is_written_is_marked(tmp_path):
    source.write_source(tmp_path, StableGPTForCausalLM.config_class.auto_classes.values())
    assert all(path.read_text().startswith(source.HEADER) for path in tmp_path.iterdir())
    source.write_source(tmp_path, StableGPTForCausalLM.config_class.auto_classes.values())  # its own it may replace
