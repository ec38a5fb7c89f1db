"""The papers' inequalities, on what attains them and on what does not."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F

from stable_core import (
    adam_update_norm_bound,
    attention_entropy,
    entropy_lower_bound,
    qk_norm_logit_bound,
    stable_attention_logit_bound,
)


@pytest.mark.parametrize("T", [2, 5, 64])
@pytest.mark.parametrize("sigma", [0.5, 3.0, 12.0])
def test_entropy_bound_is_attained(T, sigma):
    # X = I, W_K = e_1 and W_Q = u make the first row of the logits u, with |W_K W_Q^T|_2 = |u| = sigma and |X X^T|_2 = 1.
    u = torch.full((T,), -1 / math.sqrt(T * (T - 1)), dtype=torch.float64)
    u[0] = math.sqrt(1 - 1 / T)
    u *= sigma
    X, W_K, W_Q = torch.eye(T, dtype=torch.float64), torch.eye(T, dtype=torch.float64)[:, :1], u[:, None]
    product = torch.linalg.matrix_norm(W_K @ W_Q.T, 2) * torch.linalg.matrix_norm(X @ X.T, 2)
    first_row = attention_entropy((X @ W_K)[None, None], (X @ W_Q)[None, None], scale=1.0)[0, 0, 0]
    assert first_row.item() == pytest.approx(entropy_lower_bound(product.item(), T), abs=1e-5)


def test_no_minimum_is_below_the_entropy_bound():
    T, sigma = 6, 2.5

    def entropy(u):
        u = sigma * u / np.linalg.norm(u)
        return scipy.stats.entropy(np.exp(u - u.max()))

    starts = np.random.default_rng(0).normal(size=(30, T))
    least = min(scipy.optimize.minimize(entropy, start).fun for start in starts)
    assert least == pytest.approx(entropy_lower_bound(sigma, T), rel=1e-5)


def test_entropy_bound_at_its_ends_and_of_tensors():
    assert entropy_lower_bound(0.0, 8) == pytest.approx(math.log(8))
    assert entropy_lower_bound(1e6, 8) == 0.0
    assert entropy_lower_bound(3.0, 1) == 0.0
    got = entropy_lower_bound(torch.tensor([1.0, 4.0]), torch.tensor([[3], [9]]))
    expected = [[entropy_lower_bound(s, T) for s in (1.0, 4.0)] for T in (3, 9)]
    assert torch.allclose(got, torch.tensor(expected))
    with pytest.raises(ValueError, match=r"sigma = -1.0, T = 4: allowed are numbers from 0"):
        entropy_lower_bound(-1.0, 4)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_adam_update_is_at_least_as_large_as_the_proposition_says(noise):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(48, 32, generator=generator)
    deviation = noise * torch.rand(48, 32, generator=generator)
    W = torch.zeros(48, 32, requires_grad=True)
    optimizer = torch.optim.Adam([W], lr=1.0, betas=(0.998, 0.998), eps=0.0)
    for _ in range(4000):
        before = W.detach().clone()
        W.grad = mean + deviation * torch.randn(48, 32, generator=generator)
        optimizer.step()
    update = torch.linalg.matrix_norm(before - W.detach(), 2).item()
    assert update >= 0.98 * adam_update_norm_bound(mean, deviation.square())


def test_adam_update_bound_is_attained_without_noise_by_orthogonal_signs():
    signs = torch.tensor([[1.0]])
    for _ in range(4):  # Hadamard's matrix of size 16
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    assert adam_update_norm_bound(7 * signs, torch.zeros(16, 16)) == pytest.approx(
        torch.linalg.matrix_norm(signs, 2).item()
    )
    assert adam_update_norm_bound(torch.zeros(3, 3), torch.zeros(3, 3)) == 0.0
    with pytest.raises(ValueError, match="two matrices of one shape"):
        adam_update_norm_bound(torch.zeros(3), torch.zeros(3))


def test_logit_bounds_hold_and_are_attained():
    generator = torch.Generator().manual_seed(0)
    d, tau, alpha = 16, 9.0, 0.25
    q, k = 50 * torch.randn(2, 200, d, generator=generator)
    gamma_q, gamma_k = torch.randn(2, d, generator=generator)
    logits = F.rms_norm(q, (d,), gamma_q) @ F.rms_norm(k, (d,), gamma_k).T / math.sqrt(d)
    assert 0.1 < logits.abs().max() / qk_norm_logit_bound(d, gamma_q, gamma_k) <= 1
    one = F.rms_norm(q, (d,))
    assert (one @ one.T / math.sqrt(d)).max().item() == pytest.approx(qk_norm_logit_bound(d), rel=1e-5)
    assert qk_norm_logit_bound(d) == 4.0

    def stable_norm(x, gamma):  # [ST, eq. 2]
        return gamma * d**alpha * x / x.square().sum(-1, keepdim=True).sqrt()

    logits = tau * stable_norm(q, gamma_q) @ stable_norm(k, gamma_k).T / d ** (2 * alpha)
    assert 0.1 < logits.abs().max() / stable_attention_logit_bound(tau, gamma_q, gamma_k) <= 1
    along = (tau * stable_norm(q, 1.0) @ stable_norm(q, 1.0).T / d ** (2 * alpha)).max().item()
    assert along == pytest.approx(stable_attention_logit_bound(tau), rel=1e-5)
