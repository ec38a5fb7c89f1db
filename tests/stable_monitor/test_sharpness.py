"""Sharpness against dense Hessians in float64, known curvatures, finite differences, and training that diverges or not."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from scipy.sparse import linalg
from torch import nn

from stable_core import sigma_reparam
from stable_monitor.sharpness import adamw_stability_threshold, sharpness
from tests.fairseq_sigma.test_transformer import sentence, stock


def cross_entropy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    return model, [(torch.randn(9, 6), torch.randint(3, (9,))) for _ in range(3)]


def in_float64(model, batches):
    return copy.deepcopy(model).double().eval(), [(x.double(), y) for x, y in batches]


def dense_hessian(loss, parameters):
    """d^2 loss() / d parameters^2, row by row."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def largest(matrix, k):
    values = torch.linalg.eigvalsh(matrix)
    return values[values.abs().argsort(descending=True)][:k]


class Quadratic(nn.Module):
    """loss = 1/2 sum a_i x_i^2, curvatures a_i."""

    def __init__(self, curvatures):
        super().__init__()
        self.x = nn.Parameter(torch.linspace(1, 2, len(curvatures)))
        self.curvatures = torch.tensor(curvatures)

    def loss(self, _batch):
        return 0.5 * (self.curvatures * self.x**2).sum()


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_a_dense_hessian(k, dtype):
    model, batches = network()
    model64, batches64 = in_float64(model, batches)
    slow = dense_hessian(
        lambda: sum(cross_entropy(model64, batch) for batch in batches64) / 3, list(model64.parameters())
    )
    with torch.no_grad():  # where a training loop might well measure
        values = sharpness(model.to(dtype), cross_entropy, [(x.to(dtype), y) for x, y in batches], k)
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), largest(slow, k), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "curvatures", [[3.0, -5, 1, 2, 0.5], [2.0, 2, 2, -1, -1, 0, 0], [1.0] * 30, [4.0] + [0.0] * 40]
)
def test_known_curvatures_repeated_negative_and_zero(curvatures):
    values = sharpness(Quadratic(curvatures), Quadratic.loss, [0], k=4)
    torch.testing.assert_close(values, torch.tensor(sorted(curvatures, key=abs)[::-1][:4]), rtol=1e-5, atol=1e-5)


def test_what_the_loss_is_linear_in_or_does_not_touch_has_no_curvature():
    model = nn.ParameterDict({"linear": torch.ones(3)})
    assert torch.equal(sharpness(model, lambda m, b: m["linear"].sum(), [0], k=2), torch.zeros(2))
    model = nn.ParameterDict({name: torch.ones(3) for name in ("square", "linear", "unused")})
    values = sharpness(model, lambda m, b: (m["square"] ** 2).sum() + m["linear"].sum(), [0], k=4)
    torch.testing.assert_close(values, torch.tensor([2.0, 2, 2, 0]))


class Attention(nn.Module):
    """Two heads of width 3 and a residual; `fused` through torch's kernel, or written out."""

    def __init__(self, fused):
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(6, 18), nn.Linear(6, 3), fused

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            y = (q @ k.mT / 3**0.5).masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.out((x + y.transpose(1, 2).flatten(2)).mean(1))


def test_fused_attention_against_a_dense_hessian_of_attention_written_out():
    torch.manual_seed(0)
    model, batches = Attention(fused=True), [(3 * torch.randn(4, 5, 6), torch.randint(3, (4,)))]
    slow, batches64 = in_float64(model, batches)
    slow.fused = False
    truth = largest(dense_hessian(lambda: cross_entropy(slow, batches64[0]), list(slow.parameters())), 5)
    torch.testing.assert_close(sharpness(model, cross_entropy, batches).double(), truth, rtol=1e-3, atol=0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    cross_entropy(compiled, batches[0]).backward()
    torch.testing.assert_close(sharpness(compiled, cross_entropy, batches).double(), truth, rtol=1e-3, atol=0)


def vit():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )
    return model, [(torch.randn(4, 3, 32, 32), torch.randint(3, (4,)))]


