"""σReparam against Algorithm 1, torch's SVD and finite differences, in every precision and on every kind of layer."""

import copy

import pytest
import torch
from torch import nn

from stable_core import SigmaReparamConfig, advance, fold, sigma_reparam
from stable_core.reference import Algorithm1, effective_weight, weight_norm
from tests.stable_core.models import equal, mlp, state, train


def numerical_gradient(f, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Central differences of the scalar f() with respect to every entry of x, which f reads; use float64."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        entry = x.data.view(-1)[i : i + 1]
        value = entry.clone()
        entry.copy_(value + eps)
        above = f()
        entry.copy_(value - eps)
        below = f()
        entry.copy_(value)
        gradient.view(-1)[i] = (above - below) / (2 * eps)
    return gradient


@pytest.mark.parametrize("n_power_iterations", [1, 3])
def test_training_follows_algorithm_1(n_power_iterations):
    torch.manual_seed(0)
    layer = sigma_reparam(nn.Linear(90, 130), SigmaReparamConfig(n_power_iterations=n_power_iterations))
    kept = layer.parametrizations.weight
    slow = Algorithm1(*(t.detach().clone().double() for t in (kept.original, kept[0].gamma, kept[0].u)))
    slow.W.requires_grad_()
    slow.gamma.requires_grad_()
    bias = layer.bias.detach().clone().double().requires_grad_()
    fast_optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    slow_optimizer = torch.optim.SGD([slow.W, slow.gamma, bias], lr=0.1)
    for _ in range(20):
        x = torch.randn(8, 90)
        for optimizer, y in ((fast_optimizer, layer(x)), (slow_optimizer, x.double() @ slow.W_hat().T + bias)):
            optimizer.zero_grad()
            y.sin().sum().backward()
            optimizer.step()
        for _ in range(n_power_iterations):
            slow.step()
        torch.testing.assert_close(kept.original.double(), slow.W, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept[0].gamma.double(), slow.gamma, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept[0].u.double(), slow.u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept[0].sigma().double()[0], slow.sigma(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gradients_match_autograd_and_finite_differences(stop_gradient):
    torch.manual_seed(0)
    layer = sigma_reparam(nn.Linear(7, 5, bias=False), SigmaReparamConfig(stop_gradient=stop_gradient))
    kept = layer.parametrizations.weight
    x, target = torch.randn(4, 7), torch.randn(4, 5)
    (layer(x) * target).sin().sum().backward()

    slow = Algorithm1(*(t.detach().clone().double() for t in (kept.original, kept[0].gamma, kept[0].u)))
    # Away from the top singular vectors sigma's gradient is still u v^T, so any u will do: these are kept.
    slow.W.requires_grad_()
    slow.gamma.requires_grad_()
    constant = slow.sigma().detach()

    def loss():
        W_hat = slow.gamma / constant * slow.W if stop_gradient else slow.W_hat()
        return ((x.double() @ W_hat.T) * target).sin().sum()

    loss().backward()
    for ours, parameter in ((kept.original.grad, slow.W), (kept[0].gamma.grad, slow.gamma)):
        torch.testing.assert_close(ours.double(), parameter.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(parameter.grad, numerical_gradient(loss, parameter), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("blocks", [1, 3])
def test_second_derivatives_see_sigma_move(blocks):
    """Hessian-vector products, which sharpness needs, are those of plain autograd on W / |W^T u|."""
    torch.manual_seed(0)
    layer = nn.ModuleDict({"qkv" if blocks == 3 else "fc": nn.Linear(6, blocks * 6, bias=False)})
    sigma_reparam(layer, SigmaReparamConfig(gamma_init="one"))
    (layer,) = layer.values()
    kept = layer.parametrizations.weight
    W_slow = kept.original.detach().clone().requires_grad_()
    slow = torch.cat([W / (W.T @ u).norm() for W, u in zip(W_slow.split(6), kept[0].u.split(6), strict=True)])
    x, direction = torch.randn(3, 6), torch.randn(blocks * 6, 6)
    products = []
    for W, y in ((kept.original, layer(x)), (W_slow, x @ slow.T)):
        (gradient,) = torch.autograd.grad(y.sin().sum(), W, create_graph=True)
        products.append(torch.autograd.grad((gradient * direction).sum(), W)[0])
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 50), (65, 65), (512, 512), (2048, 512), (512, 1536)])
@pytest.mark.parametrize("init", [nn.init.normal_, nn.init.xavier_uniform_, nn.init.orthogonal_])
def test_sigma_starts_converged(shape, init):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    init(layer.weight)
    truth = torch.linalg.svdvals(layer.weight.detach())[0]
    sigma = sigma_reparam(layer).parametrizations.weight[0].sigma()[0]
    assert abs(sigma / truth - 1) < 1e-3


def test_a_low_rank_weight_starts_converged():
    layer = nn.Linear(100, 100)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.arange(1.0, 101), torch.ones(100)))
    truth = torch.linalg.svdvals(layer.weight.detach())[0]
    assert abs(sigma_reparam(layer).parametrizations.weight[0].sigma()[0] / truth - 1) < 1e-3


