"""When u and v move: once per change of the weights, whatever else happens around them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stable_core import SigmaReparamConfig, converge, sigma_reparam
from stable_core.reference import Algorithm1
from tests.stable_core.models import count_advances, equal, mlp, reparametrised, state, train


def test_one_advance_per_optimizer_step_whatever_the_accumulation():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slow = [
        Algorithm1(kept.original, kept[0].gamma, kept[0].u.clone())
        for kept in (model[i].parametrizations.weight for i in (0, 2))
    ]
    for _ in range(3):
        optimizer.zero_grad()
        before = state(model)
        for _ in range(4):
            model(torch.randn(8, 90)).square().mean().backward()
        assert equal(state(model), before)
        optimizer.step()
        for reference, layer in zip(slow, reparametrised(model), strict=True):
            reference.step()
            torch.testing.assert_close(layer.u, reference.u)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_model_that_is_run_in_a_closure_of_the_step_is_that_of_the_plain_loop(kind):
    """As Lightning runs it."""
    plain, inside = mlp(), mlp()
    optimizers = [kind(model.parameters(), lr=0.1) for model in (plain, inside)]
    for step in range(3):
        x = torch.randn(8, 90, generator=torch.Generator().manual_seed(step))

        def loss(model, optimizer, x=x):
            optimizer.zero_grad()
            found = model(x).square().mean()
            found.backward()
            return found

        loss(plain, optimizers[0])
        optimizers[0].step()
        optimizers[1].step(closure=lambda loss=loss: loss(inside, optimizers[1]))
        assert equal(state(plain), state(inside))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, parts = mlp(), mlp()
    x = torch.randn(32, 90)
    whole(x).square().sum().backward()
    for part in x.split(8):
        parts(part).square().sum().backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_step_with_a_learning_rate_of_zero_leaves_the_state_alone(lr):
    """torch takes one to fill a new optimizer's state before it loads or saves it, after the model may have been loaded."""
    model = mlp()
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    train(model, optimizer, 2)
    assert equal(state(model), before)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 + lr
    train(model, optimizer, 1)
    assert not equal(state(model), before)


@pytest.mark.parametrize("qkv", ["separate", "qk_joint", "joint"])
def test_a_sigma_that_several_weights_share_rests_where_all_of_them_do(qkv):
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q_proj", "k_proj", "v_proj")})
    sigma_reparam(model, SigmaReparamConfig(qkv=qkv))
    by_layer = [{"params": list(layer.parameters())} for layer in model.values()]
    optimizer = torch.optim.SGD(by_layer, lr=0.1)

    def step(*rates: float) -> bool:
        """Whether a u moved."""
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        before = [layer.u.clone() for layer in reparametrised(model)]
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return not all(torch.equal(layer.u, u) for layer, u in zip(reparametrised(model), before, strict=True))

    assert step(0.1, 0.1, 0.1)  # one iteration behind the top singular vectors: another would move u
    assert not step(0, 0, 0)
    assert step(0, 0.1, 0)


def test_evaluation_and_checkpointing_leave_the_state_alone():
    model = mlp()
    before = state(model)
    x = torch.randn(8, 90, requires_grad=True)
    gradients = []
    for use_reentrant in (None, False, True):
        model.zero_grad()
        y = model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant)
        y.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.eval()(x)
    assert equal(state(model), before)
    assert equal(gradients[0], gradients[1])
    assert equal(gradients[0], gradients[2])


def test_frozen_weights_and_other_models_are_not_advanced():
    model, other = mlp(), mlp(1)
    model[0].parametrizations.weight.original.requires_grad_(False)
    frozen, others = state(model[0]), state(other)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert equal(state(model[0]), frozen)
    assert equal(state(other), others)


def test_an_optimizer_that_writes_to_data_advances_too():
    """fairseq's Adam updates `p.data`, which no version counter shows."""

    class DataSGD(torch.optim.Optimizer):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)

    model, twin = mlp(), mlp()
    losses = train(model, DataSGD(model.parameters(), {}), 4)
    assert losses == pytest.approx(train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 4), rel=1e-6)
    assert equal(state(model), state(twin))


def test_a_deep_copy_trains_by_itself():
    model = mlp()
    twin = copy.deepcopy(model)
    before = state(model)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    train(twin, optimizer, 3)
    assert equal(state(model), before)
    assert train(model, torch.optim.Adam(model.parameters(), lr=1e-2), 3)
    assert equal(state(model), state(twin))


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped():
    straight = mlp()
    optimizer = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    train(straight, optimizer, 5)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    tail = train(straight, optimizer, 5, seed=2)

    resumed = mlp(seed=9)
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    resumed.eval()(torch.randn(2, 90))  # a validation in between
    resumed.train()
    assert train(resumed, resumed_optimizer, 5, seed=2) == tail
    assert all(
        torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("qkv", ["separate", "joint"])
def test_an_average_of_checkpoints_has_the_sigma_of_the_averaged_weight(qkv):
    def attention(seed):
        torch.manual_seed(seed)
        layers = nn.ModuleDict({name: nn.Linear(80, 80) for name in ("k_proj", "v_proj", "q_proj", "out_proj")})
        return sigma_reparam(layers, SigmaReparamConfig(gamma_init="one", qkv=qkv))

    a, b = attention(1).state_dict(), attention(2).state_dict()
    average = attention(3)
    average.load_state_dict({key: (a[key] + b[key]) / 2 for key in a})
    names = ("q_proj", "k_proj", "v_proj")
    blocks = (
        [average[n].weight for n in names] if qkv == "separate" else [torch.cat([average[n].weight for n in names])]
    )
    for block in blocks:
        assert torch.linalg.svdvals(block.detach())[0] == pytest.approx(1, rel=1e-3)


def test_an_optimizer_around_another_advances_once(monkeypatch):
    class Around(torch.optim.Optimizer):
        """As SAM, Lookahead and ZeroRedundancyOptimizer are built."""

        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(0.99)

    model = mlp()
    calls = count_advances(monkeypatch)
    train(model, Around(torch.optim.SGD(model.parameters(), lr=0.1)), 3)
    assert len(calls) == 3 * 2


def test_a_step_that_fails_does_not_stop_the_next_from_advancing(monkeypatch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(broken)
    calls = count_advances(monkeypatch)
    train(model, optimizer, 2)
    assert len(calls) == 2 * 2


def test_an_average_of_the_weights_converges():
    """An exponential moving average of weights and state, as timm's ModelEmaV3 keeps, has its own sigma after converge."""
    model = mlp()
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for seed in range(20):
        train(model, optimizer, 5, seed=seed)
        with torch.no_grad():
            for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mean.lerp_(new, 0.1)
    converge(average)
    for layer, kept in zip(reparametrised(average), (average[0], average[2]), strict=True):
        assert torch.linalg.svdvals(kept.weight.detach())[0] == pytest.approx(layer.gamma.item(), rel=1e-3)


def test_converging_keeps_the_sign_of_the_pair():
    """An average that turned its pair around would pass through zero on the way to the model's."""
    model = mlp()
    for layer in reparametrised(model):
        layer.u.neg_()
    before = [layer.u.clone() for layer in reparametrised(model)]
    converge(model)
    for u, layer in zip(before, reparametrised(model), strict=True):
        torch.testing.assert_close(layer.u, u)
