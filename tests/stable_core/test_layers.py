"""The catalogue of layers beside what models compute: which rows are which head's, and which projections have a sigma."""

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from stable_core import SigmaReparamConfig, sigma_reparam
from stable_core.layers import find_projections, is_transposed, rows_of
from tests.stable_core.models import fused

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
    sigma_reparam(attention, SigmaReparamConfig(gamma_init="one"), lambda module, _: module is layer)
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
    sigma_reparam(attention, SigmaReparamConfig(gamma_init="one"))
    W = attention.in_proj_weight if name == "in_proj" else attention.get_submodule(name).weight
    W = W.T if build is gpt2 else W
    norms = torch.linalg.matrix_norm(W.unflatten(0, (3, 64)), 2)
    torch.testing.assert_close(norms, torch.ones(3), rtol=1e-3, atol=0)


# ---------------------------------------------------------------------------- the rows of each head


def falcon(**settings):
    config = transformers.FalconConfig(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, bos_token_id=0, eos_token_id=0,
        alibi=False, **settings,
    )  # fmt: skip
    return transformers.FalconModel(config)


def gpt_neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPTNeoXModel(config)


def llama(**settings):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=64, pad_token_id=0, **settings,
    )  # fmt: skip
    return transformers.LlamaModel(config)


def phi3_model():
    return transformers.Phi3Model(transformers.Phi3Config(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, pad_token_id=0,
    ))  # fmt: skip


def persimmon():
    return transformers.PersimmonModel(transformers.PersimmonConfig(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        qk_layernorm=False, pad_token_id=0,
    ))  # fmt: skip


def codegen(heads: int):
    config = transformers.CodeGenConfig(**{**SMALL, "n_head": heads}, rotary_dim=4)
    return fused(transformers.CodeGenModel)(config)


MODELS = {
    "GPT-2, thirds": lambda: transformers.GPT2Model(transformers.GPT2Config(**SMALL)),
    "CodeGen, four parts": lambda: codegen(4),
    "CodeGen, 8 heads": lambda: codegen(8),
    "GPTBigCode": lambda: transformers.GPTBigCodeModel(transformers.GPTBigCodeConfig(**SMALL, multi_query=False)),
    "GPTBigCode, one key head": lambda: transformers.GPTBigCodeModel(transformers.GPTBigCodeConfig(**SMALL)),
    "GPT-NeoX, head by head": gpt_neox,
    "Llama, grouped queries": llama,
    "Llama, heads narrower than the width": lambda: llama(head_dim=4),
    "Falcon, one key head": lambda: falcon(multi_query=True),
    "Falcon, head by head": lambda: falcon(multi_query=False),
    "Falcon, grouped": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    "Phi-3, grouped, packed": phi3_model,
    "Persimmon, head by head": persimmon,
}  # fmt: skip


