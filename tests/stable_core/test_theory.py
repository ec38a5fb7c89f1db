"""The papers' inequalities, on what attains them and on what does not."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from stable_core import (
    adam_update_norm_bound,
    attention_entropy,
    entropy_lower_bound,
    qk_norm_logit_bound,
    stable_attention_logit_bound,
)
from stable_core.attentions import QueryKey


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


def test_the_derivatives_of_qk_norm_are_the_papers():
    """[ST, App. D] against central differences. Its root d is that of the head, d1, as in Section 3.3; three slips of its
    last line, the derivative by W_k, are mended: the middle factor is of W_k x_j throughout, gammas are of k and of q, and
    the vector after them is the normalised query."""
    generator = torch.Generator().manual_seed(0)
    d, d1, eps = 10, 6, 1e-5
    W_q, W_k = torch.randn(2, d1, d, generator=generator, dtype=torch.float64)
    x_i, x_j = torch.randn(2, d, generator=generator, dtype=torch.float64)
    kernel = QueryKey(*(nn.RMSNorm(d1, eps / d1).double() for _ in range(2)))  # torch's eps is of a mean
    for norm in (kernel.q_norm, kernel.k_norm):
        norm.weight.data = torch.randn(d1, generator=generator, dtype=torch.float64)
    gammas = torch.diag(kernel.q_norm.weight.data * kernel.k_norm.weight.data)

    @torch.no_grad()
    def logit(x_i, x_j, W_q, W_k):
        return kernel.q_norm(W_q @ x_i) @ kernel.k_norm(W_k @ x_j) / math.sqrt(d1)

    def by_differences(which: int) -> torch.Tensor:
        given, step = [x_i, x_j, W_q, W_k], 1e-6
        found = torch.empty_like(given[which])
        for at in np.ndindex(*found.shape):
            ends = []
            for sign in (1, -1):
                moved = given[which].clone()
                moved[at] += sign * step
                ends.append(logit(*given[:which], moved, *given[which + 1 :]))
            found[at] = (ends[0] - ends[1]) / (2 * step)
        return found

    def length(z):
        return (z.square().sum() + eps).sqrt()

    def across(z):
        return torch.eye(d1) - torch.outer(z, z) / length(z).square()

    q, k = W_q @ x_i, W_k @ x_j
    of_q = math.sqrt(d1) / length(q) * across(q) @ gammas @ k / length(k)
    of_k = math.sqrt(d1) / length(k) * across(k) @ gammas @ q / length(q)
    expected = (W_q.T @ of_q, W_k.T @ of_k, torch.outer(of_q, x_i), torch.outer(of_k, x_j))
    for which, derivative in enumerate(expected):
        torch.testing.assert_close(by_differences(which), derivative, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_the_derivatives_of_qk_norm_are_bounded(size):
    """With gamma = 1 by sqrt(d1) |W_q| / sqrt(eps) for x_i [ST, Section 3.3.1], where a dot product's grow with the weights.
    For W_q the paper says sqrt(d1) / sqrt(eps) [ST, App. D], which takes an x_i of length 1: it is that times |x_i|."""
    generator = torch.Generator().manual_seed(0)
    d1, eps = 6, 1e-5
    norm = nn.RMSNorm(d1, eps / d1).double()
    shares = []
    for _ in range(50):
        W_q, W_k = (size * torch.randn(2, d1, 10, generator=generator, dtype=torch.float64)).unbind()
        x_i, x_j = torch.randn(2, 10, generator=generator, dtype=torch.float64).unbind()
        W_q.requires_grad_()
        x_i.requires_grad_()
        logit = norm(W_q @ x_i) @ norm(1e4 * W_k @ x_j) / math.sqrt(d1)
        by_x, by_W = torch.autograd.grad(logit, (x_i, W_q))
        bound = math.sqrt(d1 / eps)
        of_x = by_x.norm() / (bound * torch.linalg.matrix_norm(W_q, 2))
        of_W = torch.linalg.matrix_norm(by_W, 2) / (bound * x_i.norm())
        shares.append((of_x.item(), of_W.item(), (torch.linalg.matrix_norm(by_W, 2) / bound).item()))
    of_x, of_W, without_x = (max(share) for share in zip(*shares, strict=True))
    assert max(of_x, of_W) <= 1
    if size == 1e-4:  # the root is of eps almost alone
        assert of_W > 0.9 and without_x > 2