@pytest.mark.parametrize("config, norm", [({"gamma_init": "one"}, 1.0), ({"kind": "spectral"}, 1.0)])
def test_the_weight_has_spectral_norm_gamma(config, norm):
    model = mlp(**config)
    for layer in (model[0], model[2]):
        assert torch.linalg.svdvals(layer.weight.detach())[0] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_the_weight_is_the_papers_by_svd(gamma):
    for layer in (mlp()[0], mlp(n_power_iterations=3)[2]):
        kept = layer.parametrizations.weight
        kept[0].gamma.data.fill_(gamma)
        torch.testing.assert_close(layer.weight, effective_weight(kept.original, gamma), rtol=1e-3, atol=0)


def test_spectral_norm_baseline_has_no_gamma_to_learn():
    model = mlp(kind="spectral")
    assert not [name for name, _ in model.named_parameters() if "gamma" in name]
    train(model, torch.optim.Adam(model.parameters(), lr=1e-3), 20)
    assert torch.linalg.svdvals(model[0].weight.detach())[0] == pytest.approx(1, rel=1e-2)


def test_weight_norm_baseline_is_one_norm_per_row():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 1))
    before = [layer.weight.detach().clone() for layer in model]
    sigma_reparam(model, SigmaReparamConfig(kind="weight"))
    for layer, W in zip(model, before, strict=True):
        torch.testing.assert_close(layer.weight, W)
        g = layer.parametrizations.weight.original0
        with torch.no_grad():
            g.uniform_(0.5, 3)
            torch.testing.assert_close(layer.weight, weight_norm(W, g.flatten()))


def test_the_function_is_kept():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0)
    x = torch.randn(2, 5, 64)
    before = model(x)
    after = sigma_reparam(model)(x)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("layer, shape", [(nn.Conv1d(8, 70, 9), (2, 8, 20)), (nn.Conv2d(3, 70, 5), (2, 3, 9, 9))])
def test_convolutions_are_seen_as_out_by_in_times_kernel(layer, shape):
    before, x = copy.deepcopy(layer), torch.randn(shape)
    sigma_reparam(layer, SigmaReparamConfig(gamma_init="one"))
    truth = torch.linalg.svdvals(before.weight.detach().flatten(1))[0]
    bias = before.bias.view(-1, *[1] * (len(shape) - 2))
    torch.testing.assert_close(layer(x) - bias, (before(x) - bias) / truth, rtol=1e-3, atol=1e-5)


def test_hugging_face_conv1d_is_transposed_and_cut_along_its_outputs():
    class Conv1D(nn.Module):  # transformers.pytorch_utils.Conv1D in three lines
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    model = nn.ModuleDict({"c_attn": Conv1D(3 * 70, 70), "c_proj": Conv1D(70, 70)})
    sigma_reparam(model, SigmaReparamConfig(gamma_init="one"))
    for block in model["c_attn"].weight.detach().split(70, dim=1):
        assert torch.linalg.svdvals(block)[0] == pytest.approx(1, rel=1e-3)
    assert torch.linalg.svdvals(model["c_proj"].weight.detach())[0] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("qkv, cuts", [("separate", [64, 64, 64]), ("joint", [192]), ("qk_joint", [128, 64])])
