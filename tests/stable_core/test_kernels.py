"""The Triton kernels against float64 and its autograd; on the CPU under Triton's interpreter, in a process of its own."""

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch.nn.functional import normalize

from stable_core import kernels
from stable_core.kernels import Tile, measure, power_iteration_, scale_backward
from tests.stable_core.interpreter import DEVICE, INTERPRETED, here, in_process

SHAPES = ((1, 1), (3, 5), (1, 70), (65, 1), (65, 129), (300, 70), (48, 64))
FILES = [f"tests/stable_core/test_kernels{which}.py" for which in ("", "_attention", "_training")]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16 = 2**-7 if INTERPRETED else 2**-8  # the interpreter cuts bits off where a GPU rounds


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_all_kernels_under_the_interpreter(chosen):
    """Here and not in a file of its own, as pytest-xdist leaves the files with the fewest tests to the end."""
    triton = pytest.importorskip("triton")
    done = in_process("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, *FILES, TRITON_INTERPRET="1")
    if Version(triton.__version__) < Version("3.8") and "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip(f"the interpreter of triton {triton.__version__} does not know numpy {np.__version__}; 3.8 does")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="starts processes of its own, in which nothing is interpreted")
@pytest.mark.parametrize("before", ["pass", "sys.modules['triton'] = None"], ids=["as it is", "no triton"])
def test_can_be_imported_anywhere_and_says_whether_it_runs(before):
    code = f"""
import sys; {before}
import torch; from stable_core import kernels
assert sys.modules.get("triton") is None
print([kernels.available(torch.device(name)) for name in ("cpu", "meta")])
"""
    done = in_process("-c", code, TRITON_INTERPRET="0")
    assert done.stdout == "[False, False]\n", done.stderr


def weight(shape, dtype=torch.float32, transposed=False, size=1.0, seed=0):
    W = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * shape[0] + shape[1]))
    W = W.to(DEVICE, dtype)
    return W.T.contiguous().T if transposed else W


def unit(size, seed=7):
    return normalize(torch.randn(size, generator=torch.Generator().manual_seed(seed)), dim=0).to(DEVICE)


def slow_power_iteration(W, u, n):
    W, u = W.double(), u.double()
    for _ in range(n):
        v = torch.stack([(W[:, j] * u).sum() for j in range(W.shape[1])])
        v = v / v.norm()
        u = torch.stack([(W[i] * v).sum() for i in range(W.shape[0])])
        u = u / u.norm()
    return u


def error(x, truth):
    assert torch.isfinite(x).all()
    return ((x.double() - truth).norm() / truth.norm()).item()


# ---------------------------------------------------------------------------------------------- power iteration


@here
@pytest.mark.parametrize(("dtype", "n"), list(zip(TYPES, (2, 1, 1), strict=True)))
def test_all_weights_of_a_model_advance_together(dtype, n):
    weights = [weight(shape, dtype, transposed) for shape in SHAPES for transposed in (False, True)]
    us = [unit(len(W)) for W in weights]
    truth = [slow_power_iteration(W, u, n) for W, u in zip(weights, us, strict=True)]
    power_iteration_(weights, us, n)
    assert max(map(error, us, truth)) < 1e-6


@here
@pytest.mark.parametrize("size", [1e-15, 1e-7, 1e12])
def test_power_iteration_at_any_size(size):
    """The squares of 1e-28 and 1e26, which are what |W W^T u| is made of, are not numbers in fp32."""
    weights = [weight((65, 129), size=size), weight((40, 3), size=size, transposed=True)]
    us = [unit(len(W)) for W in weights]
    truth = [slow_power_iteration(W, u, 2) for W, u in zip(weights, us, strict=True)]
    power_iteration_(weights, us, 2)
    assert max(map(error, us, truth)) < 1e-6


@here
def test_weights_of_several_types_and_views_in_one_call():
    wide = weight((20, 64))
    weights = [weight((5, 9)), wide[3:14, 7:30], wide.T[3:14, 7:13], weight((5, 9), torch.bfloat16)]
    us = [unit(len(W)) for W in weights]
    truth = [slow_power_iteration(W, u, 1) for W, u in zip(weights, us, strict=True)]
    power_iteration_(weights, us, 1)
    assert max(map(error, us, truth)) < 1e-6


