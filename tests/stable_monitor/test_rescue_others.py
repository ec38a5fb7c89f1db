"""The layers that a rescue does not bound get σReparam beside it, and nothing that they compute or remember changes."""

import copy

import torch

from stable_core import sigma_layers
from stable_monitor import Alarm, Rescue, rescue
from stable_monitor.rescue_checkpoint import Opened, reparametrise_checkpoint

from .models import batch, gpt, train
from .test_rescue import collapsed, forward_of
from .test_rescue_optimizers import adamw, lrs_of_gammas

ATTENTION, OTHERS = ["h.1.attn.c_attn"], 8  # of nine layers


def test_what_the_others_compute_and_their_moments_stay():
    model, optimizer = collapsed(1)
    alone, own = copy.deepcopy((model, optimizer))
    rescue(alone, own, forward_of(alone))
    before = {p: (p.clone(), copy.deepcopy(optimizer.state[p])) for p in model.parameters()}
    inside = set(model.h[1].attn.c_attn.parameters())
    rescue(model, optimizer, forward_of(model), others=True)
    assert [name for name, _ in sigma_layers(alone)] == ATTENTION and len(dict(sigma_layers(model))) == OTHERS + 1
    torch.testing.assert_close(model.eval()(*batch(5))[0], alone.eval()(*batch(5))[0], rtol=1e-5, atol=1e-5)
    for parameter, (value, moments) in before.items():
        if parameter not in inside:
            assert torch.equal(parameter, value)
            assert all(torch.equal(optimizer.state[parameter][key], moments[key]) for key in moments)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))


def test_each_gamma_has_the_rate_of_its_weight_and_no_decay():
    model = gpt()
    optimizer = adamw(model, 1e-3, 1e-2)
    rescue(model, optimizer, forward_of(model), layers=["h.1.attn"], others=True)
    rates = {name: 1e-3 if name[2] == "0" else 1e-2 if name[2] == "1" else 1e-4 for name, _ in sigma_layers(model)}
    assert lrs_of_gammas(model, optimizer) == {name: (lr, 0.0) for name, lr in rates.items()}


def test_so_it_has_in_a_checkpoint():
    model = gpt()
    optimizer = adamw(model, 1e-3, 1e-2)
    names = reparametrise_checkpoint(Opened(model, optimizer, lambda path: None))
    found = lrs_of_gammas(model, optimizer)
    assert sorted(found) == sorted(names) and len(names) == OTHERS + 1
    assert found["h.0.mlp.0"] == (1e-3, 0.0) and found["h.1.mlp.0"] == (1e-2, 0.0) and found["lm_head"] == (1e-4, 0.0)


def test_frozen_layers_stay_plain_and_beside_muon_gammas_are_adamws():
    model = gpt()
    model.h[0].requires_grad_(False)
    matrices = [p for p in model.h[1].parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is W for W in matrices)]
    muon, other = torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-2)
    rescue(model, [muon, other], forward_of(model), layers=["h.1.attn"], others=True)
    names = [name for name, _ in sigma_layers(model)]
    assert "lm_head" in names and len(names) == 5 and not any(name.startswith("h.0") for name in names)
    assert {id(sigma.gamma) for _, sigma in sigma_layers(model)} <= {
        id(p) for g in other.param_groups for p in g["params"]
    }


def test_a_layer_that_cannot_have_it_does_not_hold_up_the_rescue(caplog):
    model, optimizer = collapsed(1)
    with torch.no_grad():
        model.h[0].mlp[2].weight.zero_()  # its sigma is 0
    (done,) = rescue(model, optimizer, forward_of(model), others=True)
    assert done.layer == "h.1.attn" and [name for name, _ in sigma_layers(model)] == ATTENTION
    assert "the other layers stay as they are: h.0.mlp.2" in caplog.text


def test_the_switch_has_it_where_it_is_asked_for():
    for settings, count in (({"others": True}, OTHERS + 1), ({}, 1)):
        model, optimizer = collapsed(1)
        Rescue(model, optimizer, forward_of(model), **settings)(Alarm(3, "h.1.attn", 0.0, 0.1, 2.0, 0.0))
        assert len(list(sigma_layers(model))) == count
        gammas = [(sigma.gamma, sigma.gamma.clone()) for _, sigma in sigma_layers(model)]
        train(model, 1, optimizer=optimizer)
        assert not any(torch.equal(gamma, before) for gamma, before in gammas)
