"""What holds for every shape, precision, scale and setting: drawn by hypothesis, where other tests pick their cases."""

import copy
import io
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stable_core import (
    SigmaReparamConfig,
    StableNorm,
    attention_entropy,
    converge,
    entropy_lower_bound,
    fold,
    fold_state_dict,
    sigma_reparam,
)
from stable_core.attention_entropy import attention_statistics
from stable_core.reference import Algorithm1, attention_probabilities, entropy
from stable_monitor import AlarmConfig
from tests.stable_core.models import reparametrised

drawn = settings(max_examples=25, deadline=None, derandomize=True, database=None)

sizes = st.one_of(st.integers(1, 200), st.sampled_from([1, 2, 63, 64, 65, 66]))  # an exact SVD is taken up to 64
seeds = st.integers(0, 2**31)
LAYERS = ("linear", "conv1d", "conv2d", "grouped", "Conv1D", "c_attn", "qkv", "in_proj", "q_proj k_proj v_proj")


def powers(low: float, high: float):
    """Positive numbers, as many small ones as large ones."""
    return st.floats(low, high).map(lambda x: 10**x)


@dataclass(frozen=True)
class Case:
    """A model of one layer, or of three projections, and how its weights are drawn."""

    layer: str
    out: int
    inputs: int
    dtype: torch.dtype
    scale: float
    spectrum: str
    seed: int
    config: SigmaReparamConfig

    @property
    def is_packed(self) -> bool:
        return self.layer in ("c_attn", "qkv", "in_proj")

    def plain(self) -> nn.Module:
        torch.manual_seed(self.seed)
        n, m = self.inputs, self.out
        model = {
            "linear": lambda: nn.Linear(n, m),
            "conv1d": lambda: nn.Conv1d(n, m, 3),
            "conv2d": lambda: nn.Conv2d(n, m, (2, 1)),
            "grouped": lambda: nn.Conv1d(2 * n, 2 * m, 2, groups=2),
            "Conv1D": lambda: Conv1D(m, n),
            "c_attn": lambda: Conv1D(3 * n, n),
            "qkv": lambda: nn.Linear(n, 3 * n),
            "in_proj": lambda: nn.MultiheadAttention(n, 1),
        }
        if self.layer in model:
            model = nn.ModuleDict({self.layer: model[self.layer]()})
        else:
            model = nn.ModuleDict({name: nn.Linear(n, m) for name in self.layer.split()})
        with torch.no_grad():
            for matrix in self.projections(self.weights(model)):
                if self.spectrum == "orthogonal":
                    nn.init.orthogonal_(matrix)
                elif self.spectrum == "one entry":
                    matrix.zero_()[-1, 0] = 1.0
                else:
                    nn.init.normal_(matrix)
                if self.spectrum == "nearly rank one":
                    matrix.mul_(1e-3).add_(1.0)
                matrix.mul_(self.scale)
        return model.to(self.dtype)

    def weights(self, model: nn.Module) -> list[Tensor]:
        return [layer.in_proj_weight if self.layer == "in_proj" else layer.weight for layer in model.values()]

    def reparametrised(self) -> nn.Module:
        return sigma_reparam(self.plain(), self.config, lambda module, name: "out_proj" not in name)

    def projections(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights as matrices (out, in), packed ones apart."""
        matrices = [W.T if self.layer in ("Conv1D", "c_attn") else W.flatten(1) for W in weights]
        return list(matrices[0].chunk(3)) if self.is_packed else matrices

    def blocks(self, weights: list[Tensor]) -> list[Tensor]:
        """The matrices (out, in) that have a sigma each."""
        blocks = self.projections(weights)
        if self.config.qkv == "separate" or len(blocks) == 1:
            return blocks
        return [torch.cat(blocks)] if self.config.qkv == "joint" else [torch.cat(blocks[:2]), blocks[2]]

    def input(self) -> Tensor:
        shape = {"conv1d": (2, self.inputs, 5), "conv2d": (2, self.inputs, 3, 3), "grouped": (2, 2 * self.inputs, 4)}
        return torch.randn(shape.get(self.layer, (2, 3, self.inputs)), dtype=self.dtype)

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.layer == "in_proj":
                return model[self.layer](x, x, x)[0]
            return torch.cat([layer(x).flatten() for layer in model.values()])


@st.composite
def cases(draw, dtypes=(torch.float32,), kinds=("sigma",), gamma_init=("one", "spectral")) -> Case:
    layer, kind, dtype = draw(st.sampled_from(LAYERS)), draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes))
    attention = layer in ("c_attn", "qkv", "in_proj") or " " in layer
    config = {"kind": kind}
    if kind != "weight":
        config["n_power_iterations"], config["stop_gradient"] = draw(st.integers(1, 3)), draw(st.booleans())
        config["qkv"] = draw(st.sampled_from(("separate", "joint", "qk_joint"))) if attention else "separate"
    if kind == "sigma":
        config["gamma_init"] = draw(st.sampled_from(gamma_init))
    spectrum = draw(st.sampled_from(("normal", "orthogonal", "nearly rank one", "one entry")))
    # Weight norm refuses rows of zeros.
    assume(not (kind == "weight" and spectrum == "one entry"))
    largest_scale = (-3, 2) if dtype == torch.float16 else (-6, 6)
    scale = draw(powers(*largest_scale))
    return Case(layer, draw(sizes), draw(sizes), dtype, scale, spectrum, draw(seeds), SigmaReparamConfig(**config))


def norm(W: Tensor) -> float:
    return torch.linalg.matrix_norm(W.detach().double(), 2).item()


def gammas(model: nn.Module) -> Tensor:
    return torch.cat([layer.gamma.detach() for layer in reparametrised(model)])


PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


@given(cases(PRECISIONS, ("sigma", "spectral")))
@drawn
def test_the_spectral_norm_is_gamma_at_the_start(case):
    spectral = [norm(W) for W in case.blocks(case.weights(case.plain()))]
    model = case.reparametrised()
    rounding = torch.finfo(case.dtype).eps
    assert len(gammas(model)) == len(spectral)
    for W_hat, gamma, sigma in zip(case.blocks(case.weights(model)), gammas(model), spectral, strict=True):
        expected = sigma if (case.config.kind, case.config.gamma_init) == ("sigma", "spectral") else 1.0
        assert gamma.item() == pytest.approx(expected, rel=1e-3 + rounding)
        assert norm(W_hat) == pytest.approx(expected, rel=1e-3 + 2 * rounding)


@given(cases(PRECISIONS, gamma_init=("spectral",)))
@drawn
def test_gamma_at_sigma_keeps_the_function(case):
    plain, model, x = case.plain(), case.reparametrised(), case.input()
    before, after = case.run(plain, x), case.run(model, x)
    assume(before.isfinite().all())  # attention with weights of 100 may overflow in float16
    tolerance = 1e-5 if case.dtype == torch.float32 else 8 * torch.finfo(case.dtype).eps
    assert (after.double() - before.double()).norm() <= tolerance * before.double().norm()


@given(cases())
@drawn
def test_gradients_are_those_of_algorithm_1(case):
    model = case.reparametrised()
    originals = [W for name, W in model.named_parameters() if name.endswith("original")]
    targets = [torch.randn_like(W) for W in originals]
    loss = sum((W_hat * T).sum() for W_hat, T in zip(case.weights(model), targets, strict=True))
    gamma = [layer.gamma for layer in reparametrised(model)]
    ours = torch.autograd.grad(loss, [*originals, *gamma])

    doubles = [W.detach().double().requires_grad_() for W in originals]
    gamma_slow = gammas(model).double().requires_grad_()
    u = [u for layer in reparametrised(model) for u in layer.u.double().split(layer.rows)]
    slow_loss = 0.0
    for W, T, *state in zip(case.blocks(doubles), case.blocks(targets), gamma_slow.unsqueeze(1), u, strict=True):
        slow = Algorithm1(W, *state)
        W_hat = slow.gamma / slow.sigma().detach() * W if case.config.stop_gradient else slow.W_hat()
        slow_loss = slow_loss + (W_hat * T).sum()
    *d_W, d_gamma = torch.autograd.grad(slow_loss, [*doubles, gamma_slow])
    scale = gammas(model).max() / case.scale  # of one weight of one entry the gradient is 0, a difference of large ones
    for mine, slow in zip((*ours[: len(d_W)], torch.cat(ours[len(d_W) :])), (*d_W, d_gamma), strict=True):
        size = scale * 1e-6 if mine.shape != d_gamma.shape else 1e-5
        assert (mine - slow).norm() <= 1e-5 * slow.norm() + size


@given(cases(PRECISIONS, ("sigma", "spectral", "weight")))
@drawn
def test_folded_it_is_a_plain_model_with_the_same_outputs(case):
    model, plain, x = stepped(case), case.plain(), case.input()
    before, state = case.run(model, x), model.state_dict()
    folded = fold(copy.deepcopy(model))
    assert torch.equal(case.run(folded, x), before)
    plain.load_state_dict(fold_state_dict(state))
    for here, there in zip(case.weights(plain), case.weights(folded), strict=True):
        rounding = 2 * torch.finfo(case.dtype).eps  # torch's weight norm rounds once, and we twice
        torch.testing.assert_close(here, there, rtol=max(rounding, 1e-6), atol=torch.finfo(case.dtype).tiny)


def stepped(case: Case) -> nn.Module:
    """After an update, which leaves u no longer the top one."""
    model = case.reparametrised()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for W in model.parameters():
        W.grad = 0.1 * W.detach().abs().amax() * torch.randn_like(W)
    optimizer.step()
    return model


@given(cases(PRECISIONS, ("sigma", "spectral", "weight")))
@drawn
def test_a_saved_state_loads_bitwise(case):
    model, x, file = stepped(case), case.input(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = case.reparametrised()
    other.load_state_dict(torch.load(file))
    assert torch.equal(case.run(other, x), case.run(model, x))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (model, other)), strict=True))


@given(cases(kinds=("sigma", "spectral")), powers(-6, 6))
@drawn
def test_the_scale_of_W_does_not_matter(case, c):
    model = case.reparametrised()
    before = [W.detach() for W in case.weights(model)]
    with torch.no_grad():
        for name, W in model.named_parameters():
            if name.endswith("original"):
                W *= c
        for layer in reparametrised(model):
            layer.u.normal_()
    for after, W_hat in zip(case.weights(converge(model)), before, strict=True):
        assert (after - W_hat).norm() <= 1e-3 * W_hat.norm()


@given(sizes, st.floats(0, 0.5), powers(-9, 0), powers(-6, 6), seeds)
@drawn
def test_stable_norm_has_at_most_its_length(d, alpha, eps, scale, seed):
    torch.manual_seed(seed)
    x, norm = scale * torch.randn(7, d), StableNorm(d, alpha, eps)
    nn.init.normal_(norm.weight)
    gamma = norm.weight.double()
    length = norm(x).norm(dim=-1)
    assert (length <= gamma.abs().max() * d**alpha * (1 + 1e-5)).all()
    half = StableNorm(d, 0.5, eps)
    half.weight = norm.weight
    rms = x.double() / (x.double().square().mean(-1, keepdim=True) + eps / d).sqrt()
    torch.testing.assert_close(half(x).double(), gamma * rms, rtol=1e-5, atol=1e-6)


@st.composite
def attentions(draw):
    batch, key_heads, groups, queries, keys, width = (draw(st.integers(1, n)) for n in (2, 2, 3, 40, 40, 24))
    torch.manual_seed(draw(seeds))
    q, k = torch.randn(batch, key_heads * groups, queries, width), torch.randn(batch, key_heads, keys, width)
    q *= draw(powers(-3, 4))
    leading = [n if draw(st.booleans()) else 1 for n in (*q.shape[:3], keys)]
    leading[3] = keys if leading[3] == 1 and keys > 1 else leading[3]
    mask = draw(st.sampled_from(("none", "hides", "-inf", "bias")))
    attn_mask = None
    if mask == "bias":
        attn_mask = torch.randn(leading)
    elif mask != "none":
        attn_mask = torch.rand(leading) < draw(st.floats(0, 1))
        if mask == "-inf":
            attn_mask = torch.zeros(leading).masked_fill(~attn_mask, -math.inf)
    return q, k, {"scale": width**-0.5 * draw(powers(-1, 1)), "attn_mask": attn_mask, "is_causal": draw(st.booleans())}


@given(attentions())
@drawn
def test_entropy_is_that_of_the_matrix_and_at_least_its_bound(attention):
    q, k, options = attention
    probabilities = attention_probabilities(q, k, **options)
    expected = entropy(probabilities)
    ours, rows = attention_entropy(q, k, **options), attention_statistics(q, k, **options)
    assert (ours - expected).abs().max() < 5e-4
    assert (rows.entropy - expected).abs().max() < 5e-4
    assert (rows.bound <= rows.entropy + 1e-5).all()
    # Theorem 3.1, from the norms of the whole matrices.
    if options["attn_mask"] is None and not options["is_causal"]:
        for queries, bound in zip(q.double().flatten(0, 1), expected.flatten(0, 1), strict=True):
            largest = abs(options["scale"]) * norm(queries) * k.double().flatten(0, 1).norm(dim=-1).max().item()
            assert bound.min() >= entropy_lower_bound(largest * k.shape[2] ** 0.5, k.shape[2]) - 1e-6


other = st.one_of(st.none(), st.text(max_size=8), st.integers(), st.floats(), st.lists(st.integers(), max_size=2))
allowed = {"gamma_init": ("one", "spectral"), "qkv": ("separate", "joint", "qk_joint")}
allowed |= {"kind": ("sigma", "spectral", "weight"), "stop_gradient": (False, True)}


@given(st.sampled_from([*allowed, "n_power_iterations"]), other)
@drawn
def test_a_wrong_setting_is_named_with_its_value(field, value):
    if field == "n_power_iterations":
        assume(not isinstance(value, int) or value < 1)
    else:
        assume(value not in allowed[field])
    with pytest.raises(ValueError) as error:
        SigmaReparamConfig(**{field: value})
    assert f"{field} = {value!r}" in str(error.value)


@given(st.sampled_from([("alpha", 0, 0.5), ("eps", 5e-324, math.inf), ("fraction", 5e-324, 1 - 2**-53)]), st.floats())
@drawn
def test_a_number_out_of_range_is_named_with_its_value(field, value):
    name, low, high = field
    assume(not low <= value <= high)
    with pytest.raises(ValueError) as error:
        AlarmConfig(fraction=value) if name == "fraction" else StableNorm(8, **{"alpha": 0.25, name: value})
    assert f"{name} = {value!r}" in str(error.value)
