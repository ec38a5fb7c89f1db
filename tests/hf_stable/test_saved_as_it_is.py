"""A model that was changed after it was reparametrised: what is saved loads with the same outputs, or says what to do."""

import copy
import json
import subprocess

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_stable
import stable_core
from hf_stable import SigmaViTConfig, SigmaViTForImageClassification
from hf_stable.note import NOTE
from stable_core import SigmaReparamConfig
from tests.warm import PYTHON

from .models import disturbed, stable_gpt, tokens

IDS = tokens(2, 8)


def llama(layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=99, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


def resized(model):
    model.resize_token_embeddings(105)


def new_head(model):
    model.lm_head = torch.nn.Linear(32, 99, bias=False)


def set_by_name(model):
    model.set_submodule("model.layers.1.mlp.up_proj", torch.nn.Linear(32, 48, bias=False))


def layer_deleted(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def folded_by_the_core(model):
    stable_core.fold(model)


def partly_folded(model):
    stable_core.fold(model.model.layers[0])


def reparametrised_twice(model):
    stable_core.fold(model.model.layers[1].mlp)
    again = SigmaReparamConfig(gamma_init="spectral", n_power_iterations=2)
    stable_core.sigma_reparam(model, again, lambda _, name: "layers.1.mlp" in name)


CHANGES = [resized, new_head, set_by_name, layer_deleted, folded_by_the_core, partly_folded, reparametrised_twice]


@pytest.mark.parametrize("by", [hf_stable.sigma_reparam, stable_core.sigma_reparam], ids=["hf_stable", "stable_core"])
@pytest.mark.parametrize("settings", [{"gamma_init": "spectral"}, {"qkv": "joint"}, {"kind": "weight"}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_saved_loads(change, settings, by, tmp_path):
    model = llama()
    by(model, SigmaReparamConfig(**settings))
    change(model)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    reparametrised = any("parametrizations" in name for name in model.state_dict())
    assert ("quantization_config" in json.loads((tmp_path / "config.json").read_text())) == reparametrised
    loaded.save_pretrained(tmp_path / "again")  # with the settings that each layer has
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert configs[0].get("quantization_config") == configs[1].get("quantization_config")


def test_another_model_of_the_same_config_is_written_as_what_it_is(tmp_path):
    model = llama()
    twin = transformers.LlamaForCausalLM(model.config)
    stable_core.sigma_reparam(model)
    model.save_pretrained(tmp_path / "sigma")
    twin.save_pretrained(tmp_path / "plain")
    assert not hasattr(twin.config, "quantization_config")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    part = hf_stable.sigma_reparam(llama()).model  # of a whole that has the record
    part.save_pretrained(tmp_path / "part")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "part")
    assert torch.equal(loaded(IDS).last_hidden_state, part(IDS).last_hidden_state)


def test_what_cannot_be_told_is_refused_where_it_is_saved(tmp_path):
    model = hf_stable.sigma_reparam(llama(), SigmaReparamConfig(qkv="joint"))
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\..*: it shares its sigma with a layer that the model has no"
    ):
        model.save_pretrained(tmp_path)
    model = hf_stable.sigma_reparam(llama())
    torch.nn.utils.parametrizations.spectral_norm(model.lm_head)
    with pytest.raises(ValueError, match=r"lm_head\.weight: another parametrization lies on top of σReparam; remove"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


LOADS = ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM", "LlamaModel"]
READER = """
import json, sys
for package in ("hf_stable", "stable_core", "stable_monitor"):
    sys.modules[package] = None
import transformers
said = []
for name in sys.argv[2:]:
    for arguments in ({}, {"trust_remote_code": True}):
        try:
            getattr(transformers, name).from_pretrained(sys.argv[1], **arguments)
            said.append("loaded")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
try:
    transformers.pipeline("text-generation", sys.argv[1])
except Exception as error:
    said.append(str(error))
print(json.dumps(said))
"""


@pytest.mark.parametrize("by", [hf_stable.sigma_reparam, stable_core.sigma_reparam], ids=["hf_stable", "stable_core"])
def test_a_reader_without_hf_stable_is_told(by, tmp_path):
    model = llama()
    by(model)
    model.save_pretrained(tmp_path)
    done = subprocess.run([PYTHON, "-c", READER, tmp_path, *LOADS], capture_output=True, text=True, cwd="/")
    said = json.loads(done.stdout)
    assert len(said) == 9
    assert all("`import hf_stable`" in line for line in said), said
    assert all(line.startswith("ValueError: ") for line in said[:8])
    config = transformers.AutoConfig.from_pretrained(tmp_path)  # and here it is not there
    assert not hasattr(config, "transformers_weights")
    assert NOTE in (tmp_path / "config.json").read_text()
    stable_core.fold(model)
    model.save_pretrained(tmp_path)
    assert NOTE not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_models_of_this_plugin_are_written_as_what_they_are(tmp_path):
    model = stable_gpt(reparam="sigma", gamma_init="spectral", norm="layernorm")
    shared = model.config
    expected = model(IDS).logits
    stable_core.fold(model).save_pretrained(tmp_path / "folded")
    assert (model.config.reparam, shared.reparam) == ("none", "sigma")
    loaded, report = type(model).from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)

    hf_stable.sigma_reparam(
        model, SigmaReparamConfig(n_power_iterations=2)
    )  # once more, the head with it, by other means
    model.save_pretrained(tmp_path / "again")
    loaded, report = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    head = stable_gpt(reparam="sigma", tie_word_embeddings=False)
    stable_core.sigma_reparam(head, filter_fn=lambda _, name: name == "lm_head")  # which its config does not speak of
    head.save_pretrained(tmp_path / "head")
    loaded, report = type(head).from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(IDS).logits, head(IDS).logits)


def test_a_plain_layer_where_the_config_has_a_reparametrised_one_is_refused(tmp_path):
    settings = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    model = SigmaViTForImageClassification(SigmaViTConfig(**settings, num_hidden_layers=1, num_labels=3))
    images = torch.randn(2, 3, 16, 16)
    model.classifier = torch.nn.Linear(32, 3)
    with pytest.raises(
        ValueError, match=r"^classifier is plain, where reparam = 'sigma' has it reparametrised: allowed are"
    ):
        model.save_pretrained(tmp_path)
    stable_core.sigma_reparam(model.classifier, SigmaReparamConfig(gamma_init="spectral"))
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(images).logits, model(images).logits)


