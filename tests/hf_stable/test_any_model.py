"""σReparam on any transformers model: saved, loaded, trained and folded by the usual calls."""

import copy
import json
import subprocess

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import hf_stable
from stable_core import SigmaReparamConfig, fold_state_dict
from tests.stable_core.models import reparametrised
from tests.warm import PYTHON

TOKENS = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, bos_token_id=0, eos_token_id=0)
SPEECH = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "vocab_size": 30}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 99}
FAMILIES = {  # class, config, inputs, and how many layers are reparametrised
    "gpt2": ("GPT2LMHeadModel", GPT2, {"input_ids": TOKENS}, 8),
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SMALL, vocab_size=99), {"input_ids": TOKENS}, 15),
    "bert": ("BertForMaskedLM", transformers.BertConfig(**SMALL, vocab_size=99), {"input_ids": TOKENS}, 13),
    "vit": ("ViTForImageClassification", transformers.ViTConfig(**SMALL, image_size=16, patch_size=8),
            {"pixel_values": NOISE[:, :768].reshape(2, 3, 16, 16)}, 14),
    "wav2vec2": ("Wav2Vec2ForCTC", transformers.Wav2Vec2Config(**SMALL, **SPEECH), {"input_values": NOISE}, 16),
    "t5": ("T5ForConditionalGeneration", transformers.T5Config(**T5),
           {"input_ids": TOKENS, "decoder_input_ids": TOKENS}, 32),
}  # fmt: skip


def build(family: str) -> torch.nn.Module:
    name, config, *_ = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, name)(copy.deepcopy(config)).eval()


def outputs(model, family: str) -> torch.Tensor:
    return model(**FAMILIES[family][2])[0]


def reparametrise(model, **settings):
    weight_norm_stays = model.config.model_type == "wav2vec2"
    picks = (lambda module, name: "pos_conv" not in name) if weight_norm_stays else None
    return hf_stable.sigma_reparam(model, SigmaReparamConfig(**settings), picks)


