"""Entropy and largest logit from one Triton kernel against float64; on the CPU in a process of its own, as test_kernels.py."""

import math

import pytest
import torch

from stable_core import attention_statistics
from stable_core.reference import attention_probabilities, entropy
from tests.stable_core.interpreter import DEVICE, here

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def statistics(*arguments, **settings):
    from stable_core.kernels_attention import entropy_and_largest_logit  # which imports triton

    return entropy_and_largest_logit(*arguments, **settings)


def some(queries, keys, size=24, heads=4, key_heads=2, dtype=torch.float32):
    """q as models make it, a view of (batch, queries, heads, head_dim), and k."""
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(2, queries, heads, size, generator=generator).transpose(1, 2)
    return q.to(DEVICE, dtype), torch.randn(2, key_heads, keys, size, generator=generator).to(DEVICE, dtype)


@here
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_against_the_whole_matrix_in_float64(scale, is_causal, dtype):
    for queries, keys, size in ((70, 130, 24), (130, 70, 3), (1, 1, 16)):
        q, k = some(queries, keys, size, dtype=dtype)
        found, largest = statistics(q, k, scale=scale, is_causal=is_causal)
        settings = {"scale": scale, "is_causal": is_causal}
        truth = entropy(attention_probabilities(q.cpu(), k.cpu(), **settings))
        # the logits are good to some 1e-6 of their size, and an entropy no better than its logits
        assert (found.cpu() - truth).abs().max() < 2e-6 + 2e-5 * scale
        largest_there = attention_statistics(q.double().float(), k.double().float(), **settings).max_logit
        assert torch.allclose(largest, largest_there, rtol=1e-5, atol=1e-5 * scale)


@here
def test_closed_forms():
    """Equal logits have the entropy log n, and log(i + 1) where query i sees the keys up to i; one large logit has 0."""
    q = torch.ones(1, 1, 100, 16, device=DEVICE)
    found, largest = statistics(q, q, scale=2.0)
    assert torch.allclose(found, torch.full_like(found, math.log(100))) and (largest == 32).all()
    found, largest = statistics(q, q, scale=2.0, is_causal=True)
    assert torch.allclose(found[0, 0], torch.arange(1.0, 101, device=DEVICE).log(), atol=1e-6)
    k = torch.zeros_like(q)
    k[0, 0, 77] = 1e4  # in the second block of keys
    found, largest = statistics(q, k, scale=1.0)
    assert (found == 0).all() and (largest == 16e4).all()


@here
def test_what_is_not_a_number_shows_in_its_own_row_alone():
    q, k = some(70, 70, heads=1, key_heads=1)
    q[0, 0, 3, 2] = torch.nan
    for x in statistics(q, k, scale=1.0):
        assert x[0, 0, 3].isnan() and x.isnan().sum() == 1


@here
def test_bitwise_the_same_twice():
    q, k = some(70, 130)
    assert all(map(torch.equal, statistics(q, k, scale=0.3), statistics(q, k, scale=0.3)))


@here
def test_what_it_refuses():
    q, k = some(5, 6)
    with pytest.raises(ValueError, match="key_heads divides heads"):
        statistics(q[:, :3], k, scale=1.0)
    with pytest.raises(ValueError, match="one type"):
        statistics(q, k.half(), scale=1.0)
