"""Averages of weights: in evaluation each has the sigma of its own weights, and training goes on as if nothing had been."""

import copy
import itertools

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from stable_core import SigmaReparamConfig, converge, fold, param_groups, sigma_reparam


def build(qkv: str = "separate") -> nn.Module:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(80, 80) for _ in range(4))

        def forward(self, x):
            return x + self.out_proj(
                F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), scale=0.1)
            )

    model = nn.Sequential(Attention(), nn.LayerNorm(80), nn.Linear(80, 10))
    return sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral", qkv=qkv))


def exact(model: nn.Module) -> nn.Module:
    return converge(copy.deepcopy(model))


def train(model: nn.Module, updates: int, each=lambda: None) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    optimizer, losses = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1)), []
    for _ in range(updates):
        x, y = torch.randn(4, 9, 80, generator=generator), torch.randint(0, 10, (36,), generator=generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        each()
    return losses


AVERAGES = {
    "EMA with buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True),
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99)),
    "SWA": lambda model: AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn(), use_buffers=True),
    "timm V2": lambda model: ModelEmaV2(model, decay=0.99),
    "timm V3": lambda model: ModelEmaV3(model, decay=0.99, use_warmup=True),
}


@pytest.mark.parametrize("qkv", ["separate", "joint"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_is_evaluated_with_its_own_sigma(kind, qkv):
    model = build(qkv)
    average = AVERAGES[kind](model)
    average.eval()
    x = torch.randn(2, 9, 80)

    def each():
        average.update_parameters(model) if isinstance(average, AveragedModel) else average.update(model)

    for _ in range(3):  # evaluated now and then, without another call of eval
        train(model, 20, each)
        with torch.no_grad():
            inner = average if isinstance(average, AveragedModel) else average.module
            torch.testing.assert_close(inner(x), exact(inner)(x), rtol=1e-3, atol=1e-3)
    folded = fold(copy.deepcopy(inner.train()))
    torch.testing.assert_close(folded(x), exact(inner)(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hidden", [False, True], ids=["copy_", "data"])
@pytest.mark.parametrize("order", ["eval first", "swap first"])
def test_weights_swapped_for_their_average_in_validation_leave_training_as_it_was(hidden, order):
    model = build()
    average = AVERAGES["EMA with buffers"](model)

    def swap():
        ours, theirs = ((*m.parameters(), *m.buffers()) for m in (model, average.module))
        for a, b in zip(ours, theirs, strict=True):
            a, b = (a.data, b.data) if hidden else (a.detach(), b.detach())
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

    x = torch.randn(2, 9, 80)
    train(model, 30, lambda: average.update_parameters(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for action in (model.eval, swap) if order == "eval first" else (swap, model.eval):
        action()
    with torch.no_grad():
        torch.testing.assert_close(model(x), exact(model)(x), rtol=1e-3, atol=1e-3)
    swap()
    model.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if order == "eval first":  # else the weights were others before anybody could know them
        untouched = build()
        untouched.load_state_dict(before)
        assert torch.equal(model(x), untouched(x))


def test_evaluation_of_the_model_itself_is_bitwise_the_trained_function():
    """Where sigma lags behind at a high rate, it lags in evaluation too, as gradients were of that function."""
    model, x = build(), torch.randn(2, 9, 80)
    train(model, 10)
    assert torch.equal(model(x), model.eval()(x))


def test_validation_between_does_not_move_the_losses():
    straight, validated = build(), build()
    average = AVERAGES["EMA with buffers"](validated)
    count = itertools.count()

    def each():
        average.update_parameters(validated)
        if next(count) % 5 == 0:
            with torch.no_grad():
                validated.eval()(torch.ones(1, 3, 80))
                average.eval()(torch.ones(1, 3, 80))
                validated.train()

    assert train(straight, 25) == train(validated, 25, each)
