"""A plain checkpoint in a reparametrised model: the same outputs, and the moments with their weights."""

import copy

import pytest
import torch
from torch import nn

from stable_core import (
    SigmaReparamConfig,
    fold_state_dict,
    param_groups,
    sigma_layers,
    sigma_reparam,
    unfold_optimizer_state,
    unfold_state_dict,
)

SPECTRAL = SigmaReparamConfig(gamma_init="spectral")


def encoder(seed: int = 0) -> nn.TransformerEncoderLayer:
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def x(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("qkv", ["separate", "joint"])
def test_the_function_is_kept_and_folding_gives_the_weights_back(qkv):
    plain, model = encoder(), encoder(1)
    sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral", qkv=qkv))
    state = unfold_state_dict(model, plain.state_dict())
    model.load_state_dict(state)
    torch.testing.assert_close(model(x()), plain(x()))
    torch.testing.assert_close(dict(fold_state_dict(state)), dict(plain.state_dict()), check_device=False)


def test_projections_that_share_a_sigma():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    plain = Attention()
    model = sigma_reparam(Attention(), SigmaReparamConfig(gamma_init="spectral", qkv="qk_joint"))
    model.load_state_dict(unfold_state_dict(model, plain.state_dict()))
    for name in ("q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(getattr(model, name).weight, getattr(plain, name).weight)


def test_with_gamma_one_the_norm_is_one_and_the_log_says_that_the_function_changed(caplog):
    plain, model = encoder(), sigma_reparam(encoder(1), SigmaReparamConfig(gamma_init="one"))
    model.load_state_dict(unfold_state_dict(model, plain.state_dict()))
    assert torch.linalg.matrix_norm(model.linear1.weight, 2).item() == pytest.approx(1, rel=2e-3)
    assert "another function" in caplog.text


def adam(model: nn.Module, grouping: str) -> torch.optim.Optimizer:
    groups = {
        "one": lambda: model.parameters(),
        "ndim": lambda: [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        "gammas first": lambda: param_groups(model, 1e-2, 0.1),
    }
    return torch.optim.AdamW(groups[grouping](), lr=1e-2)


@pytest.mark.parametrize("grouping", ["one", "ndim", "gammas first"])
def test_moments_stay_with_their_weights(grouping):
    plain = encoder()
    before = adam(plain, grouping)
    for step in range(3):
        plain(x(step)).square().mean().backward()
        before.step()
        before.zero_grad()
    model = sigma_reparam(encoder(1), SPECTRAL)
    after = adam(model, grouping)
    model.load_state_dict(unfold_state_dict(model, plain.state_dict()))
    after.load_state_dict(unfold_optimizer_state(model, after, before.state_dict()))
    named = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        layer, _, tensor = name.rpartition(".")
        ours = named.get(name, named.get(f"{layer}.parametrizations.{tensor}.original"))
        for key, value in before.state[p].items():
            assert torch.equal(after.state[ours][key], value), (name, key)
    assert not any(sigma.gamma in after.state for _, sigma in sigma_layers(model))
    assert after.param_groups[-1]["lr"] == before.param_groups[-1]["lr"]


def test_what_does_not_fit_is_one_line():
    model = sigma_reparam(encoder(1), SPECTRAL)
    wide = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).state_dict()
    with pytest.raises(ValueError, match=r"linear1\.weight: the state dict has shape \(64, 16\), the model \(32, 16\)"):
        unfold_state_dict(model, wide)
    broken = copy.deepcopy(encoder().state_dict())
    broken["linear1.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"linear1\.weight: it holds NaN"):
        unfold_state_dict(model, broken)
    optimizer, other = adam(model, "one"), adam(encoder(), "ndim").state_dict()
    with pytest.raises(ValueError, match="other groups than the model's"):
        unfold_optimizer_state(model, optimizer, other)
