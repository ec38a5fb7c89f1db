"""W_hat made again in the backward pass: the same gradients, and nothing of it is left in between."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from stable_core import SigmaReparamConfig, recompute, sigma_reparam
from tests.stable_core.models import alive_after_forward, train

D = 70


class Model(nn.Module):
    """Every way in which a weight reaches its operation: layers, packed and separate projections, a convolution, Conv1D."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.conv = nn.Conv1d(D, D, 3, padding=1)
        self.fc = nn.Linear(D, D)
        self.checkpointed = nn.Linear(D, D)

    def forward(self, x):
        x = nn.functional.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        x = self.attention(x, x, x)[0]
        x = self.conv(x.mT).mT
        x = nn.functional.linear(self.fc(x).relu(), self.fc.weight.T)  # a weight used twice
        return checkpoint(self.checkpointed, x, use_reentrant=False)


def build(qkv: str = "separate") -> nn.Module:
    torch.manual_seed(0)
    return sigma_reparam(Model(), SigmaReparamConfig(qkv=qkv))


@pytest.mark.parametrize("qkv", ["separate", "joint"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradients_are_bit_for_bit_the_same(qkv, autocast):
    kept = build(qkv)
    again = recompute(copy.deepcopy(kept))
    x = torch.randn(2, 5, D)
    for model in (kept, again):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(x).float().square().mean()
        loss.backward()
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert a.grad.abs().max() > 0
        assert torch.equal(a.grad, b.grad), name


def test_no_weight_is_kept():
    x = torch.randn(2, 5, D, requires_grad=True)  # else the first layers need no weight
    assert alive_after_forward(build(), x) == 8, "all but the checkpointed one, fc's twice"
    assert alive_after_forward(recompute(build()), x) == 0


def test_second_derivatives_are_the_same():
    kept = build()
    again = recompute(copy.deepcopy(kept))
    x, products = torch.randn(2, 5, D), []
    for model in (kept, again):
        W = model.q_proj.parametrizations.weight.original
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused one has no second derivative
            (gradient,) = torch.autograd.grad(model(x).square().mean(), W, create_graph=True)
        products.append(torch.autograd.grad(gradient.square().sum(), W)[0])
    assert products[0].abs().max() > 0
    torch.testing.assert_close(*products)


def test_training_is_the_same_and_a_failed_forward_pass_leaves_nothing_behind():
    layers = nn.Sequential(nn.Linear(90, 80), nn.ReLU(), nn.Linear(80, 70))
    sigma_reparam(layers)
    again = recompute(copy.deepcopy(layers))
    with pytest.raises(RuntimeError, match="shape"):
        again(torch.randn(3, 5))
    x = torch.randn(3, requires_grad=True)
    y = x.square()
    assert y.grad_fn._raw_saved_self is not None
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * x)
    losses = [train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 5) for model in (layers, again)]
    assert losses[0] == losses[1]


def test_twice_is_refused():
    with pytest.raises(ValueError, match="recomputed already"):
        recompute(recompute(build()))
