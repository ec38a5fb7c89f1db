"""A small model with σReparam, its state, and a training loop, for the tests beside this file."""

import gc

import pytest
import torch
import transformers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from stable_core import SigmaReparamConfig, sigma_reparam
from stable_core.sigma_reparam import SigmaReparam


def reparametrised(model: nn.Module) -> list[SigmaReparam]:
    return [module for module in model.modules() if isinstance(module, SigmaReparam)]


def state(model: nn.Module) -> list[torch.Tensor]:
    return [layer.u.clone() for layer in reparametrised(model)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def mlp(seed: int = 0, **config) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(90, 130), nn.GELU(), nn.Linear(130, 70))
    return sigma_reparam(model, SigmaReparamConfig(**config))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 90, generator=generator)
        loss = (model(x) - x[:, :70].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def count_advances(monkeypatch) -> list:
    """One entry for each weight, each time that it is advanced."""
    calls, iterates = [], SigmaReparam.iterates
    monkeypatch.setattr(SigmaReparam, "iterates", lambda self: (calls.append(self), iterates(self))[1])
    return calls


def alive_after_forward(model: nn.Module, x: torch.Tensor) -> int:
    """How many of the W_hats that a forward pass made are alive while its graph is."""
    made, scaled = [], SigmaReparam._scaled

    def spy(self, *args):
        W_hat = scaled(self, *args)
        made.append(StorageWeakRef(W_hat.untyped_storage()))
        return W_hat

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SigmaReparam, "_scaled", spy)
        y = model(x)
        gc.collect()
        assert y.requires_grad
        return sum(not W_hat.expired() for W_hat in made)


def fused(kind: type) -> type:
    """A class of transformers' models; a skip where the installed release computes its attention without SDPA."""
    if not kind._supports_sdpa:
        pytest.skip(f"{kind.__name__} of transformers {transformers.__version__} has no fused attention; newer ones do")
    return kind
