"""Models trained through the Triton kernels against the same by torch; under Triton's interpreter, in a process of its own."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stable_core import SigmaReparamConfig, advance, kernels, recompute, sigma_layers, sigma_reparam
from tests.stable_core.interpreter import DEVICE, INTERPRETED, here


class Conv1D(nn.Module):
    """As transformers has it: W (in, out)."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(in_features, out_features))

    def forward(self, x):
        return x @ self.weight


class Block(nn.Module):
    """A packed [Wq; Wk; Wv], a transposed weight, a plain one and a convolution."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.c_fc = nn.Linear(width, 3 * width), Conv1D(20, width)
        self.c_proj, self.conv = nn.Linear(20, width, bias=False), nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT, -1) @ v
        x = x + self.c_proj(torch.tanh(self.c_fc(x)))
        return x + self.conv(x.mT).mT


class Apart(nn.Module):
    """Queries, keys and values in layers of their own."""

    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return x + torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)


def model(setting, block=Block, width=8, **settings):
    torch.manual_seed(0)
    made = nn.Sequential(*[block(width) for _ in range(2)])
    return sigma_reparam(made, SigmaReparamConfig(kernels=setting, **settings)).to(DEVICE)


def batch(seed, width=8):
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def adam(made):
    return torch.optim.AdamW(made.parameters(), lr=3e-3)


def train(made, optimizer, steps=3, start=0, forward=None, autocast=False):
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            y = (forward or made)(batch(seed))
        y.float().square().mean().backward()
        optimizer.step()
    return made


def state(made):
    return {name: x.clone() for name, x in made.state_dict().items()}


def assert_bitwise(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@here
@pytest.mark.parametrize(
    ("block", "settings"),
    [
        (Block, {}),
        pytest.param(Block, {"gamma_init": "spectral", "qkv": "joint"}, marks=pytest.mark.slow),
        pytest.param(Block, {"qkv": "qk_joint", "n_power_iterations": 2}, marks=pytest.mark.slow),
        pytest.param(Block, {"kind": "spectral", "stop_gradient": True}, marks=pytest.mark.slow),
        (Apart, {"qkv": "joint"}),
    ],
)
def test_training_is_that_by_torch_up_to_rounding(block, settings):
    slow, fast = (model(setting, block, **settings) for setting in ("torch", "triton"))
    for made in (slow, fast):
        train(made, torch.optim.SGD(made.parameters(), lr=0.03, momentum=0.9), 5)
    start = model("torch", block, **settings).state_dict()
    for (name, truth), ours in zip(slow.state_dict().items(), fast.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=2e-5)
        if name.endswith("original"):
            assert (truth - start[name]).abs().max() > 1e-3  # far from where it began


@here
@pytest.mark.slow
def test_autocast_rounds_as_torch_does():
    slow, fast = (
        train(m := model(s), torch.optim.SGD(m.parameters(), lr=0.1), autocast=True) for s in ("torch", "triton")
    )
    for truth, ours in zip(slow.parameters(), fast.parameters(), strict=True):
        assert (ours - truth).norm() <= 0.01 * truth.norm()


def three_launches(monkeypatch):
    """How many weights each launch measured."""
    sizes, launch = [], kernels._measure
    monkeypatch.setattr(
        kernels, "_measure", lambda plan, *rest: (sizes.append(len(plan.blocks)), launch(plan, *rest))[1]
    )
    return sizes


@here
def test_from_the_second_pass_on_all_are_measured_together(monkeypatch):
    made = model("triton")
    sizes, optimizer = three_launches(monkeypatch), adam(made)
    train(made, optimizer, 1)
    assert sizes == [1] * 8
    train(made, optimizer, 2, start=1)
    assert sizes == [1] * 8 + [8] * 2
    made.eval()(batch(3))
    assert sizes[:10] == [1] * 8 + [8] * 2 and set(sizes[10:]) == {1}  # on a GPU `eval` measures once more


@here
def test_together_is_bitwise_each_by_itself(monkeypatch):
    together, alone = model("triton"), model("triton")
    train(together, adam(together))
    monkeypatch.setattr("stable_core.together.Together.take", lambda self, layer, W: (None, 0))
    assert_bitwise(state(together), state(train(alone, adam(alone))))


@here
@pytest.mark.slow  # by torch it is tested in every stack
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped():
    whole = model("triton")
    optimizer = adam(whole)
    train(whole, optimizer, 2)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, 3, start=2)
    resumed = model("triton")
    optimizer = adam(resumed)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert_bitwise(state(whole), state(train(resumed, optimizer, 3, start=2)))


@here
@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations_give_bitwise_the_same(use_reentrant):
    plain, checkpointed = model("triton"), model("triton")
    train(plain, adam(plain))

    def forward(x):
        x = x.requires_grad_()
        for block in checkpointed:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    assert_bitwise(state(plain), state(train(checkpointed, adam(checkpointed), forward=forward)))


@here
@pytest.mark.slow
def test_recomputed_weights_give_bitwise_the_same():
    plain, recomputed = model("triton"), recompute(model("triton"))
    assert_bitwise(state(train(plain, adam(plain))), state(train(recomputed, adam(recomputed))))


def truth(made, x):
    """The output of a plain model whose weights are gamma / |W^T u| W, by float64."""
    plain = nn.Sequential(*[Block(8) for _ in range(2)]).double()
    weights = {name: p for name, p in made.named_parameters() if ".parametrizations." not in name}
    for name, layer in sigma_layers(made):
        W = layer.lone_weight().detach().double()
        stacked = W.T if layer.transposed else W.flatten(1)
        blocks = zip(stacked.split(layer.rows), layer.u.double().split(layer.rows), layer.gamma.double(), strict=True)
        W_hat = torch.cat([gamma / (block.T @ u).norm() * block for block, u, gamma in blocks])
        weights[f"{name}.weight"] = W_hat.T if layer.transposed else W_hat.view_as(W)
    plain.load_state_dict({name: W.detach().cpu() for name, W in weights.items()})
    return plain(x.cpu().double())


@here
@pytest.mark.parametrize("after_a_pass", [False, True])
def test_a_weight_that_changes_in_silence_is_seen_at_once(after_a_pass):
    made = model("triton")
    train(made, adam(made), 2)
    x = batch(9)
    if after_a_pass:  # without a backward pass
        made(x)
    made[1].c_proj.parametrizations.weight.original.data.mul_(3.0)  # u stays that of the weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that u was put right, where the values were looked at
        y = made(x)
    torch.testing.assert_close(y.cpu().double(), truth(made, x), rtol=1e-4, atol=1e-4)


@here
@pytest.mark.slow
def test_layers_used_twice_or_not_at_all():
    slow, fast = model("torch"), model("triton")
    for made in (slow, fast):
        orders = iter([(0, 1, 0), (0, 1), (1,), (0, 1, 1), (1, 0), (0, 1)])

        def forward(x, made=made, orders=orders):
            for i in next(orders):
                x = made[i](x)
            return x

        train(made, torch.optim.SGD(made.parameters(), lr=0.03), 6, forward=forward)
    for ours, theirs in zip(fast.state_dict().values(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@here
@pytest.mark.slow
def test_frozen_layers_and_copies():
    made = model("triton")
    made[0].qkv.parametrizations.weight.original.requires_grad_(False)
    train(made, adam(made), 2)
    twin = copy.deepcopy(made)
    assert_bitwise(state(train(made, adam(made), 2)), state(train(twin, adam(twin), 2)))


@here
@pytest.mark.slow
def test_averaged_weights_are_evaluated_as_by_torch():
    made = model("triton")
    average = torch.optim.swa_utils.AveragedModel(made, use_buffers=True)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.3)
    for seed in range(3):
        train(made, optimizer, 1, start=seed)
        average.update_parameters(made)
    slow = model("torch")
    for (_, ours), (_, theirs) in zip(sigma_layers(average.module), sigma_layers(slow), strict=True):
        theirs.lone_weight().data.copy_(ours.lone_weight())
        theirs.gamma.data.copy_(ours.gamma)
        theirs.u.copy_(ours.u)
    slow.load_state_dict(
        {**slow.state_dict(), **{n: p for n, p in average.module.named_parameters() if n.endswith("bias")}}
    )
    torch.testing.assert_close(average.eval()(batch(0)), slow.eval()(batch(0)), rtol=1e-4, atol=1e-4)


@here
@pytest.mark.slow
def test_a_loop_of_ones_own_advances_by_hand():
    slow, fast = model("torch"), model("triton")
    for made in (slow, fast):
        for seed in range(3):
            made.zero_grad()
            made(batch(seed)).square().mean().backward()
            for p in made.parameters():
                p.data.sub_(0.1 * p.grad)
            advance(made.parameters())
    for ours, theirs in zip(fast.state_dict().values(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(DEVICE.type != "cpu" or INTERPRETED, reason="the kernels run here")
def test_asked_for_where_they_do_not_run():
    with pytest.raises(ValueError, match="kernels = 'triton': a weight is on the CPU"):
        model("triton")(batch(0))


def test_a_setting_that_there_is_not():
    with pytest.raises(ValueError, match="kernels = 'cuda': allowed are 'auto', 'torch', 'triton'"):
        SigmaReparamConfig(kernels="cuda")


@here
@pytest.mark.slow
def test_second_derivatives_and_types_without_kernels():
    with pytest.raises(ValueError, match="float64; allowed are"):
        model("triton").double()(batch(0).double())
    results = []
    for setting in ("torch", "triton"):
        made = model(setting)
        made(batch(0))
        parameters = list(made.parameters())
        gradients = torch.autograd.grad(made(batch(1)).square().mean(), parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