class Counting:
    """Stands for the module of the kernels, and counts their launches."""

    def __init__(self, module):
        self.module, self.launches = module, 0

    def __getattr__(self, name):
        self.launches += name in ("products", "add_up", "normalise", "measured", "overlaps", "gradient")
        return getattr(self.module, name)


@here
def test_how_many_launches_there_are(monkeypatch):
    def launches(work, *arguments):
        counting = Counting(kernels._kernels())
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_kernels", lambda: counting)
            work(*arguments)
        return counting.launches

    for count in (1, 9):
        weights = [weight((8, 8), seed=i) for i in range(count)]
        assert launches(power_iteration_, weights, [unit(8) for _ in weights], 2) == 10
        places = tuple(kernels.Place(W.data_ptr(), (8, 8), (8, 1), (4, 4), *2 * [W.data_ptr()]) for W in weights)
        assert launches(kernels.measure_all, kernels.plan(places, DEVICE, torch.float32), torch.float32) == 3
    W, u, gamma = weight((8, 8)), unit(8), torch.ones(2, device=DEVICE)
    assert launches(measure, W, u, gamma, (4, 4)) == 3
    assert launches(scale_backward, W, W, measure(W, u, gamma, (4, 4)), (4, 4), False) == 2


@here
def test_a_weight_that_moves_or_changes_its_shape_is_found():
    parameter, u = torch.nn.Parameter(weight((6, 4))), unit(6)
    power_iteration_([parameter], [u], 1)
    for new in (weight((6, 4), seed=3), parameter.data.view(-1)[:18].view(6, 3), parameter.data.view(-1).view(6, 4)):
        parameter.data = new
        u.copy_(unit(6))
        power_iteration_([parameter], [u], 1)
        assert error(u, slow_power_iteration(new, unit(6), 1)) < 1e-6


@here
def test_a_weight_of_zeros_keeps_its_u():
    W, u = torch.zeros(5, 4, device=DEVICE), unit(5)
    power_iteration_([W], [u], 3)
    assert torch.equal(u, unit(5))


@here
def test_nothing_that_is_not_a_number_is_hidden():
    W, u = weight((5, 4)), unit(5)
    W[2, 1] = torch.nan
    power_iteration_([W], [u], 1)
    assert u.isnan().any()


def test_what_power_iteration_refuses():
    with pytest.raises(ValueError, match="float64"):
        power_iteration_([weight((5, 4))], [unit(5).double()], 1)
    with pytest.raises(ValueError, match="5 entries"):
        power_iteration_([weight((5, 4))], [unit(4)], 1)


@here
def test_what_it_refuses_of_weights():
    with pytest.raises(ValueError, match="float64: allowed are"):
        power_iteration_([weight((5, 4)).double()], [unit(5)], 1)
    with pytest.raises(ValueError, match="contiguous"):
        power_iteration_([weight((10, 8))[::2, ::2]], [unit(5)], 1)
    with pytest.raises(ValueError, match="sum must be 5"):
        measure(weight((5, 4)), unit(5), torch.ones(2, device=DEVICE), (2, 2))


# ---------------------------------------------------------------------------------------- forward and backward


def slow(W, u, gamma, rows, G, stop_gradient):
    """z, s, gamma/s, and the gradients that float64's autograd finds."""
    W, gamma = W.double().requires_grad_(), gamma.double().requires_grad_()
    W_hat, zs = [], []
    for block, x, g in zip(W.split(rows), u.double().split(rows), gamma, strict=True):
        zs.append((block * x[:, None]).sum(0))
        s = zs[-1].square().sum().sqrt() / x.norm()
        W_hat.append(g / (s.detach() if stop_gradient else s) * block)
    z = torch.stack(zs).detach()
    s = z.norm(dim=1) / torch.stack([x.double().norm() for x in u.split(rows)])
    return z, s, gamma.detach() / s, *torch.autograd.grad(torch.cat(W_hat), (W, gamma), G.double())


