"""Adapters of PEFT on reparametrised models: merged, they give what they gave before, and the layers stay reparametrised."""

import copy
import itertools

import peft
import pytest
import torch
import transformers

import hf_stable
import stable_core
from stable_core import SigmaReparamConfig, sigma_layers

from .models import stable_gpt, tokens
from .test_any_model import GPT2
from .test_saved_as_it_is import llama

IDS = tokens(2, 8)
KINDS = {
    "lora": lambda **of: peft.LoraConfig(r=4, init_lora_weights=False, **of),
    "rank-stabilised": lambda **of: peft.LoraConfig(r=4, use_rslora=True, init_lora_weights=False, **of),
    "dora": lambda **of: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **of),
    "loha": lambda **of: peft.LoHaConfig(r=4, init_weights=False, **of),
    "lokr": lambda **of: peft.LoKrConfig(r=4, init_weights=False, **of),
    "ia3": lambda **of: peft.IA3Config(init_ia3_weights=False, feedforward_modules=[], **of),
    "oft": lambda **of: peft.OFTConfig(oft_block_size=4, init_weights=False, **of),
}
BASES = {
    "gpt2": (lambda: transformers.GPT2LMHeadModel(copy.deepcopy(GPT2)).eval(), ["c_attn", "mlp.c_fc"]),
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "up_proj", "lm_head"]),
    "stable_gpt": (stable_gpt, ["c_attn", "c_proj"]),
}


def adapted(base: str, kind: str, /, **settings):
    torch.manual_seed(0)
    build, targets = BASES[base]
    model = hf_stable.sigma_reparam(build(), SigmaReparamConfig(**settings))
    of = {"fan_in_fan_out": True} if base == "gpt2" and kind not in ("loha", "lokr", "oft") else {}
    made = peft.get_peft_model(model, KINDS[kind](target_modules=targets, **of)).eval()
    with torch.no_grad():  # adapters that do something
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


PAIRS = [
    ("llama", kind, settings)
    for kind, settings in itertools.chain(
        ((kind, {"gamma_init": "spectral"}) for kind in KINDS),
        (("lora", {"qkv": "joint"}), ("lora", {"qkv": "qk_joint"}), ("lora", {"kind": "weight"})),
    )
] + [(base, kind, {"qkv": "joint"}) for base in ("gpt2", "stable_gpt") for kind in ("lora", "dora")]


@pytest.mark.parametrize(("base", "kind", "settings"), PAIRS, ids=str)
@pytest.mark.parametrize("safe", [False, True])
@torch.no_grad()
def test_merged_is_what_the_adapter_gives(base, kind, settings, safe):
    model = adapted(base, kind, **settings)
    expected = model(IDS).logits
    with model.disable_adapter():
        without = model(IDS).logits
    effect = (expected - without).abs().max()
    assert effect > 1e-3
    plain = {name for name, _ in sigma_layers(model)}
    model.merge_adapter(safe_merge=safe)
    assert (model(IDS).logits - expected).abs().max() < 1e-3 * effect
    model.unmerge_adapter()
    assert (model(IDS).logits - expected).abs().max() < 1e-3 * effect
    with model.disable_adapter():
        assert (model(IDS).logits - without).abs().max() < 1e-3 * effect
    merged = model.merge_and_unload(safe_merge=safe)
    assert (merged(IDS).logits - expected).abs().max() < 1e-3 * effect
    assert len(list(sigma_layers(merged))) == len(plain)  # and it can go on training
    folded = hf_stable.fold(merged)
    assert (folded(IDS).logits - expected).abs().max() < 1e-3 * effect


@torch.no_grad()
def test_merged_models_and_adapters_are_saved(tmp_path):
    model = adapted("llama", "lora", gamma_init="spectral")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-3, atol=1e-5)
    base = hf_stable.sigma_reparam(llama(), SigmaReparamConfig(gamma_init="spectral"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_only_the_adapter_trains():
    model = adapted("llama", "lora", gamma_init="spectral").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_a_norm_that_is_fixed_is_refused_with_the_way_out():
    model = adapted("llama", "lora", kind="spectral")
    with model.disable_adapter():
        before = model(IDS).logits
    with pytest.raises(
        ValueError, match=r"kind = 'spectral' keeps the norm of its weight at 1, .* folded \(hf_stable\.fold\)"
    ):
        model.merge_and_unload()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_layers_that_are_not_reparametrised_merge_as_they_do():
    """In a process where others are."""
    adapted("llama", "lora", gamma_init="spectral")
    model = peft.get_peft_model(llama(), KINDS["lora"](target_modules=["q_proj"])).eval()
    expected = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", [hf_stable.sigma_reparam, stable_core.sigma_reparam], ids=["hf_stable", "stable_core"])
@torch.no_grad()
def test_a_model_that_is_reparametrised_under_its_adapter_merges_too(by):
    model = peft.get_peft_model(llama(), KINDS["lora"](target_modules=["q_proj", "up_proj"])).eval()
    base = model.get_base_model()
    by(base, SigmaReparamConfig(gamma_init="spectral"), lambda _, name: name.endswith("base_layer"))
    expected = model(IDS).logits
    assert len(list(sigma_layers(model))) == 4
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
