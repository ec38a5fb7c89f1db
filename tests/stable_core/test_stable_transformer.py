"""StableInit, StableNorm and StableAtten against the paper's listing, torch's own norms, and the closed forms."""

import math

import pytest
import torch
import transformers
from torch import nn

from stable_core import StableAttention, StableNorm, stable_attention_logit_bound, stable_init_
from stable_core.attentions import build_attention, stable_tau
from stable_core.options import Options
from stable_core.reference import (
    ListedStableAttention,
    attention,
    dot_logits,
    l2_logits,
    qk_norm_logits,
    stable_init_std,
    stable_logits,
    stable_norm,
    xavier_std,
)


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(made, q, k, v, **settings):
    """As stacks do, on torch's kernel."""
    scale = q.shape[-1] ** -0.5
    q, k = made.q_norm(q), made.k_norm(q if made.tied else k)
    if made.features is not None:
        q, k = made.features(q, k)
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, **settings)


@pytest.mark.parametrize("shape", [(64, 64), (512, 64), (64, 512), (384, 1536), (1152, 384)])
def test_the_largest_singular_value_is_below_one_in_expectation(shape):
    torch.manual_seed(0)
    least, *_, largest = (
        torch.stack([torch.linalg.svdvals(stable_init_(torch.empty(shape))) for _ in range(20)]).mean(0).flip(0)
    )
    assert 0.9 < largest <= 1.0
    longer, shorter = (math.sqrt(size) for size in (max(shape), min(shape)))
    assert least >= (longer - shorter) / (longer + shorter)  # [ST, Theorem 1]
    xavier = [torch.linalg.matrix_norm(nn.init.xavier_normal_(torch.empty(shape)), 2) for _ in range(20)]
    assert 1.0 < torch.stack(xavier).mean() <= 2.0  # [ST, Lemma 1]
    doubled = torch.linalg.matrix_norm(stable_init_(torch.empty(shape), gain=2.0), 2)
    assert 1.8 < doubled < 2.2


def test_every_layer_of_a_module_and_nothing_else():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=96, n_layer=1, n_head=2, n_positions=8)
    model = nn.ModuleDict({
        "linear": nn.Linear(200, 100), "conv": nn.Conv2d(3, 96, 16), "attention": nn.MultiheadAttention(96, 2),
        "gpt": transformers.GPT2Model(config), "norm": nn.LayerNorm(8),
    })  # fmt: skip
    embedding = model["gpt"].wte.weight.clone()
    model["linear"].bias.data.fill_(3.0)
    assert stable_init_(model) is model
    mlp = model["gpt"].h[0].mlp.c_fc
    for weight, n_in, n_out in (
        (model["linear"].weight, 200, 100),
        (model["conv"].weight, 3 * 16 * 16, 96),
        (model["attention"].in_proj_weight, 96, 288),
        (mlp.weight, 96, 384),  # kept as (in, out)
    ):
        assert weight.std().item() == pytest.approx(stable_init_std(n_in, n_out), rel=0.03)
    for bias in (model["linear"].bias, model["conv"].bias, model["attention"].in_proj_bias, mlp.bias):
        assert not bias.any()
    assert torch.equal(model["gpt"].wte.weight, embedding) and model["norm"].weight.eq(1).all()


@pytest.mark.parametrize("d", [16, 768])
def test_norm_is_torchs_at_one_half_and_has_unit_length_at_zero(d):
    x, gamma = normal(4, 7, d), normal(d, seed=1)
    rms = nn.RMSNorm(d, eps=1e-5 / d)
    half, zero = StableNorm(d, 0.5), StableNorm(d, 0.0)
    for norm in (rms, half):
        norm.weight.data.copy_(gamma)
    torch.testing.assert_close(half(x), rms(x))
    torch.testing.assert_close(zero(100 * x).norm(dim=-1), torch.ones(4, 7))
    torch.testing.assert_close(StableNorm(d, 0.25)(100 * x).norm(dim=-1), torch.full((4, 7), d**0.25))


