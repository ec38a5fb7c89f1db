"""Writes to `.weight`, torch.func's transforms, float64, and engines that cut weights, against plain torch on plain tensors."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

from stable_core import SigmaReparamConfig, advance, converge, fold, sigma_reparam
from tests.stable_core.models import mlp, reparametrised


@pytest.mark.parametrize("shape", [(80, 90), (240, 80)])
def test_a_weight_that_is_assigned_is_the_effective_weight(shape):
    torch.manual_seed(0)
    model = sigma_reparam(nn.ModuleDict({"qkv": nn.Linear(shape[1], shape[0])}))
    X = torch.randn(shape)
    model["qkv"].weight = X
    torch.testing.assert_close(model["qkv"].weight, X, rtol=1e-5, atol=1e-6)
    X.zero_()  # it is a copy
    assert model["qkv"].weight.abs().sum() > 0
    with torch.no_grad():
        model["qkv"].weight = torch.ones(shape)
    blocks = 3 if shape[0] == 3 * shape[1] else 1
    norm = (shape[0] / blocks * shape[1]) ** 0.5  # of a matrix of ones
    torch.testing.assert_close(reparametrised(model)[0].gamma.detach(), torch.full((blocks,), norm), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "k_proj"])
@pytest.mark.parametrize("qkv", ["joint", "qk_joint"])
def test_an_assignment_to_one_of_a_joint_sigma_leaves_the_others(qkv, name):
    torch.manual_seed(0)
    layers = nn.ModuleDict({n: nn.Linear(80, 80) for n in ("k_proj", "v_proj", "q_proj")})
    sigma_reparam(layers, SigmaReparamConfig(qkv=qkv))
    before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
    X = 3 * torch.randn(80, 80)
    layers[name].weight = X
    for n, layer in layers.items():
        torch.testing.assert_close(layer.weight, X if n == name else before[n], rtol=1e-4, atol=1e-6)
    for sigma in reparametrised(layers):
        torch.testing.assert_close(sigma.sigma(), sigma.true_sigma(), rtol=1e-3, atol=0)


def test_a_spectral_norm_layer_takes_weights_of_norm_one():
    model = mlp(kind="spectral")
    X = torch.linalg.qr(torch.randn(130, 90))[0]
    model[0].weight = X
    torch.testing.assert_close(model[0].weight, X, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"0: a weight of norm 2; with kind = 'spectral' allowed is 1"):
        model[0].weight = 2 * X
    torch.testing.assert_close(model[0].weight, X, rtol=1e-3, atol=1e-4)


def plain_function(parameters, u, x):
    """The two layers of `mlp` by hand."""
    weights = []
    for i, u_i in zip((0, 2), u, strict=True):
        W = parameters[f"{i}.parametrizations.weight.original"]
        weights.append(parameters[f"{i}.parametrizations.weight.0.gamma"] * W / (W.T @ u_i).norm())
    x = nn.functional.gelu(nn.functional.linear(x, weights[0], parameters["0.bias"]))
    return nn.functional.linear(x, weights[1], parameters["2.bias"])


def test_per_sample_gradients():
    model, x = mlp(), torch.randn(5, 90)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters, x):
        return functional_call(model, (parameters, buffers), (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad, rtol=1e-4, atol=1e-5)


def test_ensembles():
    models, x = [mlp(seed) for seed in range(3)], torch.randn(4, 90)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]), rtol=1e-5, atol=1e-6)


def test_other_tensors_in_the_weights_places_leave_u_alone():
    """As meta-learning and finite differences have them."""
    model, x = mlp(), torch.randn(4, 90)
    before = [sigma.u.clone() for sigma in reparametrised(model)]
    other = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = functional_call(model, other, (x,))
        model(x)
    assert all(torch.equal(sigma.u, u) for sigma, u in zip(reparametrised(model), before, strict=True))
    torch.testing.assert_close(found, plain_function(other, before, x), rtol=1e-4, atol=1e-5)


def test_forward_mode_and_hessians():
    model = mlp().double()
    x = torch.randn(2, 90).double()
    u = [nn.functional.normalize(sigma.u.double(), dim=0) for sigma in reparametrised(model)]
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}

    def ours(p):
        return functional_call(model, p, (x,)).square().sum()

    def plain(p):
        return plain_function(p, u, x).square().sum()

    torch.testing.assert_close(jvp(ours, (parameters,), (tangents,)), jvp(plain, (parameters,), (tangents,)))
    eps, (_, slope) = 1e-6, jvp(ours, (parameters,), (tangents,))
    moved = [ours({n: p + s * eps * tangents[n] for n, p in parameters.items()}) for s in (1, -1)]
    assert slope.item() == pytest.approx(((moved[0] - moved[1]) / (2 * eps)).item(), rel=1e-5)

    name = "2.parametrizations.weight.0.gamma"
    second = hessian(lambda gamma: ours(parameters | {name: gamma}))(parameters[name])
    torch.testing.assert_close(second, hessian(lambda gamma: plain(parameters | {name: gamma}))(parameters[name]))


@pytest.mark.parametrize("name", ["fc", "qkv"])
def test_a_float64_model_is_computed_in_float64(name):
    torch.manual_seed(0)
    layers = sigma_reparam(nn.ModuleDict({name: nn.Linear(4, 12, bias=False)}).double())
    kept = layers[name].parametrizations.weight
    x = torch.randn(3, 4).double()

    def f(W, gamma):
        parameters = {"parametrizations.weight.original": W, "parametrizations.weight.0.gamma": gamma}
        return functional_call(layers[name], parameters, (x,))

    inputs = [p.detach().clone().requires_grad_() for p in (kept.original, kept[0].gamma)]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_tensor_parallelism_is_refused_in_one_line():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, advice = init_device_mesh("cpu", (1,)), "fully_shard"
        for plan in (ColwiseParallel(), RowwiseParallel()):
            with pytest.raises(ValueError, match=advice):
                parallelize_module(mlp(), mesh, {"0": plan})
            plain = parallelize_module(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), mesh, {"0": plan})
            with pytest.raises(ValueError, match=f"0: its weight is sharded already; .* {advice}"):
                sigma_reparam(plain)
            sigma_reparam(plain, filter_fn=lambda module, name: name == "1")
    finally:
        dist.destroy_process_group()


def test_pruning_is_refused_until_the_model_is_folded():
    model = mlp()
    with pytest.raises(ValueError, match=r"stable_core\.fold\(model\) first"):
        nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)
    nn.utils.prune.l1_unstructured(model[0], "bias", amount=0.5)
    nn.utils.prune.l1_unstructured(fold(model)[2], "weight", amount=0.5)
    assert (model[2].weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_norm_is_known_while_the_estimate_lags():
    model = mlp()
    with torch.no_grad():
        for sigma in reparametrised(model):
            sigma.originals()[0].copy_(torch.randn_like(sigma.originals()[0]))
    before = [sigma.u.clone() for sigma in reparametrised(model)]
    for sigma, u in zip(reparametrised(model), before, strict=True):
        truth = torch.linalg.svdvals(sigma.originals()[0].detach())[0].item()
        assert sigma.true_sigma().item() == pytest.approx(truth, rel=1e-3)
        assert sigma.sigma().item() < 0.9 * truth
        assert torch.equal(sigma.u, u)
    advance(model.parameters())
    converge(model)
    assert all(s.sigma().item() == pytest.approx(s.true_sigma().item(), rel=1e-3) for s in reparametrised(model))
