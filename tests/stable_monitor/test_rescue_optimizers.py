"""Rescue with optimizers and schedulers of every shape: where gammas go, and what a resumed run makes of them."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR

from stable_core import sigma_layers
from stable_monitor import Rescue, prepare_to_resume, rescue

from .models import gpt, train
from .test_rescue import collapsed, forward_of


def adamw(model, *rates: float):
    """One group, or one for each block, all with weight decay."""
    if not rates:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    rest = [p for name, p in model.named_parameters() if not name.startswith("h.")]
    blocks = [{"params": list(block.parameters()), "lr": lr} for block, lr in zip(model.h, rates, strict=True)]
    return torch.optim.AdamW([{"params": rest, "lr": 1e-4}, *blocks])


def lrs_of_gammas(model, optimizer) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of each gamma."""
    names = {id(sigma.gamma): name for name, sigma in sigma_layers(model)}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"] if id(p) in names]
    assert len(found) == len(names)
    return {name: (group["lr"], group["weight_decay"]) for name, group in found}


def test_each_gamma_has_the_rate_of_its_own_weight():
    model = gpt()
    optimizer = adamw(model, 1e-3, 1e-2)
    rescue(model, optimizer, forward_of(model), layers=["h.0.attn", "h.1.attn"])
    assert lrs_of_gammas(model, optimizer) == {"h.0.attn.c_attn": (1e-3, 0.0), "h.1.attn.c_attn": (1e-2, 0.0)}


def lambdas(optimizer):
    return LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.9**step, lambda step: 0.5**step])


def cyclic(optimizer):
    return CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3)  # which moves beta1 too


@pytest.mark.parametrize(
    "schedule, rates", [(lambdas, (1e-2, 2e-2)), (cyclic, ()), (cyclic, (1e-2, 2e-2))], ids=["lambdas", "one", "three"]
)
def test_a_resumed_run_goes_on_bitwise_with_its_scheduler(schedule, rates):
    model = gpt()
    optimizer = adamw(model, *rates)
    scheduler = schedule(optimizer)
    rescue(model, optimizer, forward_of(model), layers=["h.1.attn"], scheduler=scheduler)
    for step in range(2):
        train(model, 1, optimizer=optimizer, first=step)
        scheduler.step()
    saved = copy.deepcopy([x.state_dict() for x in (model, optimizer, scheduler)])
    again = gpt(1)
    other = adamw(again, *rates)
    resumed = schedule(other)
    prepare_to_resume(again, other, saved[1], scheduler=resumed)
    for x, state in zip((again, other, resumed), saved, strict=True):
        x.load_state_dict(state)
    for step in range(2, 5):
        for m, o, s in ((model, optimizer, scheduler), (again, other, resumed)):
            train(m, 1, optimizer=o, first=step)
            s.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    own = lrs_of_gammas(model, optimizer)["h.1.attn.c_attn"][0]
    (weight,) = (g for g in optimizer.param_groups if any(p is model.h[1].mlp[0].weight for p in g["params"]))
    assert own == weight["lr"]


def test_an_optimizer_that_knows_names_keeps_them():
    model = gpt()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    rescue(model, optimizer, forward_of(model), layers=["h.1.attn"])
    train(model, 1, optimizer=optimizer)
    assert optimizer.param_groups[1]["param_names"] == ["h.1.attn.c_attn.gamma"]
    again = gpt(1)
    other = torch.optim.AdamW(again.named_parameters(), lr=1e-2)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    prepare_to_resume(again, other, saved[1])
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (again, other)):
        train(m, 2, optimizer=o, first=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_without_the_scheduler_gammas_decay_and_the_log_says_so(caplog):
    model = gpt()
    optimizer = adamw(model)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rescue(model, optimizer, forward_of(model), layers=["h.0.attn"])
    assert "gammas are in one with a weight decay of 0.01; give rescue, or Rescue, the scheduler" in caplog.text
    train(model, 1, optimizer=optimizer)
    scheduler.step()
    assert lrs_of_gammas(model, optimizer) == {"h.0.attn.c_attn": (5e-3, 0.01)} and len(optimizer.param_groups) == 1


@pytest.mark.parametrize("why", ["frozen", "not in the optimizer"])
def test_a_layer_that_cannot_be_rescued_does_not_hold_up_another(why, caplog):
    model, _ = collapsed(0, 1)
    parameters = set(model.parameters())
    if why == "frozen":
        model.h[0].requires_grad_(False)
    else:
        parameters -= set(model.h[0].attn.parameters())
    optimizer = torch.optim.AdamW(list(parameters))
    before = model.h[0].attn.c_attn.weight.clone()
    assert [done.layer for done in rescue(model, optimizer, forward_of(model))] == ["h.1.attn"]
    assert "not rescued: " in caplog.text and "h.0.attn" in caplog.text
    assert torch.equal(model.h[0].attn.c_attn.weight, before)
    with pytest.raises(ValueError, match=r"h\.0\.attn"):
        rescue(model, optimizer, forward_of(model), layers=["h.0.attn"], logit=1e9, fraction=0.0)


def test_a_forward_that_is_no_function_is_refused_when_the_rescue_is_made():
    model = gpt()
    with pytest.raises(ValueError, match=r"forward = .*: allowed are functions, such as lambda: model"):
        Rescue(model, adamw(model), forward_of(model)())