def units(rows):
    return torch.cat([unit(n, seed=i) for i, n in enumerate(rows)])


def check(W, rows, G_type=torch.float32, stop_gradient=False, G_transposed=False, length=1.0):
    u = length * units(rows)
    gamma = torch.linspace(0.5, 2, len(rows), device=DEVICE)
    G = weight(W.shape, G_type, G_transposed, seed=5)
    z, s, factor, d_W, d_gamma = slow(W, u, gamma, rows, G, stop_gradient)
    found = measure(W, u, gamma, rows)
    assert {x.dtype for x in found} == {torch.float32}
    assert max(map(error, (found.z, found.s, found.factor), (z, s, factor))) < 1e-6
    our_d_W, our_d_gamma = scale_backward(G, W, found, rows, stop_gradient)
    assert our_d_W.dtype == W.dtype and our_d_W.stride() == W.stride()
    close = {torch.float32: 2e-6, torch.bfloat16: BF16, torch.float16: 2**-11}
    # <G, W> is a difference of large numbers: its error is relative to |G| |W|
    terms = torch.stack([(g * w).norm() for g, w in zip(G.double().split(rows), W.double().split(rows), strict=True)])
    assert ((our_d_gamma.double() - d_gamma).abs() <= 2e-6 * (d_gamma.abs() + terms / s)).all()
    whole = max(d_W.norm(), factor.max() * G.double().norm() * 0.1)
    assert ((our_d_W.double() - d_W).norm() / whole).item() < close[W.dtype]


@here
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sigma_and_backward(shape, transposed):
    check(weight(shape, transposed=transposed), (shape[0],))


@here
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [(5, 1, 59), (32, 16), (17, 300, 3)])
def test_blocks_of_unequal_rows(rows, transposed):
    check(weight((sum(rows), 80), transposed=transposed), rows, G_type=torch.bfloat16)


@here
@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_any_type(dtype, stop_gradient):
    check(weight((65, 129), dtype), (40, 25), stop_gradient=stop_gradient, G_type=torch.bfloat16)


@here
@pytest.mark.parametrize("size", [1e-15, 1e-7, 1e12])
def test_sigma_and_backward_at_any_size(size):
    check(weight((65, 129), size=size), (65,), G_type=torch.bfloat16)


@here
def test_a_gradient_laid_out_in_another_way_than_its_weight():
    check(weight((20, 33)), (20,), G_transposed=True)
    check(weight((20, 33), transposed=True), (8, 12), G_transposed=False)


@here
@pytest.mark.parametrize("length", [0.3, 7.0])
def test_an_average_of_several_u_is_not_of_length_one(length):
    check(weight((20, 33)), (8, 12), length=length)


@here
@pytest.mark.parametrize("tile", [Tile(8, 32, 4, 2), Tile(32, 128, 8, 128)])
def test_tiles_of_other_sizes_and_strips_of_several(tile, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tile)
    check(weight((65, 129)), (60, 5))
    check(weight((129, 65), transposed=True), (60, 69))
    W, u = weight((100, 70)), unit(100)
    truth = slow_power_iteration(W, u, 2)
    power_iteration_([W], [u], 2)
    assert error(u, truth) < 1e-6


@here
def test_a_weight_that_does_not_start_at_16_bytes():
    W = torch.empty(32 * 64 + 1, device=DEVICE)[1:].view(32, 64).copy_(weight((32, 64)))
    check(W, (32,))


@here
def test_twice_the_same_is_bitwise_the_same():
    rows = (90, 40)
    W, G, u = weight((130, 300)), weight((130, 300), torch.bfloat16, seed=3), units(rows)
    gamma = torch.tensor([0.5, 2.0], device=DEVICE)
    runs = []
    for _ in range(2):
        found = measure(W, u, gamma, rows)
        v = unit(130)
        power_iteration_([W], [v], 2)
        runs.append((*found, *scale_backward(G, W, found, rows, False), v))
    assert all(map(torch.equal, *runs))