def test_the_standard_deviations_are_the_papers_numbers():
    """[ST, App. H] for a layer from 768 to 768."""
    assert xavier_std(768, 768) == pytest.approx(0.036, abs=5e-4)
    assert stable_init_std(768, 768) == pytest.approx(0.018, abs=5e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5])
def test_norm_is_the_papers_equation(alpha):
    x, norm = 1e-2 * normal(4, 7, 12), StableNorm(12, alpha)  # so small that eps counts
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.testing.assert_close(norm(x), stable_norm(x, norm.weight, alpha))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.475])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_the_jacobian_of_the_norm_is_the_papers(alpha, size):
    d, eps = 12, 1e-5
    x, gamma = size * normal(d).double(), normal(d, seed=1).double()
    norm = StableNorm(d, alpha, eps).double()
    norm.weight.data.copy_(gamma)
    got = torch.autograd.functional.jacobian(norm, x)
    square = x.square().sum() + eps
    expected = d**alpha / square.sqrt() * torch.diag(gamma) @ (torch.eye(d) - torch.outer(x, x) / square)
    torch.testing.assert_close(got, expected)


def gain(function, x: torch.Tensor) -> float:
    """The largest singular value of a function's Jacobian at x, by central differences."""
    step = 1e-5 * max(x.std().item(), 1e-3)
    columns = [(function(x + step * e) - function(x - step * e)) / (2 * step) for e in torch.eye(len(x)).double()]
    return torch.linalg.matrix_norm(torch.stack(columns, 1), 2).item()


