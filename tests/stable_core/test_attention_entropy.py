"""Attention entropy against the dense formula in float64, and scipy's."""

import subprocess
import sys

import pytest
import scipy.stats
import torch

from stable_core import attention_entropy, attention_statistics
from stable_core.reference import attention_probabilities, entropy, entropy_bound

SCALE = 0.25


def qk(amplitude=1.0, queries=57, keys=91, heads=4, key_heads=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q = amplitude * torch.randn(2, heads, queries, 16, generator=generator)
    return q.to(dtype), torch.randn(2, key_heads, keys, 16, generator=generator).to(dtype)


def masks(queries=57, keys=91) -> dict:
    """Masks as people write them: padding, one matrix for all, one for each head, with rows that see nothing."""
    generator = torch.Generator().manual_seed(1)
    padding = torch.arange(keys) < torch.tensor([keys - 20, 5])[:, None]
    blind = torch.rand(2, 4, queries, keys, generator=generator) < 0.5
    blind[0, :, 3] = False
    blind[1, 2] = False
    added = torch.zeros(blind.shape)
    return {
        "none": None,
        "padding": padding[:, None, None],
        "matrix": blind[0, 0],
        "each head": blind,
        "-inf": added.masked_fill(~blind, -torch.inf),
        "finfo.min": torch.zeros(2, 1, 1, keys).masked_fill(~padding[:, None, None], torch.finfo(torch.float32).min),
        "bias": torch.randn(4, queries, keys, generator=generator),
        "bias and -inf": torch.randn(blind.shape, generator=generator).masked_fill(~blind, -torch.inf),
    }


@pytest.mark.parametrize("amplitude", [0.0, 1.0, 10.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", masks())
def test_equals_the_dense_formula_from_uniform_to_one_hot(amplitude, is_causal, mask):
    q, k = qk(amplitude)
    given = {"scale": SCALE, "attn_mask": masks()[mask], "is_causal": is_causal}
    probabilities = attention_probabilities(q, k, **given)
    expected = entropy(probabilities)
    assert (attention_entropy(q, k, **given) - expected).abs().max() < 2e-4
    rows = attention_statistics(q, k, **given)
    assert (rows.entropy - expected).abs().max() < 2e-4
    assert (rows.entropy - rows.bound).min() > -1e-6
    if mask != "finfo.min":  # the dense softmax cannot tell its hidden keys from those that underflow
        seen = (probabilities > 0).sum(-1)
        assert (rows.keys >= seen).all()
        assert amplitude > 10 or torch.equal(rows.keys, seen)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (130, 7), (300, 300)])
def test_shapes_and_grouped_heads(key_heads, shape):
    q, k = qk(3.0, *shape, key_heads=key_heads)
    expected = entropy(attention_probabilities(q, k, scale=SCALE, is_causal=True))
    got = attention_entropy(q, k, scale=SCALE, is_causal=True)
    assert got.shape == (2, 4, shape[0])
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    q, k = qk(10.0, dtype=dtype)
    expected = entropy(attention_probabilities(q, k, scale=SCALE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got in (attention_entropy(q, k, scale=SCALE), attention_statistics(q, k, scale=SCALE).entropy):
            assert got.dtype == torch.float32
            assert (got - expected).abs().max() < 1e-4


def test_against_scipy():
    q, k = qk(2.0, queries=5, keys=9)
    probabilities = torch.softmax(0.5 * q @ k.mT, dim=-1)
    expected = scipy.stats.entropy(probabilities.numpy(), axis=-1)
    assert attention_entropy(q, k, scale=0.5).numpy() == pytest.approx(expected, abs=1e-5)


def test_arguments_by_name_in_any_order():
    q, k = qk()
    assert torch.equal(attention_entropy(scale=SCALE, k=k, q=q), attention_entropy(q, k, scale=SCALE))


def test_largest_logit():
    q, k = qk(2.0)
    mask = masks()["each head"]
    logits = (SCALE * q.double() @ k.double().mT).masked_fill(~mask, -torch.inf)
    assert torch.allclose(attention_statistics(q, k, scale=SCALE, attn_mask=mask).max_logit.double(), logits.amax(-1))


def test_a_rule_is_applied_to_every_part_of_the_logits(monkeypatch):
    """That of a soft cap, a bias by batch and head, and a window, formed a few rows at a time."""
    monkeypatch.setattr(sys.modules[attention_statistics.__module__], "CHUNK_ON_CPU", 300)
    q, k = qk(3.0, key_heads=2)
    by_head = torch.randn(2, 4)

    def rule(logits, batch, head, query, key):
        logits = 5 * torch.tanh(logits / 5) + by_head[batch, head] * key
        return logits.masked_fill((key - query).abs() > 7, -torch.inf)

    logits = 5 * torch.tanh(SCALE * q.double() @ k.double().repeat_interleave(2, 1).mT / 5)
    logits = logits + by_head[:, :, None, None] * torch.arange(91.0)
    near = torch.tensor([[abs(i - j) <= 7 for j in range(91)] for i in range(57)])
    logits = logits.masked_fill(~near, -torch.inf)
    rows = attention_statistics(q, k, scale=SCALE, rule=rule)
    assert (rows.entropy - entropy(logits.softmax(-1))).abs().max() < 2e-4
    assert torch.allclose(rows.max_logit.double(), logits.amax(-1), rtol=1e-4, atol=1e-5)  # some are near 0
    assert torch.equal(rows.keys, near.sum(-1).float().expand(2, 4, -1))


@pytest.mark.parametrize("mask", ["none", "padding", "each head", "bias"])
def test_bound_is_that_of_the_theorem_for_each_row(mask):
    q, k = qk(1.0, queries=6, keys=9)
    mask = masks(6, 9)[mask]
    logits = SCALE * q @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    expected = [entropy_bound(row) for row in logits.flatten(0, 2)]
    got = attention_statistics(q, k, scale=SCALE, attn_mask=mask).bound.flatten()
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) > 0.5


def test_a_row_that_attains_its_bound():
    sharp = torch.zeros(1, 1, 1, 8)
    sharp[..., 0] = 5.0  # one large logit, the others equal
    rows = attention_statistics(torch.ones(1, 1, 1, 1), sharp.mT, scale=1.0)
    assert rows.entropy.item() == pytest.approx(rows.bound.item(), rel=1e-4)
    assert rows.bound.item() > 0.1


@pytest.mark.parametrize("largest", [0.01, 500.0], ids=["fused", "chunks"])
def test_memory_at_10000_tokens_does_not_hold_the_matrix(largest):
    # In a process of its own: the matrix of one head would be 381 MiB in fp32.
    script = f"""
import resource, torch
from stable_core import attention_entropy, attention_statistics
q, k = {largest} * torch.randn(2, 1, 1, 10000, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention_entropy(q, k, scale=1.0, is_causal=True)
attention_statistics(q, k, scale=1.0, is_causal=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    mib = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(mib) < 128


@pytest.mark.parametrize(
    ("q", "k", "mask", "message"),
    [
        ((2, 4, 5, 8), (2, 4, 5, 9), None, r"q \(2, 4, 5, 8\), k \(2, 4, 5, 9\): allowed are"),
        ((2, 4, 5, 8), (2, 3, 5, 8), None, "key_heads divides heads"),
        ((4, 5, 8), (4, 5, 8), None, "allowed are"),
        ((2, 4, 5, 8), (2, 4, 6, 8), (5, 5), r"attn_mask \(5, 5\): it must be broadcastable to \(2, 4, 5, 6\)"),
    ],
)
def test_shapes_that_do_not_fit(q, k, mask, message):
    with pytest.raises(ValueError, match=message):
        attention_entropy(
            torch.zeros(q), torch.zeros(k), scale=1.0, attn_mask=None if mask is None else torch.zeros(mask)
        )
