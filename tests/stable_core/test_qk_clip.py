"""QK-clip's arithmetic: the rule head by head, what it does to effective weights, and what it refuses."""

import math
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from nanogpt_patch.model import GPT, STOCK, GPTConfig
from stable_core import SigmaReparamConfig, StableAttention, sigma_layers, sigma_reparam
from stable_core.attention_entropy import largest_logits
from stable_core.layers import find_projections
from stable_core.qk_clip import check_attention, check_heads, clip_factors, clip_heads, weights_to_clip
from stable_core.reference import attention_logits
from stable_core.reference import qk_clip as clip_by_head
from tests.stable_core.models import fused

S = torch.tensor([50.0, 400.0, 100.0, 101.0])


def test_one_key_for_each_query_is_the_papers_rule():
    queries, keys = clip_factors(S, 4, 100.0, 0.25)
    assert queries.tolist() == pytest.approx([1, 0.25**0.25, 1, (100 / 101) ** 0.25])
    assert keys.tolist() == pytest.approx([1, 0.25**0.75, 1, (100 / 101) ** 0.75])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_shared_keys_leave_no_head_above_the_threshold_and_nothing_grows(alpha):
    for S in 10 ** torch.empty(50, 8).uniform_(1, 4, generator=torch.Generator().manual_seed(0)):
        queries, keys = clip_factors(S, 2, 100.0, alpha)
        after = S * queries * keys.repeat_interleave(4)
        assert (after <= 100.001).logical_or(S <= 100).all() and max(queries.max(), keys.max()) <= 1
        worst = S.view(2, 4).max(1)
        assert after.view(2, 4).gather(1, worst.indices[:, None]).flatten().tolist() == pytest.approx(
            worst.values.clamp(max=100).tolist(), rel=1e-5
        )
        if alpha == 1:  # each head by itself
            assert after.tolist() == pytest.approx(S.clamp(max=100).tolist(), rel=1e-5)


def test_what_is_not_finite_or_below_zero_clips_nothing():
    for s in (math.nan, math.inf, -math.inf, -200.0):
        queries, keys = clip_factors(torch.tensor([s, 1.0]), 2, 100.0, 0.5)
        assert queries.tolist() == keys.tolist() == [1, 1]


# ---------------------------------------------------------------------------- the largest logit


@pytest.mark.parametrize("above", [-math.inf, 3.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "added", "by head"])
def test_the_largest_logit_is_that_of_the_whole_matrix(mask, causal, above, monkeypatch):
    monkeypatch.setattr(sys.modules[largest_logits.__module__], "CHUNK_ON_CPU", 40)
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(3, 4, 9, 8, generator=generator), torch.randn(3, 2, 9, 8, generator=generator)
    q[:, 1] *= 9
    q[:, 2] *= 0.1
    if mask is not None:
        mask = {
            "bool": torch.rand(3, 1, 9, 9, generator=generator) < 0.6,
            "added": torch.randn(9, 9, generator=generator),
            "by head": 4 * torch.randn(1, 4, 1, 9, generator=generator),
        }[mask]
    expected = attention_logits(q, k, scale=0.4, attn_mask=mask, is_causal=causal).amax(-1).float()
    found = largest_logits(q, k, scale=0.4, attn_mask=mask, is_causal=causal, above=above)
    left = found.isinf().all(-1).all(0)  # not looked at, or nothing but masked
    assert not left[1] and (left.any() == (above == 3.0 and (mask is None or mask.dtype == torch.bool)))
    torch.testing.assert_close(found[:, ~left], expected[:, ~left], rtol=1e-5, atol=1e-5)
    assert (expected[:, left] <= above).all()


def test_a_nan_is_looked_at():
    q = torch.zeros(1, 2, 3, 4)
    q[0, 1, 1] = math.nan
    assert largest_logits(q, torch.zeros_like(q), scale=1.0, above=5.0).isnan().any(-1).tolist() == [[False, True]]


# ---------------------------------------------------------------------------- the weights

SMALL = {"vocab_size": 20, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 4}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


def gpt2():
    return transformers.GPT2Model(transformers.GPT2Config(**SMALL))


def codegen():
    return fused(transformers.CodeGenModel)(transformers.CodeGenConfig(**SMALL, rotary_dim=4))


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, attention_bias=True, pad_token_id=0,
    ))  # fmt: skip


class TorchsOwn(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True, **settings)

    def forward(self, x):
        keys, values = x[:, :, : self.attention.kdim], x[:, :, : self.attention.vdim]
        return self.attention(x, keys, values, need_weights=False)