TOKEN = torch.full((1, 1, 64), 0.5)
LAYERS = {
    "timm, thirds": (lambda: timm.layers.Attention(64, 4), TOKEN),
    "timm, head by head": (lambda: timm.models.maxxvit.AttentionCl(64, dim_head=16), TOKEN),
    "timm, projections first": (lambda: timm.models.maxxvit.AttentionCl(64, dim_head=16, head_first=False), TOKEN),
    "timm, convolution": (lambda: timm.models.maxxvit.Attention2d(64, dim_head=16), TOKEN.view(1, 64, 1, 1)),
    "timm, wider values": (lambda: timm.models.tiny_vit.Attention(64, 8, 4, attn_ratio=2, resolution=(1, 1)), TOKEN),
    "timm, queries apart": (lambda: timm.models.pvt_v2.Attention(64, 4, linear_attn=False), TOKEN, (1, 1)),
}  # fmt: skip
CASES = {name: (build, torch.tensor([[3]])) for name, build in MODELS.items()} | LAYERS


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_that_the_model_makes_its_heads_of(name, monkeypatch):
    """One token, at position 0, where rotary embeddings turn nothing: what a layer gives is what attention is called with."""
    torch.manual_seed(0)
    build, *args = CASES[name]
    model, given, called = build(), {}, []
    model.train(False)
    attention = next(module for module in model.modules() if find_projections(module))
    places = find_projections(attention)
    for held, (layer, _) in places.items():
        layer.register_forward_hook(lambda _, args, output, held=held: given.update({held: output.flatten()}))
    plain = F.scaled_dot_product_attention

    def seen(q, k, v, *args, **kwargs):
        called.append([x.flatten(0, -2) for x in (q, k, v)])
        return plain(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    with torch.no_grad():
        model(*args)
    made = {}
    for held, (layer, tensor) in places.items():
        shape = getattr(layer, tensor).flatten(1).shape
        rows = rows_of(attention, held, shape[::-1] if is_transposed(layer) else tuple(shape))
        every = torch.cat([x.flatten() for x in rows.values()])
        assert torch.equal(every.sort().values, torch.arange(len(given[held])))
        made |= {role: given[held][x] for role, x in rows.items()}
    for role, expected in zip("qkv", called[0], strict=True):
        if len(expected) > len(made[role]):  # keys are repeated for the queries that share them
            made[role] = made[role].repeat_interleave(len(expected) // len(made[role]), dim=0)
        torch.testing.assert_close(made[role], expected, rtol=0, atol=0)


def test_rows_of_torchs_own(monkeypatch):
    """Its packed weight is no layer: what it gives is computed beside it."""
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(1, 1, 32)
    called, plain = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(a[:3]) or plain(*a, **k))
    attention.train()(x, x, x, need_weights=False)
    given = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).flatten()
    rows = rows_of(attention, "qkv", (96, 32))
    for role, expected in zip("qkv", called[0], strict=True):
        torch.testing.assert_close(given[rows[role]], expected.flatten(0, -2))


def test_bloom_packs_head_by_head():
    """Its attention is no call that can be seen, but a function of it that takes the rows apart is."""
    config = transformers.BloomConfig(vocab_size=20, hidden_size=64, n_layer=1, n_head=4)
    attention = transformers.BloomModel(config).h[0].self_attention
    rows = rows_of(attention, "qkv", (192, 64))
    numbers = torch.arange(192.0).expand(1, 1, 192)
    for role, part in zip("qkv", attention._reshape(numbers), strict=True):
        assert torch.equal(part.flatten(0, -2), rows[role].float())


@pytest.mark.parametrize("rank", [None, 24])
def test_rows_of_latent_attention(rank, monkeypatch):
    """DeepSeek's: of the queries one part is for the head's own keys, one for the rotary key that all heads share."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=20, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=rank,
        kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, intermediate_size=64, n_routed_experts=8,
        moe_intermediate_size=16, first_k_dense_replace=1, rope_interleave=False, pad_token_id=0,
    )  # fmt: skip
    model, given, called = transformers.DeepseekV3Model(config).eval(), {}, []
    attention = model.layers[0].self_attn
    places = find_projections(attention)
    for held, (layer, _) in places.items():
        layer.register_forward_hook(lambda _, args, output, held=held: given.update({held: output.flatten()}))
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(a[:3]) or plain(*a, **k))
    model(torch.tensor([[3]]))
    q, k, v = (x.flatten(0, -2) for x in called[0])
    rows = {held: rows_of(attention, held, tuple(layer.weight.shape)) for held, (layer, _) in places.items()}
    for held, role, expected in (
        ("q", "q", q[:, :12]),
        ("q", "q_shared", q[:, 12:]),
        ("kv", "k", k[:, :12]),
        ("kv", "v", v),
    ):
        torch.testing.assert_close(given[held][rows[held][role]], expected, rtol=0, atol=0)


class Unknown(nn.Module):
    def __init__(self, name: str, out: int, **settings) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(32, out))
        for key, value in settings.items():
            setattr(self, key, value)


@pytest.mark.parametrize(
    "attention",
    [
        Unknown("query_key_value", 96, num_heads=4),  # nobody knows whether by heads or by projections
        Unknown("qkv", 65),  # MobileViTV2's: 1 + 2 * width
        Unknown("qkv", 96, num_heads=4, num_kv_heads=2, key_dim=4, val_dim=7),
        Unknown("qkv", 96, num_heads=5, num_kv_heads=2),
        Unknown("qkv", 96, head_first=True),  # heads lie together, but how many?
    ],
)
def test_what_is_not_known_is_said(attention):
    ((held, (layer, _)),) = find_projections(attention).items()
    assert rows_of(attention, held, tuple(layer.weight.shape)) is None
