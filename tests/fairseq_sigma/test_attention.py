"""Attention with other softmaxes than fairseq's own: against its equations, one head and one query at a time."""

import math

import pytest
import torch
from fairseq.modules import MultiheadAttention
from torch import nn

from fairseq_sigma.attention import QueryKeyAttention, change_attention
from stable_core.options import Options

WIDTH, HEADS, KEYS, POSITIONS = 12, 3, 7, 32
ATTENTIONS = ["qknorm", "stable", "l2", "l2_tied"]


def attention(name: str, **kwargs) -> QueryKeyAttention:
    torch.manual_seed(0)
    made = MultiheadAttention(WIDTH, HEADS, **kwargs)
    change_attention(made, Options(attention=name, alpha=0.3, tau_scale=2.0), POSITIONS)
    for parameter in made.parameters():  # none 0 or 1, as biases and gammas are at first
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0, 0.5)
    return made


def logit(name: str, module: nn.Module, q: torch.Tensor, k: torch.Tensor) -> float:
    """Of a query and a key of one head, as the papers write it."""
    d = len(q)
    if name in ("l2", "l2_tied"):
        return -sum((a - b) ** 2 for a, b in zip(q.tolist(), k.tolist(), strict=True)) / math.sqrt(d)
    gammas = module.q_norm.weight, module.k_norm.weight
    if name == "qknorm":  # gamma x / rms(x)
        q, k = (g * x / (x.square().mean() + 1e-5).sqrt() for g, x in zip(gammas, (q, k), strict=True))
        return (q @ k).item() / math.sqrt(d)
    q, k = (g * d**0.3 * x / (x.square().sum() + 1e-5).sqrt() for g, x in zip(gammas, (q, k), strict=True))
    return 2.0 * 1.618 * math.log2(POSITIONS) * (q @ k).item() / d ** (2 * 0.3)


@torch.no_grad()
def slow(name: str, module: nn.Module, query, key, padding=None, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (n, batch, width) and the weights (heads, batch, n, m)."""
    projected_key = (module.q_proj if name == "l2_tied" else module.k_proj)(key)
    q, v = module.q_proj(query), module.v_proj(key)
    (n, batch, _), m, d = query.shape, len(key), WIDTH // HEADS
    weights, mixed = torch.zeros(HEADS, batch, n, m), torch.zeros(n, batch, WIDTH)
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        for b in range(batch):
            for i in range(n):
                logits = torch.tensor([logit(name, module, q[i, b, part], projected_key[j, b, part]) for j in range(m)])
                if padding is not None:
                    logits[padding[b]] = -torch.inf
                weights[h, b, i] = (logits if mask is None else logits + mask[i]).softmax(-1)
                mixed[i, b, part] = weights[h, b, i] @ v[:, b, part]
    return module.out_proj(mixed), weights


PADDING = torch.arange(KEYS) >= torch.tensor([KEYS, KEYS - 3])[:, None]
CAUSAL = torch.full((KEYS, KEYS), -torch.inf).triu(1)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("padding, mask", [(None, CAUSAL), (PADDING, None), (PADDING, CAUSAL)])
def test_self_attention(name, padding, mask):
    module, x = attention(name, self_attention=True).train(), torch.randn(KEYS, 2, WIDTH)
    expected, weights = slow(name, module, x, x, padding, mask)
    y, none = module(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)
    assert none is None
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y, mean = module(x, x, x, key_padding_mask=padding, attn_mask=mask)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, weights.mean(0), rtol=1e-4, atol=1e-5)
    _, by_head = module(x, x, x, key_padding_mask=padding, attn_mask=mask, need_head_weights=True)
    torch.testing.assert_close(by_head, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("beams", [1, 2])
def test_attention_to_an_encoder_whose_keys_are_cached(name, beams):
    """Every sentence `beams` times, as in beam search, where set_beam_size has keys computed once for all of them."""
    module = attention(name, encoder_decoder_attention=True).eval()
    memory, queries = (x.repeat_interleave(beams, 1) for x in (torch.randn(KEYS, 2, WIDTH), torch.randn(3, 2, WIDTH)))
    queries = queries + torch.randn_like(queries)  # beams differ
    padding = PADDING.repeat_interleave(beams, 0)
    expected, weights = slow(name, module, queries, memory, padding)
    module.set_beam_size(beams)
    state = {}
    for i in range(3):
        y, mean = module(
            queries[i : i + 1], memory, memory, key_padding_mask=padding, incremental_state=state, static_kv=True
        )
        torch.testing.assert_close(y, expected[i : i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean, weights.mean(0)[:, i : i + 1], rtol=1e-4, atol=1e-5)
        assert module._get_input_buffer(state)["prev_key"].shape[0] == 2
        memory = torch.full_like(memory, torch.nan)  # not looked at again


@pytest.mark.parametrize("name", ATTENTIONS)
def test_incremental_decoding_is_the_whole_sequence(name):
    """Token by token, sentences swapped in the middle, as beam search does."""
    module, x = attention(name, self_attention=True).eval(), torch.randn(KEYS, 2, WIDTH)
    expected, _ = slow(name, module, x, x, PADDING, CAUSAL)
    state, order = {}, torch.tensor([0, 1])
    for i in range(KEYS):
        if i == 4:
            order = torch.tensor([1, 0])
            module.reorder_incremental_state(state, order)
        now = x[i : i + 1, order]
        padding = PADDING[order, i : i + 1]
        y, _ = module(now, now, now, key_padding_mask=padding if padding.any() else None, incremental_state=state)
        torch.testing.assert_close(y, expected[i : i + 1, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_is_of_the_weights_and_of_training(need_weights):
    module, draws = attention("qknorm", self_attention=True, dropout=0.5), 2000
    one = torch.randn(KEYS, 1, WIDTH)
    expected, _ = slow("qknorm", module, one, one)
    x = one.expand(-1, draws, -1)
    y, _ = module.eval()(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(y, expected.expand_as(y), rtol=1e-4, atol=1e-5)
    y, _ = module.train()(x, x, x, need_weights=need_weights)  # on average the same
    assert (y.std(1) > 0.05).all()
    assert ((y.mean(1) - expected[:, 0]).abs() < 6 * y.std(1) / draws**0.5).all()


def test_dot_leaves_fairseqs_own():
    made = MultiheadAttention(WIDTH, HEADS, self_attention=True)
    change_attention(made, Options(attention="dot"), POSITIONS)
    assert type(made) is MultiheadAttention and not hasattr(made, "q_norm")