def with_v(path) -> None:
    """As folders were written that kept v beside u."""
    state = load_file(path)
    for name in [name for name in state if name.endswith(".0.u")]:
        state[name[:-1] + "v"] = torch.randn(1, state[name[: -len("0.u")] + "original"][0].numel())
    save_file(state, path, {"format": "pt"})


def without_layouts(path) -> None:
    """As folders were written that did not say what a sigma is of."""
    state = {name: x for name, x in load_file(path).items() if not name.endswith("._extra_state")}
    assert len(state) < len(load_file(path))
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("before", [with_v, without_layouts])
@pytest.mark.parametrize("own", [True, False])
def test_a_folder_from_before_loads_in_silence(own, before, tmp_path, caplog):
    model = stable_gpt(reparam="sigma") if own else hf_stable.sigma_reparam(llama(), SigmaReparamConfig(qkv="joint"))
    model.save_pretrained(tmp_path)
    before(tmp_path / "model.safetensors")
    transformers.logging.enable_propagation()
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and not caplog.records
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("own", [True, False])
def test_quantization_of_what_is_not_folded_is_refused(own, tmp_path):
    model = stable_gpt(reparam="sigma") if own else hf_stable.sigma_reparam(llama())
    model.save_pretrained(tmp_path)
    config = transformers.FineGrainedFP8Config(dequantize=True)  # which no package has to be there for
    with pytest.raises(ValueError, match="fold it first" if own else "quantized with SigmaReparamRecord"):
        type(model).from_pretrained(tmp_path, quantization_config=config)


def test_copies_save_too(tmp_path):
    model = copy.deepcopy(hf_stable.sigma_reparam(disturbed(llama()), SigmaReparamConfig(qkv="joint")))
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
