"""Entropy and largest logit from one Triton kernel against float64; on the CPU in a process of its own, as test_kernels.py."""

import math
import re
from functools import partial

import pytest
import torch

from stable_core import attention_statistics
from stable_core.reference import attention_probabilities, entropy
from tests.stable_core.interpreter import DEVICE, INTERPRETED, here

TYPES = (torch.float32, torch.bfloat16, torch.float16)


kernel = partial(attention_statistics, kernels="triton")


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
        settings = {"scale": scale, "is_causal": is_causal}
        found, largest, bound, seen = kernel(q, k, **settings)
        truth = entropy(attention_probabilities(q.cpu(), k.cpu(), **settings))
        # the logits are good to some 1e-6 of their size, and an entropy no better than its logits
        assert (found.cpu() - truth).abs().max() < 2e-6 + 2e-5 * scale
        there = attention_statistics(q.float(), k.float(), **settings, kernels="torch")
        assert torch.allclose(largest, there.max_logit, rtol=1e-5, atol=1e-5 * scale)
        assert torch.allclose(bound, there.bound, rtol=1e-4, atol=1e-6) and torch.equal(seen, there.keys)


@here
@pytest.mark.parametrize("kind", ["boolean", "additive", "finite"])
def test_masks_as_torch_has_them(kind):
    """Padding for a sample of its own, a mask for a head of its own, a row that sees nothing, -10000 that hides a key."""
    q, k = some(70, 130)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 1, 1, 130), (1, 4, 70, 130), (70, 130)):
        visible = torch.rand(shape, generator=generator) < 0.7
        if shape[-2] > 1:
            visible[..., 3, :] = False
        mask = visible
        if kind != "boolean":
            added = 3 * torch.randn(shape, generator=generator) if kind == "finite" else torch.zeros(shape)
            mask = added.masked_fill(~visible, -1e4 if kind == "finite" else -math.inf)
        for is_causal in (False, True):
            settings = {"scale": 0.5, "attn_mask": mask.to(DEVICE), "is_causal": is_causal}
            ours, theirs = kernel(q, k, **settings), attention_statistics(q, k, **settings, kernels="torch")
            assert torch.equal(ours.keys, theirs.keys)
            for a, b in zip(ours, theirs, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@here
def test_the_bound_of_logits_far_from_zero():
    """A constant added to all logits of a row changes neither its entropy nor the bound."""
    q, k = some(70, 130, heads=2)
    for added in (0.0, 300.0, -300.0):
        mask = torch.full((70, 130), added, device=DEVICE)
        ours = kernel(q, k, scale=0.1, attn_mask=mask)
        truth = attention_statistics(q.cpu(), k.cpu(), scale=0.1)
        assert torch.allclose(ours.bound.cpu(), truth.bound, rtol=1e-3, atol=1e-4)
        assert torch.allclose(ours.entropy.cpu(), truth.entropy, atol=1e-3)


@here
def test_a_later_block_hides_an_earlier_one():
    """Logits 10,000 below the largest count as hidden, whichever block of keys they are in."""
    q, k = torch.ones(2, 1, 1, 150, 16, device=DEVICE)
    k[:, :, :100] = -1000  # logits of -16,000, beside 16 of the last fifty
    seen = kernel(q, k, scale=1.0)
    assert (seen.keys == 50).all() and torch.allclose(seen.entropy, torch.full_like(seen.entropy, math.log(50)))


@here
def test_closed_forms():
    """Equal logits have the entropy log n, and log(i + 1) where query i sees the keys up to i; one large logit has 0."""
    q = torch.ones(1, 1, 100, 16, device=DEVICE)
    found, largest, *_ = kernel(q, q, scale=2.0)
    assert torch.allclose(found, torch.full_like(found, math.log(100))) and (largest == 32).all()
    found, largest, *_ = kernel(q, q, scale=2.0, is_causal=True)
    assert torch.allclose(found[0, 0], torch.arange(1.0, 101, device=DEVICE).log(), atol=1e-6)
    k = torch.zeros_like(q)
    k[0, 0, 77] = 1e4  # in the second block of keys
    found, largest, *_ = kernel(q, k, scale=1.0)
    assert (found == 0).all() and (largest == 16e4).all()


@here
def test_what_is_not_a_number_shows_in_its_own_row_alone():
    q, k = some(70, 70, heads=1, key_heads=1)
    q[0, 0, 3, 2] = torch.nan
    *found, seen = kernel(q, k, scale=1.0)
    assert all(x[0, 0, 3].isnan() and x.isnan().sum() == 1 for x in found) and (seen == 70).all()


@here
def test_nothing_to_see():
    """No queries at all, and no keys."""
    q, k = some(70, 70)
    assert kernel(q[:, :, :0], k, scale=1.0).entropy.shape == (2, 4, 0)
    blind = kernel(q, k[:, :, :0], scale=1.0)
    assert not blind.entropy.any() and not blind.keys.any() and (blind.max_logit == -math.inf).all()


@here
def test_bitwise_the_same_twice():
    q, k = some(70, 130)
    assert all(map(torch.equal, kernel(q, k, scale=0.3), kernel(q, k, scale=0.3)))


@here
def test_what_it_refuses():
    q, k = some(5, 6)
    for one, other, settings, why in (
        (q[:, :3], k, {}, "key_heads divides heads"),
        (q, k.half(), {}, "k in torch.float16"),
        (q.double(), k.double(), {}, "in torch.float64"),
        (q.expand(-1, -1, -1, 24).repeat(1, 1, 1, 20), k.repeat(1, 1, 1, 20), {}, "(2, 4, 5, 480)"),
        (q, k, {"rule": lambda logits, *where: logits}, "with a rule"),
    ):
        with pytest.raises(ValueError, match=re.escape(why)):
            kernel(one, other, scale=1.0, **settings)


def test_the_setting():
    q, k = torch.randn(2, 1, 2, 5, 8)
    with pytest.raises(ValueError, match="kernels = 'cuda': allowed are 'auto', 'torch', 'triton'"):
        attention_statistics(q, k, scale=1.0, kernels="cuda")
    if DEVICE.type == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match=r"kernels = 'triton': .*set it to 'auto'"):
            kernel(q, k, scale=1.0)