@pytest.mark.parametrize("packed", [True, False])
def test_q_k_v_share_a_sigma_as_asked(qkv, cuts, packed):
    torch.manual_seed(0)
    if packed:
        model = sigma_reparam(nn.MultiheadAttention(64, 4), SigmaReparamConfig(gamma_init="one", qkv=qkv))
        stacked = model.in_proj_weight
    else:  # in fairseq's order, where q is not the first
        model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("k_proj", "v_proj", "q_proj", "out_proj")})
        sigma_reparam(model, SigmaReparamConfig(gamma_init="one", qkv=qkv))
        stacked = torch.cat([model[name].weight for name in ("q_proj", "k_proj", "v_proj")])
    for block in stacked.detach().split(cuts):
        assert torch.linalg.svdvals(block)[0] == pytest.approx(1, rel=1e-3)
    # The state advances too: after a step each block still has norm gamma.
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith("original")], lr=1.0)
    stacked.sin().sum().backward()
    optimizer.step()
    for _ in range(50):
        advance(model.parameters())
    after = model.in_proj_weight if packed else torch.cat([model[n].weight for n in ("q_proj", "k_proj", "v_proj")])
    assert not torch.allclose(after, stacked)
    for block in after.detach().split(cuts):
        assert torch.linalg.svdvals(block)[0] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_exact_weight_once(dtype):
    """In fp32 until the rounding that autocast would do, so that the whole step is bit for bit what plain layers do."""
    model, plain = mlp(), mlp()
    exact = [layer.weight.detach() for layer in (model[0], model[2])]
    x = torch.randn(8, 90)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model[0].weight, exact[0].to(dtype))
        y = model(x)
    y.float().square().mean().backward()
    W_hats = [layer.weight.requires_grad_() for layer in (fold(plain)[0], plain[2])]
    with torch.autocast("cpu", dtype=dtype):
        y_plain = plain(x)
    y_plain.float().square().mean().backward()
    assert torch.equal(y, y_plain)
    for layer, W_hat in zip((model[0], model[2]), W_hats, strict=True):
        kept = layer.parametrizations.weight
        W, gamma = (t.detach().clone().requires_grad_() for t in (kept.original, kept[0].gamma))
        Algorithm1(W, gamma, kept[0].u).W_hat().backward(W_hat.grad)
        assert kept.original.grad.dtype == torch.float32
        torch.testing.assert_close(kept.original.grad, W.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kept[0].gamma.grad, gamma.grad, rtol=1e-4, atol=1e-6)


def test_a_half_precision_model_keeps_its_state_in_fp32():
    model = mlp(gamma_init="one")
    before = state(model)
    model.bfloat16()
    assert equal(state(model), before)
    assert torch.linalg.svdvals(model[0].weight.detach().float())[0] == pytest.approx(1, rel=5e-3)
    model(torch.randn(4, 90, dtype=torch.bfloat16)).sum().backward()
    assert model[0].parametrizations.weight.original.grad.dtype == torch.bfloat16


def test_compiles_without_a_graph_break():
    model, twin = mlp(), mlp()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 90)
    for m in (compiled, twin):
        m(x).square().mean().backward()
    torch.testing.assert_close(
        model[0].parametrizations.weight.original.grad, twin[0].parametrizations.weight.original.grad
    )
    # and goes on using the advanced state after a step, without compiling it in as a constant
    for m in (model, twin):
        torch.optim.SGD(m.parameters(), lr=0.5).step()
    torch.testing.assert_close(compiled(x), twin(x))


def test_a_layer_used_twice_in_one_forward():
    model, x = mlp(), torch.randn(4, 90)
    kept = model[0].parametrizations.weight
    slow = Algorithm1(kept.original.detach().clone().requires_grad_(), kept[0].gamma.detach(), kept[0].u)
    for W, layer in (
        (kept.original, model[0]),
        (slow.W, lambda x: nn.functional.linear(x, slow.W_hat(), model[0].bias)),
    ):
        (layer(x) * layer(-x).sin()).sum().backward()
        assert W.grad is not None
    torch.testing.assert_close(kept.original.grad, slow.W.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = sigma_reparam(nn.Linear(80, 70), SigmaReparamConfig(gamma_init="spectral"))
        assert model(torch.randn(3, 80)).dtype == dtype
        assert model.parametrizations.weight[0].u.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_from_the_meta_device():
    source = mlp()
    with torch.device("meta"):
        model = mlp()
        assert model(torch.empty(2, 90)).is_meta
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(4, 90)
    assert torch.equal(model(x), source(x))


def test_training_keeps_one_extra_copy_of_the_weight():
    """W_hat, for the layer's own backward; plain autograd on Algorithm 1 keeps W / sigma as well."""

    def kept(module, x) -> tuple[int, torch.Tensor]:
        own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), x)}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module(x)
        return sum(storage.nbytes() for storage in storages.values()), y

    x = torch.randn(2, 300)
    plain, _ = kept(nn.Linear(300, 400), x)
    ours, _ = kept(sigma_reparam(nn.Linear(300, 400)), x)
    assert ours - plain <= 4 * (300 * 400 + 1000)


@pytest.mark.slow
def test_inductor_compiles_it():
    model, twin, x = mlp(), mlp(), torch.randn(8, 90)
    compiled = torch.compile(model, fullgraph=True)
    for m in (compiled, twin):
        m(x).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