def update(model, family: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    outputs(model, family).square().mean().backward()
    optimizer.step()


def close(a, b, rel: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= rel * b.abs().max())


def same(a, b) -> bool:
    """Parameters and buffers bitwise, and of the same type."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_and_trained(family, tmp_path):
    model = build(family)
    plain = outputs(model, family).detach()
    assert reparametrise(model, gamma_init="spectral") is model
    assert len(model.config.quantization_config["layers"]) == FAMILIES[family][3]
    assert close(outputs(model, family), plain)

    for _ in range(2):  # the second time of weights that were loaded and trained
        model.save_pretrained(tmp_path)
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert same(loaded, model)
        assert torch.equal(outputs(loaded, family), outputs(model, family))
        assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
        update(loaded, family)
        for new, old in zip(reparametrised(loaded), reparametrised(model), strict=True):
            (W,), (old_W,) = new.originals(), old.originals()
            assert not torch.equal(W, old_W)
            assert not torch.equal(new.gamma, old.gamma)
            rows = W.detach().T if new.transposed else W.detach().flatten(1)
            for block, u, old_u in zip(*(x.split(new.rows) for x in (rows, new.u, old.u)), strict=True):
                once = normalize(block @ normalize(block.T @ old_u, dim=0), dim=0)  # one power iteration
                torch.testing.assert_close(u, once, rtol=1e-4, atol=1e-5)
        model = loaded


@pytest.mark.parametrize("qkv", ["joint", "qk_joint"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_saved_file_folds_as_the_model_does(family, qkv, tmp_path):
    model = reparametrise(build(family), qkv=qkv)
    update(model, family)
    model.save_pretrained(tmp_path)
    folded, plain = fold_state_dict(load_file(tmp_path / "model.safetensors")), hf_stable.fold(model).state_dict()
    torch.testing.assert_close(folded, {name: plain[name] for name in folded}, rtol=1e-6, atol=1e-6)
    assert {x.data_ptr() for x in plain.values()} == {plain[name].data_ptr() for name in folded}  # the rest is tied


def test_folded_models_need_transformers_alone(tmp_path):
    families = {}
    for family in FAMILIES:
        model = reparametrise(build(family))
        update(model, family)
        families[family] = (type(model).__name__, FAMILIES[family][2], outputs(model, family).detach())
        assert hf_stable.fold(model) is model
        model.save_pretrained(tmp_path / family)
    torch.save(families, tmp_path / "families.pt")
    script = f"""
import sys
for package in ("hf_stable", "stable_core", "stable_monitor"):
    sys.modules[package] = None  # importing it is an error
import torch, transformers
for family, (name, inputs, outputs) in torch.load({str(tmp_path / "families.pt")!r}).items():
    folder = {str(tmp_path)!r} + "/" + family
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(model(**inputs)[0], outputs, rtol=0, atol=1e-5 * outputs.abs().max().item())
"""
    subprocess.run([PYTHON, "-c", script], check=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize(
    "settings", [{"qkv": "joint"}, {"qkv": "qk_joint"}, {"kind": "spectral"}, {"kind": "weight"}], ids=str
)
def test_every_setting_comes_back(family, settings, tmp_path):
    model = reparametrise(build(family), **settings)
    update(model, family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(loaded, model)
    for trained in (model, loaded):  # and goes on with the settings it had
        trained.zero_grad()
        update(trained, family)
    assert same(loaded, model)


@pytest.mark.parametrize(
    "arguments",
    [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"trust_remote_code": True}, {"low_cpu_mem_usage": True}],
    ids=str,
)
def test_ways_to_load(arguments, tmp_path):
    model = reparametrise(build("gpt2"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **arguments), model)


def test_half_precision_keeps_u_and_v(tmp_path):
    model = reparametrise(build("gpt2"))
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        full = model.state_dict()[name]
        assert torch.equal(tensor, full if name.endswith(".u") else full.bfloat16())
    loaded.save_pretrained(tmp_path / "bf16")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "bf16")
    assert same(again, loaded)
    assert close(outputs(again.float(), "gpt2"), outputs(model, "gpt2"), 0.02)  # it casts as any model


def test_another_class_loads_the_layers_it_has(tmp_path):
    model = reparametrise(build("bert"))
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)  # no prefix, and no head
    assert same(base, model.bert)
    base.save_pretrained(tmp_path / "base")
    tagger = transformers.BertForTokenClassification.from_pretrained(tmp_path / "base")
    assert same(tagger.bert, model.bert)
    assert type(tagger.classifier) is torch.nn.Linear

    t5 = reparametrise(build("t5"))
    t5.save_pretrained(tmp_path / "t5")
    assert same(transformers.T5EncoderModel.from_pretrained(tmp_path / "t5").encoder, t5.encoder)


def test_the_config_is_the_models_own_and_says_how(tmp_path):
    config = copy.deepcopy(GPT2)
    plain, model = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    hf_stable.sigma_reparam(model, SigmaReparamConfig(n_power_iterations=2), lambda _, name: "mlp" in name)
    assert not hasattr(plain.config, "quantization_config")
    written = json.loads(copy.deepcopy(model.config).to_json_string())["quantization_config"]
    assert written == {
        "quant_method": "sigma_reparam", "gamma_init": "spectral", "qkv": "separate", "n_power_iterations": 2,
        "stop_gradient": False, "kind": "sigma",
        "layers": [f"transformer.h.{i}.mlp.{layer}" for i in (0, 1) for layer in ("c_fc", "c_proj")],
    }  # fmt: skip
    model.set_attn_implementation("eager")  # which attention layers read from the config they hold
    assert model(TOKENS, output_attentions=True).attentions[0] is not None
    assert plain.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config == written
    assert loaded.transformer.h[0].mlp.c_fc.parametrizations.weight[0].config.n_power_iterations == 2
    hf_stable.fold(loaded)
    assert "quantization_config" not in loaded.config.to_dict()


def train(model, folder, resume=None):
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 90, (64, 12), generator=torch.manual_seed(0))]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, logging_steps=1, save_steps=2, learning_rate=1e-3, max_steps=4,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_saves_and_resumes_bitwise(tmp_path):
    model = reparametrise(build("gpt2"), gamma_init="spectral")
    losses = train(model, tmp_path)
    checkpoint = str(tmp_path / "checkpoint-2")
    other = reparametrise(build("gpt2"), gamma_init="spectral")
    assert train(other, tmp_path, checkpoint) == losses
    assert same(other, model)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(checkpoint)  # and a loaded model trains too
    assert train(loaded, tmp_path, checkpoint) == losses
    assert same(loaded, model)


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"gamma_init": "two"}, "gamma_init = 'two': allowed are 'one', 'spectral'"),
        ({"n_power_iterations": "1"}, "n_power_iterations = '1': allowed are whole numbers from 1"),
        ({"gama": 1}, "quantization_config: gama is no setting; allowed are layers, gamma_init, "),
        ({"layers": "all"}, "quantization_config: layers = 'all': allowed is a list of the names of layers"),
        ({"layers": ["transformer.h.7.mlp.c_fc"]}, "transformer.h.7.mlp.c_fc is no Linear, Conv or attention layer of this"),
        ({"layers": ["transformer.ln_f"]}, "transformer.ln_f is no Linear, Conv or attention layer of this GPT2LMHead"),
        ({"kind": "weight"}, "c_attn.parametrizations.weight.original0: not in the checkpoint"),
        (
            {"qkv": "qk_joint"},
            r"c_attn: the state dict has sigmas of 32, 32, 32 rows of \(in, out\), the model sigmas of 64, 32 rows",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_an_edited_config_is_refused(edit, message, tmp_path):
    reparametrise(build("gpt2")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(edit)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_config_is_refused():
    with pytest.raises(ValueError, match=r"^Linear: not a model of transformers; stable_core\.sigma_reparam"):
        hf_stable.sigma_reparam(torch.nn.Linear(2, 2))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model, weights = reparametrise(build("gpt2")), tmp_path / "model.safetensors"
    load = transformers.GPT2LMHeadModel.from_pretrained
    model.save_pretrained(tmp_path)
    tensors, whole = load_file(weights), weights.read_bytes()

    save_file(build("gpt2").transformer.state_dict(), weights, {"format": "pt"})  # a plain checkpoint
    with pytest.raises(ValueError, match=r"^transformer\.h\.0\.attn\.c_attn\.parametrizations\.weight\.original: not"):
        load(tmp_path)
    for lost in ("parametrizations.weight.0.u", "bias"):
        name = f"transformer.h.1.attn.c_attn.{lost}"
        save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=f"^{name}: not in the checkpoint"):
            load(tmp_path)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match="incomplete"):
        load(tmp_path)
    weights.write_bytes(whole)
    with pytest.raises(ValueError, match="device_map offloads, to cpu, disk: allowed"):
        load(tmp_path, device_map={"transformer": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "offload")
    assert same(load(tmp_path), model)


def test_models_that_cannot_be_reparametrised_are_refused():
    model = reparametrise(build("gpt2"))
    with pytest.raises(ValueError, match="GPT2LMHeadModel: its config has quant_method = 'sigma_reparam'; fold or"):
        hf_stable.sigma_reparam(model)
    with pytest.raises(ValueError, match="nothing to fold"):
        hf_stable.fold(build("gpt2"))
    speech = build("wav2vec2")
    with pytest.raises(
        ValueError, match=r"pos_conv_embed\.conv: already reparametrised; fold it first, or leave it out"
    ):
        hf_stable.sigma_reparam(speech)
    assert not hasattr(speech.config, "quantization_config")


def test_folded_it_is_quantized_as_the_plain_model():
    def quantized(model):
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    plain = build("llama")
    folded = hf_stable.fold(reparametrise(build("llama"), gamma_init="spectral"))
    expected = outputs(quantized(plain), "llama")
    assert close(outputs(quantized(folded), "llama"), expected, rel=1e-3)
    assert not close(outputs(plain, "llama"), expected, rel=1e-3)