@pytest.mark.parametrize("mean", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("deviation", [1e-3, 1.0])
def test_centring_only_makes_the_gain_of_a_norm_larger(mean, deviation):
    """[ST, Theorem 2]: sqrt(d) / sqrt(|x|^2 + eps) <= sqrt(d) / sqrt(|y|^2 + eps) for y, which is x less its mean. These are
    the gains of RMSNorm and of LayerNorm, as the largest singular values of the other factors are 1 [ST, App. C]."""
    d, eps = 16, 1e-5
    x = deviation * normal(d).double() + mean
    y = x - x.mean()
    rms, layer = (
        gain(norm, x) for norm in (StableNorm(d, 0.5, eps).double(), nn.LayerNorm(d, eps / d).double())
    )  # torch adds eps to the mean of squares
    assert rms <= layer * (1 + 1e-6)
    assert rms == pytest.approx(math.sqrt(d / (x.square().sum() + eps)), rel=1e-4)
    assert layer == pytest.approx(math.sqrt(d / (y.square().sum() + eps)), rel=1e-4)
    assert gain(StableNorm(d, 0.5, eps).double(), y) == pytest.approx(layer, rel=1e-4)  # of what is centred already


def test_the_gain_at_d_1024_is_84_percent_of_rms_norms():
    """[ST, App. M] for alpha = 0.475; at zero, where it is greatest, it is d^alpha / sqrt(eps) [ST, Section 3.2]."""
    d, eps = 1024, 1e-5
    stable, rms = (StableNorm(d, alpha, eps).double() for alpha in (0.475, 0.5))
    x = normal(d).double()
    assert gain(stable, x) / gain(rms, x) == pytest.approx(0.84, abs=0.005)
    assert gain(StableNorm(16, 0.25, eps).double(), torch.zeros(16).double()) == pytest.approx(
        2 / math.sqrt(eps), rel=1e-4
    )


@pytest.mark.parametrize("alpha", [0.0, 0.125, 0.5])
def test_attention_is_the_papers_listing(alpha):
    torch.manual_seed(0)
    fast = StableAttention(48, 3, sequence_length=196, alpha=alpha, qkv_bias=True)
    for norm in (fast.q_norm, fast.k_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    listed = ListedStableAttention(fast.qkv, fast.proj, fast.q_norm.weight, fast.k_norm.weight, 3, 196, alpha)
    x = normal(2, 17, 48)
    torch.testing.assert_close(fast(x), listed(x), rtol=1e-4, atol=1e-5)  # which has eps elsewhere
    weights = [fast.qkv.weight, fast.q_norm.weight]
    for a, b in zip(*(torch.autograd.grad(f(x).square().sum(), weights) for f in (fast, listed)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_the_papers_equation(alpha, is_causal):
    torch.manual_seed(0)
    kernel = build_attention(16, Options(attention="stable", alpha=alpha), 196)
    for norm in (kernel.q_norm, kernel.k_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    q, k, v = 1e-2 * normal(3, 2, 3, 9, 16)
    logits = stable_logits(q, k, kernel.q_norm.weight, kernel.k_norm.weight, 196, alpha)
    torch.testing.assert_close(attend(kernel, q, k, v, is_causal=is_causal), attention(logits, v, is_causal))


def test_the_logits_stay_within_their_bound_at_any_width():
    assert stable_tau(512) == pytest.approx(14.562)  # the paper's number
    for dim in (32, 512):
        kernel = build_attention(dim, Options(attention="stable", alpha=0.25), 512)
        x, y = 100 * normal(2, 300, dim)
        logits = [kernel.q_norm(x) @ kernel.k_norm(z).T / math.sqrt(dim) for z in (x, y)]
        assert logits[0].max().item() == pytest.approx(stable_attention_logit_bound(14.562), rel=1e-4)
        assert logits[1].abs().max() < 14.562


def test_the_length_of_the_moment_changes_nothing():
    torch.manual_seed(0)
    attention, x = StableAttention(48, 3, sequence_length=64, alpha=0.475), normal(2, 20, 48)
    whole = attention(x, is_causal=True)
    for n in (1, 2, 7):
        torch.testing.assert_close(attention(x[:, :n], is_causal=True), whole[:, :n])


def test_baseline_kernels_are_their_equations():
    q, k, v = normal(3, 2, 4, 9, 16)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    l2, tied, kernel = (
        build_attention(16, Options(attention=name), 9, eps=1e-5 / 16) for name in ("l2", "l2_tied", "qknorm")
    )
    torch.testing.assert_close(attend(l2, q, k, v, is_causal=True), attention(l2_logits(q, k), v, is_causal=True))
    torch.testing.assert_close(attend(tied, q, k, v, attn_mask=mask), attention(l2_logits(q, q), v, is_causal=True))
    for norm in (kernel.q_norm, kernel.k_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    logits = qk_norm_logits(q, k, kernel.q_norm.weight, kernel.k_norm.weight)
    torch.testing.assert_close(attend(kernel, q, k, v, is_causal=True), attention(logits, v, is_causal=True))
    for is_causal in (False, True):
        fused = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        torch.testing.assert_close(attention(dot_logits(q, k), v, is_causal), fused)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StableNorm(8, 0.6), "alpha = 0.6: allowed are numbers from 0 to 0.5"),
        (lambda: StableNorm(0, 0.5), "dim = 0: allowed are whole numbers from 1"),
        (lambda: StableNorm(8, 0.5, eps=0.0), "eps = 0.0: allowed are positive numbers"),
        (lambda: StableAttention(8, 3, 16, 0.5), "dim = 8, num_heads = 3: dim must be a multiple"),
        (lambda: StableAttention(8, 2, 1, 0.5), "sequence_length = 1: allowed are whole numbers from 2"),
        (lambda: StableAttention(8, 2, 16, 0.5, tau_scale=0), "tau_scale = 0: allowed are positive numbers"),
        (lambda: stable_init_(torch.empty(3)), r"a tensor of shape \(3,\): allowed are weights"),
        (lambda: stable_init_(nn.LayerNorm(3)), "LayerNorm: no Linear, Conv or attention layer"),
        (lambda: stable_init_(nn.Linear(3, 3), gain=0.0), "gain = 0.0: allowed are positive numbers"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