class Logits(nn.Module):
    """The logits of a model called with tokens, as (batch, vocabulary, tokens)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        output = self.model(**tokens) if isinstance(tokens, dict) else self.model(tokens)
        return (output[0] if isinstance(output, tuple) else output.logits).mT


def gpt2():
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    tokens = torch.randint(11, (3, 9))
    return Logits(model), [(tokens[:, :-1], tokens[:, 1:])]


def fairseq_transformer():
    return Logits(stock(activation_fn="gelu")), [(sentence(), torch.randint(12, (2, 4)))]


def sigma_vit():
    model, batches = vit()
    return sigma_reparam(model), batches


@pytest.mark.parametrize("build", [vit, sigma_vit, gpt2, fairseq_transformer])
def test_real_models_against_finite_differences_of_the_training_gradient(build):
    torch.manual_seed(0)
    model, batches = build()
    x, y = batches[0]
    slow = copy.deepcopy(model).double().eval()
    x64 = x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    parameters = list(slow.parameters())
    theta = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(at):
        nn.utils.vector_to_parameters(at, parameters)
        return torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(slow, (x64, y)), parameters)])

    basis, images = theta.new_empty(0, len(theta)), []
    v = torch.randn_like(theta)
    for _ in range(25):  # an orthogonal basis of v, Hv, HHv, ... and the eigenvalues of H on it
        for _ in range(2):
            v = v - (basis @ v) @ basis
        v = v / v.norm()
        basis = torch.cat([basis, v[None]])
        v = (gradient(theta + 1e-4 * v) - gradient(theta - 1e-4 * v)) / 2e-4
        images.append(v)
    truth = largest(basis @ torch.stack(images).T, 1).item()
    assert sharpness(model, cross_entropy, batches, k=1).item() == pytest.approx(truth, rel=1e-3)


def test_sigma_reparam_gives_the_curvature_at_which_its_training_turns_unstable():
    """u is a constant of the Hessian, though training moves it; with the exact norm's curvature it would be another."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    U, _, V = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    with torch.no_grad():
        layer.weight.copy_(U * torch.tensor([1, 0.99, 0.5, 0.4, 0.3]) @ V)
    x = torch.randn(20, 6)
    y = layer(x).argmax(-1)
    kept = sigma_reparam(layer).parametrizations.weight
    with torch.no_grad():
        kept[0].gamma.fill_(4)
    state = [t.detach().flatten().double() for t in (kept.original, kept[0].gamma, kept[0].u)]
    theta, u = torch.cat(state[:2]), state[2]

    def loss(theta, u):
        W = theta[:30].view(5, 6)
        return F.cross_entropy(x.double() @ (theta[30:] / (W.T @ u).norm() * W).T, y)

    def loss_of_exact_sigma(theta):
        W = theta[:30].view(5, 6)
        return F.cross_entropy(x.double() @ (theta[30:] / torch.linalg.matrix_norm(W, 2) * W).T, y)

    truth = largest(torch.autograd.functional.hessian(lambda t: loss(t, u), theta), 3)
    values = sharpness(layer, cross_entropy, [(x, y)], k=3)
    torch.testing.assert_close(values.double(), truth, rtol=1e-3, atol=0)
    assert largest(torch.autograd.functional.hessian(loss_of_exact_sigma, theta), 1) > 3 * values[0]

    def training_step(z, lr):
        theta, u = z.split([31, 5])
        theta = theta - lr * torch.autograd.grad(loss(theta, u), theta, create_graph=True)[0]
        W = theta[:30].view(5, 6)
        return torch.cat([theta, F.normalize(W @ (W.T @ u), dim=0)])

    for share, stable in ((0.95, True), (1.05, False)):
        lr = share * 2 / values[0].item()
        step = torch.autograd.functional.jacobian(functools.partial(training_step, lr=lr), torch.cat(state))
        assert (torch.linalg.eigvals(step).real.min() > -1) == stable


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("share, converges", [(0.99, True), (1.01, False)])
def test_the_threshold_is_where_frozen_adam_diverges_on_a_quadratic(beta1, share, converges):
    lr = 0.1
    model = Quadratic([share * adamw_stability_threshold(lr, beta1)])
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=beta1, dampening=beta1)
    for _ in range(3000):
        optimizer.zero_grad()
        model.loss(None).backward()
        optimizer.step()
    size = model.x.abs().item()
    assert size < 1e-3 if converges else not size < 1e3  # NaN by then