TOKENS, VECTORS = torch.arange(12).view(2, 6), torch.sin(torch.arange(2.0 * 6 * 32)).view(2, 6, 32)
MODELS = {
    "GPT-2": (gpt2, TOKENS),
    "CodeGen": (codegen, TOKENS),
    "Llama": (llama, TOKENS),
    "GPT": (lambda: GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=4, n_embd=32, **STOCK)), TOKENS),
    "BEiT": (lambda: timm.models.beit.Attention(32, 4, qkv_bias=True), VECTORS),
    "convolution": (lambda: timm.models.maxxvit.Attention2d(32, dim_head=8), VECTORS.mT.reshape(2, 32, 2, 3)),
    "torch": (TorchsOwn, VECTORS),
    "torch, other keys": (lambda: TorchsOwn(kdim=24, vdim=16), VECTORS),
}


def built(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A model with large weights, whose logits differ from head to head; its attention; what it is called with."""
    torch.manual_seed(0)
    build, x = MODELS[name]
    model = build()
    attention = next(module for module in model.modules() if find_projections(module))
    with torch.no_grad():
        for part, p in attention.named_parameters():
            if "table" not in part:
                p.normal_(0, 1.0 if p.ndim > 1 else 0.3)
    return model, attention, x


def called(model, x, monkeypatch) -> list[torch.Tensor]:
    """q, k and v, (batch, heads, tokens, head_dim), and the scale, as attention is called with them."""
    found, plain = [], F.scaled_dot_product_attention

    def seen(q, keys, v, *args, scale=None, **kwargs):
        k = keys
        if q.shape[1] == k.shape[1] == 4 and isinstance(model, transformers.LlamaModel):
            k = k[:, ::2]  # repeated for the queries that share them
        found.append([q.detach(), k.detach(), v.detach(), q.shape[-1] ** -0.5 if scale is None else scale])
        return plain(q, keys, v, *args, scale=scale, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", seen)
        model(x)
    return found[0]


def qk_clip(q, k, *settings):
    """q and k are (batch, heads, tokens, d1)."""
    return tuple(x.transpose(0, 1) for x in clip_by_head(q.transpose(0, 1), k.transpose(0, 1), *settings))


def compare(model, attention, x, monkeypatch, alpha: float = 0.3) -> None:
    q, k, v, scale = called(model, x, monkeypatch)
    S = attention_logits(q, k, scale=scale).amax((0, 2, 3)).float()
    t = S.sort().values[1].item() + 0.1  # half of the heads exceed it, or most
    check_attention("", attention)
    check_heads("", attention, len(S), q.shape[-1])
    clip_heads(attention, S, t, alpha)
    expected = qk_clip(q, k, S, t, alpha)
    q2, k2, v2, _ = called(model, x, monkeypatch)
    torch.testing.assert_close((q2, k2, v2), (*expected, v), rtol=2e-4, atol=2e-4)
    after = attention_logits(q2, k2, scale=scale).amax((0, 2, 3))
    assert (t < S).sum() >= 2 and after.max().item() == pytest.approx(t, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_those_of_the_slow_twin(name, monkeypatch):
    compare(*built(name), monkeypatch)


@pytest.mark.parametrize(
    "name, qkv",
    [
        ("GPT", "separate"),
        ("GPT", "joint"),
        ("GPT-2", "qk_joint"),
        ("Llama", "separate"),
        ("Llama", "joint"),
        ("CodeGen", "separate"),
    ],
)
def test_under_sigma_reparam_it_acts_on_what_is_effective(name, qkv, monkeypatch):
    model, attention, x = built(name)
    sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral", qkv=qkv))
    value = {"GPT": "c_attn", "GPT-2": "c_attn", "CodeGen": "qkv_proj", "Llama": "v_proj"}[name]
    before = attention.get_submodule(value).parametrizations.weight.original.clone()
    compare(model, attention, x, monkeypatch)
    for _, sigma in sigma_layers(model):
        torch.testing.assert_close(sigma.sigma(), sigma.true_sigma(), rtol=1e-3, atol=0)  # u followed
    after = attention.get_submodule(value).parametrizations.weight.original
    same = (after == before).float().mean().item()  # values, and heads that are not clipped, are not written to
    assert same == 1 if name == "Llama" else 1 / 3 < same < 1


def test_under_torchs_weight_norm(monkeypatch):
    model, attention, x = built("Llama")
    for name in ("q_proj", "k_proj"):
        weight_norm(getattr(attention, name))
    compare(model, attention, x, monkeypatch)


def test_the_rotary_key_that_all_heads_share_stays(monkeypatch):
    """In latent attention, as in Kimi K2."""
    config = transformers.DeepseekV3Config(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24,
        kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, intermediate_size=64, n_routed_experts=8,
        moe_intermediate_size=16, first_k_dense_replace=1, pad_token_id=0,
    )  # fmt: skip
    monkeypatch.setitem(MODELS, "DeepSeek", (lambda: transformers.DeepseekV3Model(config), TOKENS))
    model, attention, x = built("DeepSeek")
    q, k, v, scale = called(model, x, monkeypatch)
    logits = attention_logits(q, k, scale=scale)
    S = logits.amax((0, 2, 3)).float()
    t = S.sort().values[1].item() + 0.1
    check_attention("", attention)
    check_heads("", attention, 4, 20)
    clip_heads(attention, S, t, 0.3)
    q2, k2, v2, _ = called(model, x, monkeypatch)
    factors = (t / S).clamp(max=1)[:, None, None]
    expected = k.clone()
    expected[..., :12] *= factors**0.7
    torch.testing.assert_close((k2, v2), (expected, v), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(attention_logits(q2, k2, scale=scale), logits * factors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen, alpha", [("k_proj", 1.0), ("q_proj", 0.0)])
def test_a_frozen_projection_stays_and_the_other_takes_it_all(frozen, alpha, monkeypatch):
    model, attention, x = built("Llama")
    getattr(attention, frozen).requires_grad_(False)
    before = getattr(attention, frozen).weight.clone()
    q, k, _, scale = called(model, x, monkeypatch)
    S = attention_logits(q, k, scale=scale).amax((0, 2, 3)).float()
    clip_heads(attention, S, 1.0, 0.5)
    assert torch.equal(getattr(attention, frozen).weight, before)
    expected = qk_clip(q, k, S, 1.0, alpha)
    torch.testing.assert_close(tuple(called(model, x, monkeypatch)[:2]), expected, rtol=1e-5, atol=1e-5)
    assert len(weights_to_clip(attention)) == 1


# ---------------------------------------------------------------------------- what is refused


class Attention(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        for name, value in settings.items():
            setattr(self, name, value)


def packed(**settings):
    attention = Attention(query_key_value=nn.Linear(8, 24), **settings)
    del attention.q_proj, attention.k_proj, attention.v_proj
    return attention


def tied():
    attention = Attention()
    attention.k_proj.weight = attention.q_proj.weight
    return attention


def parametrized(**settings):
    return sigma_reparam(Attention(), SigmaReparamConfig(**settings))


def with_spectral_norm():
    attention = Attention()
    spectral_norm(attention.q_proj)
    return attention


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: nn.Linear(8, 8), "its query and key projections have no known names"),
        (
            lambda: Attention(q_norm=nn.RMSNorm(4)),
            r"QK-norm \(q_norm\).*lower the gain of the norm, or leave the layer out",
        ),
        (lambda: StableAttention(8, 2, 16, 0.25), r"QK-norm \(q_norm, k_norm\)"),
        (lambda: Attention(logit_scale=nn.Parameter(torch.ones(2))), r"QK-norm \(logit_scale\)"),
        (lambda: packed(num_heads=2), "not known which rows"),
        (tied, "one weight"),
        (lambda: parametrized(kind="spectral"), "kind = 'spectral' fixes the norm"),
        (with_spectral_norm, "_SpectralNorm makes its weight"),
    ],
)
def test_what_cannot_be_clipped_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=f"^h.0.attn: .*{message}"):
        check_attention("h.0.attn", build())
    check_attention("", Attention(q_norm=nn.Identity(), k_norm=nn.Identity()))  # timm's, without QK-norm


@pytest.mark.parametrize("heads, head_dim", [(2, 5), (3, None), (1, None)])
def test_heads_that_do_not_fit_the_weights_are_refused(heads, head_dim):
    """L2 attention has a feature more; under tensor parallelism there are fewer heads than the weights have."""
    if heads == 1:
        return check_heads("", Attention(), 1, None)  # all as one
    with pytest.raises(ValueError, match=f"^attn: attention with {heads} heads.* 8 rows of W_q and 8 of W_k"):
        check_heads("attn", Attention(), heads, head_dim)
