"""Packed projections of models that people train: what has a sigma of its own is a projection that the model computes with."""

import pytest
import timm
import torch
import transformers
from torch import nn

from stable_core import SigmaReparamConfig, sigma_reparam

SMALL = {"vocab_size": 20, "n_positions": 16, "n_embd": 64, "n_layer": 1, "n_head": 4}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0}


def codegen():
    model = transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**SMALL, rotary_dim=4))
    return model.transformer.h[0].attn, "qkv_proj"


def bigcode():
    model = transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**SMALL, multi_query=False))
    return model.transformer.h[0].attn, "c_attn"


def phi3_with_grouped_queries():
    """Queries of twice the width and keys and values of half of it: three widths in all."""
    config = transformers.Phi3Config(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).model.layers[0].self_attn, "qkv_proj"


def tiny_vit():
    return timm.models.tiny_vit.Attention(64, key_dim=16, num_heads=4, attn_ratio=1, resolution=(3, 3)), "qkv"


def coatnet():
    return timm.models.maxxvit.AttentionCl(64, dim_head=16), "qkv"


@pytest.mark.parametrize(
    "build", [codegen, bigcode, phi3_with_grouped_queries, tiny_vit, coatnet], ids=lambda f: f.__name__
)
def test_rows_that_are_no_three_equal_parts_have_one_sigma(build):
    torch.manual_seed(0)
    attention, name = build()
    layer = attention.get_submodule(name)
    assert layer.weight.shape[0] == 3 * layer.weight.shape[1]  # as it is where they are
    with pytest.raises(ValueError, match="qk_joint' cannot tell v from q and k"):
        sigma_reparam(attention, SigmaReparamConfig(qkv="qk_joint"), lambda module, _: module is layer)
    sigma_reparam(attention, None, lambda module, _: module is layer)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-3)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)).transformer.h[0].attn, "c_attn"


def coatnet_with_projections_first():
    return timm.models.maxxvit.AttentionCl(64, dim_head=16, head_first=False), "qkv"


def phi3():
    config = transformers.Phi3Config(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).model.layers[0].self_attn, "qkv_proj"


def torchs_own():
    return nn.MultiheadAttention(64, 4), "in_proj"


@pytest.mark.parametrize("build", [gpt2, coatnet_with_projections_first, phi3, torchs_own], ids=lambda f: f.__name__)
def test_three_equal_parts_have_a_sigma_each(build):
    torch.manual_seed(0)
    attention, name = build()
    sigma_reparam(attention)
    W = attention.in_proj_weight if name == "in_proj" else attention.get_submodule(name).weight
    W = W.T if build is gpt2 else W
    norms = torch.linalg.matrix_norm(W.unflatten(0, (3, 64)), 2)
    torch.testing.assert_close(norms, torch.ones(3), rtol=1e-3, atol=0)
