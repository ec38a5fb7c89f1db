"""Bounding queries and keys: what an attention's projections give afterwards, and what is refused."""

from itertools import product

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from stable_core import SigmaReparamConfig, sigma_layers, sigma_reparam
from stable_core.bounding import bound_queries_and_keys

WIDTH = 32


def separate() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})


def grouped() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, attention_bias=True
    )
    return transformers.models.llama.modeling_llama.LlamaAttention(config, 0)


def gpt2() -> nn.Module:
    return transformers.models.gpt2.modeling_gpt2.GPT2Attention(transformers.GPT2Config(n_embd=WIDTH, n_head=4))


def by_key_head() -> nn.Module:
    """Its query, key and value rows lie head by head, in one weight with one sigma."""
    config = transformers.GPTNeoXConfig(hidden_size=WIDTH, num_attention_heads=4, attention_bias=True)
    return transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention(config, 0)


def timms() -> nn.Module:
    return timm.layers.Attention(WIDTH, num_heads=4, qkv_bias=True)


def torchs() -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 4)


def projected(attention: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values of x, spelt out for each model as its own code has it."""
    if isinstance(attention, nn.MultiheadAttention):
        return list(nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1))
    for packed in ("qkv", "c_attn"):
        if hasattr(attention, packed):
            return list(getattr(attention, packed)(x).chunk(3, -1))
    if hasattr(attention, "query_key_value"):
        heads = attention.query_key_value(x).unflatten(-1, (4, 3 * WIDTH // 4))
        return [part.flatten(-2) for part in heads.chunk(3, -1)]
    layers = attention if isinstance(attention, nn.ModuleDict) else attention._modules
    return [layers[name](x) for name in ("q_proj", "k_proj", "v_proj")]


def norm(project) -> float:
    """The spectral norm of an affine map of x (WIDTH,)."""
    zero = torch.zeros(1, WIDTH)
    return torch.linalg.matrix_norm(project(torch.eye(WIDTH)) - project(zero), 2).item()


MAKERS = [separate, grouped, gpt2, by_key_head, timms, torchs]
JOINT = [separate, gpt2, timms, torchs]  # the others have weights of several sizes, or rows in another order


@pytest.mark.parametrize(("make", "reparam"), [*product(MAKERS, [None, "separate"]), *product(JOINT, ["joint"])])
def test_queries_and_keys_shrink_to_the_limit_and_all_else_stays(make, reparam):
    torch.manual_seed(0)
    attention = make()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (3 if "k_proj" in name else 0.5))
    if reparam is not None:
        sigma_reparam(attention, SigmaReparamConfig(gamma_init="spectral", qkv=reparam))
    x = torch.randn(7, WIDTH)
    before, others = projected(attention, x), {n: p.clone() for n, p in attention.named_parameters() if "o" in n[:2]}
    norms = [norm(lambda x, i=i: projected(attention, x)[i]) for i in range(2)]
    assert min(norms) > 2
    done = bound_queries_and_keys(attention, {"": attention}, limit=2.0)[""]
    assert (*done.queries, *done.keys) == pytest.approx((norms[0], 2.0, norms[1], 2.0), rel=2e-3)
    after = projected(attention, x)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        torch.testing.assert_close(new.detach(), old * (2.0 / norms[i] if i < 2 else 1), rtol=3e-3, atol=1e-4)
    for name, parameter in attention.named_parameters():
        if name in others:
            assert torch.equal(parameter, others[name])
    for _, sigma in sigma_layers(attention):
        assert sigma.sigma().tolist() == pytest.approx(sigma.true_sigma().tolist(), rel=1e-3)


def test_what_is_small_stays_small():
    attention = separate()
    with torch.no_grad():
        attention["q_proj"].weight.mul_(0.1 / torch.linalg.matrix_norm(attention["q_proj"].weight, 2))
    done = bound_queries_and_keys(attention, {"a": attention}, limit=0.5)["a"]
    assert done.queries == pytest.approx((0.1, 0.1), rel=1e-3) and done.keys[1] == pytest.approx(0.5, rel=1e-3)


def frozen() -> nn.Module:
    attention = separate()
    attention["k_proj"].requires_grad_(False)
    return attention


def with_weight_norm() -> nn.Module:
    attention = separate()
    weight_norm(attention["k_proj"])
    return attention


@pytest.mark.parametrize(
    ("make", "limit", "error"),
    [
        (separate, 0.0, "limit = 0.0: allowed are positive numbers"),
        (frozen, 1.0, "a.b: its queries or keys are frozen"),
        (with_weight_norm, 1.0, "a.b: its weight has weight norm"),
        (lambda: timm.layers.Attention(WIDTH, 4, qk_norm=True, norm_layer=nn.LayerNorm), 1.0, "a.b: QK-norm"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), 1.0, "a.b: its query and key projections have no known names"),
    ],
)
def test_what_cannot_be_bounded_is_refused_and_left_alone(make, limit, error):
    model, other = make(), separate()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=error):
        bound_queries_and_keys(nn.ModuleList([other, model]), {"other": other, "a.b": model}, limit)
    assert not list(sigma_layers(other)) and model.state_dict().keys() == before.keys()
