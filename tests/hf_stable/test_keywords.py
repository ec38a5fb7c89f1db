"""What a model's `forward`, and a configuration, do with names that they do not know."""

import copy
import inspect
import json
import warnings

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

import hf_stable
from hf_stable import SigmaTransformerConfig, SigmaViTConfig, StableGPTConfig, StableViTConfig

from .models import GPT, stable_gpt, tokens

VIT = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 48, "num_labels": 99}  # fmt: skip
MT = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
      "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
CONFIGS = {
    "StableGPT": (StableGPTConfig, GPT, "ForCausalLM"),
    "StableViT": (StableViTConfig, VIT, "ForImageClassification"),
    "SigmaViT": (SigmaViTConfig, VIT, "ForImageClassification"),
    "SigmaTransformer": (SigmaTransformerConfig, MT, "ForConditionalGeneration"),
}
every_family = pytest.mark.parametrize("family", CONFIGS)


def build(family: str) -> PreTrainedModel:
    config, settings, head = CONFIGS[family]
    torch.manual_seed(0)
    return getattr(hf_stable, f"{family}{head}")(config(**settings)).eval()


def inputs(family: str, labels: bool = True) -> dict[str, torch.Tensor]:
    ids = tokens(2, 6)
    if family.endswith("ViT"):
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": images, **({"labels": ids[:, 0]} if labels else {})}
    return {"input_ids": ids, **({"labels": ids} if labels else {})}


@every_family
def test_a_keyword_that_is_not_known_is_refused_and_named(family):
    model = build(family)
    for name, value in (
        ("atention_mask", torch.ones(2, 6)),
        ("pixel_value", ()),
        ("token_type_ids", None),
        ("headmask", 0),
    ):
        with pytest.raises(
            TypeError, match=f"{type(model).__name__} has no keyword '{name}': allowed are .*, and of trans"
        ):
            model(**inputs(family), **{name: value})


@every_family
def test_parts_refuse_it_too(family):
    """Every module whose forward takes further keywords, down to the attention that they end in."""
    model, called = build(family), []
    hidden = torch.zeros(2, 6, 32)
    for name, module in model.named_modules():
        parameters = inspect.signature(module.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        first = {**inputs(family), "x": hidden}[next(iter(parameters))]
        with pytest.raises(TypeError, match="has no keyword 'attn_msk'"):
            module(first, **({"source": hidden} if "source" in parameters else {}), attn_msk=None)
        called.append(name)
    assert len(called) > 3


@every_family
def test_what_transformers_hands_over_is_taken_and_acted_on(family):
    model = build(family)
    model.set_attn_implementation("eager")
    plain = model(**inputs(family))
    given = {"num_items_in_batch": torch.tensor(24), "use_cache": False, "cache_position": None}
    outputs = model(**inputs(family), **given, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(outputs.logits, plain.logits)
    if family == "StableGPT":  # 10 shifted tokens
        torch.testing.assert_close(outputs.loss, plain.loss * 10 / 24)
    states = "decoder_hidden_states" if family == "SigmaTransformer" else "hidden_states"
    assert outputs[states] is not None and getattr(plain, states) is None
    as_tuple = model(**inputs(family), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.loss)


@pytest.mark.parametrize("family", ["StableGPT", "SigmaTransformer"])
def test_a_cache_by_two_names_at_once_is_refused(family):
    model, cache = build(family), DynamicCache()
    with pytest.raises(TypeError, match="give one of cache and past_key_values, which are the same"):
        model(**inputs(family, labels=False), cache=cache, past_key_values=cache)
    model(**inputs(family), cache=None, past_key_values=None)


@every_family
def test_the_trainers_words_are_known(family, tmp_path):
    rows = [{name: tensor[i] for name, tensor in inputs(family).items()} for i in range(2)]
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
                             gradient_accumulation_steps=2, per_device_train_batch_size=1, eval_strategy="steps",
                             eval_steps=1)  # fmt: skip
    trainer = Trainer(build(family), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["eval_loss"] > 0


@pytest.mark.parametrize(("name", "meant"), [
    ("n_layr", "n_layer"), ("nrom", "norm"), ("gama_init", "gamma_init"), ("num_attn_heads", "num_attention_heads"),
])  # fmt: skip
def test_a_misspelt_setting_is_refused_with_what_was_meant(name, meant):
    with pytest.raises(ValueError, match=f"^StableGPTConfig has no {name}: did you mean {meant}"):
        StableGPTConfig(**{name: 2})
    with pytest.raises(ValueError, match=f"has no {name}"):
        StableGPTConfig.preset("S", **{name: 2})


@every_family
def test_settings_of_no_meaning_are_refused_and_transformers_own_are_not(family):
    config, settings, _ = CONFIGS[family]
    with pytest.raises(ValueError, match=rf"^{family}Config has no zzz: print\(config\) shows what it has"):
        config(zzz=1)
    own = {"torch_dtype": "float16", "attn_implementation": "eager", "problem_type": None, "name_or_path": "x"}
    own |= {"id2label": {i: f"class {i}" for i in range(99)}}
    made = config(**settings | own, output_attentions=True)
    assert (made.dtype, made._attn_implementation, made.num_labels) == (torch.float16, "eager", 99)
    for again in (config(**made.to_dict()), config.from_dict(made.to_dict()), copy.deepcopy(made)):
        assert again.to_dict() == made.to_dict()


def test_a_folder_of_another_version_loads_and_a_hand_edited_one_warns(tmp_path):
    stable_gpt().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    later = {"pruned_heads": {}, "use_bfloat16": False, "is_decoder": False, "a_field_of_tomorrow": [1]}
    (tmp_path / "config.json").write_text(json.dumps({**written, **later}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False, revision=None)
    assert config.a_field_of_tomorrow == [1]
    (tmp_path / "config.json").write_text(json.dumps({**written, "n_haed": 4}))
    with pytest.warns(UserWarning, match="StableGPTConfig has no n_haed, which changes nothing: did you mean n_head?"):
        AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.warns(
        UserWarning, match="StableGPTConfig has no atention, which changes nothing: did you mean attention?"
    ):
        AutoConfig.from_pretrained(tmp_path, atention="dot")
    with pytest.raises(TypeError, match="atention"):
        hf_stable.StableGPTForCausalLM.from_pretrained(tmp_path, atention="dot")
