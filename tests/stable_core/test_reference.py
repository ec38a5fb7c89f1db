"""The reference's own equations, against torch, the papers' numbers and what they are for; and nothing runs on it."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from stable_core.reference import deepnorm, dot_logits, power_iteration, qk_clip, spectral_norm, z_loss

ROOT = Path(__file__).parents[2]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_power_iteration_arrives_at_the_singular_vectors():
    W = normal(8, 5)
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    u, v = power_iteration(W, normal(5), 300)
    assert (u @ W @ v).item() == pytest.approx(sigma[0].item()) == spectral_norm(W).item()
    assert abs(u @ U[:, 0]).item() == pytest.approx(1)
    assert abs(v @ Vt[0]).item() == pytest.approx(1)


def test_deepnorm_is_torchs_layer_norm_of_the_scaled_sum():
    x, branch, norm = normal(2, 3, 16), normal(3, 16), nn.LayerNorm(16).double()
    torch.testing.assert_close(deepnorm(x, branch, 2.5), norm(2.5 * x + branch))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_after_qk_clip_the_same_tokens_have_no_logit_above_the_threshold(key_heads, alpha):
    x = normal(1, 1, 12, 10)
    W_q, W_k = torch.tensor([0.1, 1.0, 2.0, 5.0])[:, None, None] * normal(4, 6, 10), normal(key_heads, 6, 10)

    def largest(W_q, W_k):
        q, k = x @ W_q.mT, x @ W_k.repeat_interleave(4 // key_heads, 0).mT
        return dot_logits(q, k).amax((0, 2, 3))

    before = largest(W_q, W_k)
    t = before.sort().values[1:3].mean().item()  # two of four heads are above it
    after = largest(*(clipped := qk_clip(W_q, W_k, before, t, alpha)))
    assert after.max() <= t * (1 + 1e-12)
    if key_heads == 4:
        torch.testing.assert_close(after, before.clamp(max=t))
        ratio = (clipped[0] / W_q)[before > t][:, 0, 0]
        torch.testing.assert_close(ratio.log(), alpha * (t / before[before > t]).log())
    assert torch.equal(clipped[0][before <= t], W_q[before <= t])
    assert all((new.abs() <= old.abs()).all() for new, old in zip(clipped, (W_q, W_k), strict=True))


def test_z_loss():
    assert z_loss(torch.zeros(5, 1024)).item() == pytest.approx(1e-4 * 6.931472**2)  # log 1024
    logits = normal(7, 50).requires_grad_()
    log_Z = logits.logsumexp(-1)
    z_loss(logits, 0.3).backward()
    torch.testing.assert_close(logits.grad, 0.3 * 2 / 7 * log_Z.detach()[:, None] * logits.detach().softmax(-1))


def test_nothing_of_the_packages_imports_it():
    packages = ("stable_core", "stable_monitor", "plugins", "nanogpt_patch")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 60
    assert not [path for path in files if re.search(r"import.*\breference\b|\breference import", path.read_text())]