def test_the_threshold_at_the_papers_beta1():
    assert adamw_stability_threshold(1e-3) == pytest.approx(38e3)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_preconditioned_against_a_dense_hessian_and_adams_second_moment(amsgrad):
    model, batches = network()
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.5), eps=1e-3, amsgrad=amsgrad)
    v = v_max = 0
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model, batches[0]).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        v = (v + g**2) / 2
        v_max = torch.maximum(torch.as_tensor(v_max), v)
        optimizer.step()
    root = (((v_max if amsgrad else v) / (1 - 0.5**4)).sqrt() + 1e-3).rsqrt()
    model64, batches64 = in_float64(model, batches)
    H = dense_hessian(lambda: cross_entropy(model64, batches64[1]), list(model64.parameters()))
    values = sharpness(model, cross_entropy, batches[1:2], optimizer=optimizer)
    torch.testing.assert_close(values.double(), largest(root[:, None] * H * root, 5), rtol=2e-3, atol=0)


@pytest.mark.parametrize("share, converges", [(0.98, True), (1.02, False)])
def test_adamw_itself_diverges_where_the_preconditioned_sharpness_crosses_the_threshold(share, converges):
    model = Quadratic([3.0, 40.0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(None).backward()
        optimizer.step()
    group, state = optimizer.param_groups[0], optimizer.state[model.x]
    group["betas"], state["step"] = (0.9, 1 - 1e-9), torch.tensor(1e11)  # v stands still from here
    state["exp_avg"].zero_()
    top = sharpness(model, Quadratic.loss, [0], k=1, optimizer=optimizer).item()
    group["lr"] = share * adamw_stability_threshold(1.0) / top
    sizes = []
    for _ in range(2000):
        optimizer.zero_grad()
        model.loss(None).backward()
        optimizer.step()
        sizes.append(model.x.abs().max().item())
    assert (sizes[-1] < 1e-3 and max(sizes) < 10) if converges else max(sizes) > 100  # where even this v moves


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()  # frozen, while the rest trains
    batches = network()[1]
    cross_entropy(model, batches[0]).backward()
    model[3].weight.grad = None
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    rng = torch.get_rng_state()

    def noisy(model, batch):
        return cross_entropy(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    first = sharpness(model, noisy, torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True), k=3)
    assert torch.equal(torch.get_rng_state(), rng)
    again = sharpness(model, noisy, torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True), k=3)
    assert torch.equal(first, again)
    with pytest.raises(ZeroDivisionError):
        sharpness(model, lambda m, b: 1 / 0, batches)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for p, (grad, value) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad and (grad is None or torch.equal(grad, value))


def test_gives_up_when_lanczos_does_not_converge(monkeypatch):
    eigsh = linalg.eigsh
    monkeypatch.setattr(linalg, "eigsh", lambda *args, **kwargs: eigsh(*args, **{**kwargs, "maxiter": 1}))
    with pytest.raises(RuntimeError, match=r"of k = 5 eigenvalues converged"):
        sharpness(Quadratic(torch.linspace(1, 2, 500).tolist()), Quadratic.loss, [0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k = 0: allowed are 1 and more"),
        ({"k": 155}, "k = 155: allowed are 1 and more, below the 155 parameters"),
        ({"k": 1.5}, "k = 1.5: allowed are"),
        ({"batches": []}, "batches = .*at least one"),
        ({"dtype": torch.bfloat16}, "0.weight: torch.bfloat16 is too coarse"),
        ({"loss_fn": lambda m, b: m(b[0]).sum(1)}, r"batch 0: loss_fn gives a tensor of shape \(9,\)"),
        ({"loss_fn": lambda m, b: m(b[0]).sum().item()}, "batch 0: loss_fn gives float"),
        ({"loss_fn": lambda m, b: m(b[0]).sum().detach()}, "with a gradient to the model"),
        ({"loss_fn": lambda m, b: m(b[0]).sum() * torch.inf}, "batch 0: loss = -?inf"),
        ({"loss_fn": lambda m, b: (0 * m[0].weight).norm()}, "second derivative is not"),
        ({"optimizer": torch.optim.SGD}, "optimizer = SGD: allowed are"),
        ({"optimizer": torch.optim.Adam}, "0.weight: the optimizer has made no step on it"),
    ],
)
def test_bad_input(change, message):
    model, batches = network()
    arguments = {"loss_fn": cross_entropy, "batches": batches, **change}
    model.to(arguments.pop("dtype", torch.float32))
    if "optimizer" in arguments:
        arguments["optimizer"] = arguments["optimizer"](model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message) as error:
        sharpness(model, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message", [((0,), "lr = 0"), ((0.1, 1.0), "beta1 = 1.0"), ((0.1, -0.1), "beta1 =")]
)
def test_bad_threshold(arguments, message):
    with pytest.raises(ValueError, match=message):
        adamw_stability_threshold(*arguments)
