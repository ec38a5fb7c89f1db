"""The top singular vectors against singular values from an SVD in fp64."""

import pytest
import torch

from stable_core import power_iteration
from stable_core.power_iteration import top_singular_vectors


@pytest.fixture(autouse=True, params=["bidiagonalisation", "squaring, as on a GPU"])
def search(request, monkeypatch):
    """Both ways to search, on the CPU."""
    if request.param != "bidiagonalisation":
        monkeypatch.setattr(power_iteration, "_squares", lambda W: True)
    return request.param


SHAPES = ((384, 384), (1536, 384), (512, 2048), (768, 768), (768, 147), (1000, 512), (65, 5000), (5000, 65), (64, 3000))


def error(W, v=None):
    """How far u^T W v is from the largest singular value of W, relative to it."""
    u, v = top_singular_vectors(W, v)
    for x, size in ((u, W.shape[0]), (v, W.shape[1])):
        assert x.shape == (size,) and x.dtype == torch.float32
        assert x.norm().item() == pytest.approx(1, abs=1e-6)
    sigma = torch.linalg.svdvals(W.double())[0]
    return ((u.double() @ W.double() @ v.double() - sigma) / sigma).abs().item()


def gaussian(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def with_singular_values(S, m=500, n=400):
    U, V = (torch.linalg.qr(gaussian(size, len(S), seed).double())[0] for seed, size in enumerate((m, n)))
    return (U * S @ V.T).float()


def diagonal(values, m=500, n=1200):
    """Its singular vectors have one entry each, on which no rounding averages out."""
    return torch.zeros(m, n).fill_diagonal_(1.0) * values[:n]


def spread(width):
    return 1 + width * torch.rand(1200, generator=torch.Generator().manual_seed(0))


def entries(*values):
    W = torch.ones(1200)
    W[: len(values)] = torch.tensor(values)
    return W


@pytest.mark.parametrize("shape", SHAPES)
def test_random_matrices(shape):
    assert max(error(0.02 * gaussian(*shape, seed)) for seed in range(3)) <= 3e-4


@pytest.mark.parametrize("seed", [70277, 70344, 70712])
def test_starts_nearly_orthogonal_to_the_top_pair(seed):
    """After eight steps the second pair is the only one to be seen, within the tolerance."""
    assert error(gaussian(384, 384, seed)) <= 3e-4


HARD = {
    "orthogonal": lambda: with_singular_values(torch.ones(400)),
    "ten within 1e-3": lambda: with_singular_values(torch.cat([torch.linspace(1, 0.999, 10), torch.rand(390) * 0.9])),
    "steps of 1e-3": lambda: with_singular_values(torch.linspace(1, 0.6, 400)),
    "six decades": lambda: with_singular_values(torch.logspace(0, -6, 400)),
    "rank 7": lambda: gaussian(500, 7) @ gaussian(7, 400, 1),
    "rank 1": lambda: gaussian(500, 1) @ gaussian(1, 400, 1),
    "wide, rank 1": lambda: gaussian(70, 1) @ gaussian(1, 9000, 1),
    "equal entries": lambda: torch.ones(500, 400),
    "one entry": lambda: torch.zeros(500, 400).index_put_((torch.tensor(7), torch.tensor(9)), torch.tensor(3.0)),
    "padded with zeros": lambda: torch.nn.functional.pad(gaussian(90, 100), (0, 300, 0, 400)),
    "1e-20": lambda: 1e-20 * gaussian(500, 400),
    "1e20": lambda: 1e20 * gaussian(500, 400),
    "large columns": lambda: gaussian(500, 400) * torch.where(torch.arange(400) % 100 == 0, 30.0, 1.0),
    "identity": lambda: diagonal(entries()),
    "diagonal, one above": lambda: diagonal(entries(1.0038)),
    "diagonal, a few above": lambda: diagonal(entries(1.0038, *[1.002] * 12)),
    **{f"diagonal, {width}": lambda width=width: diagonal(spread(width)) for width in (0.004, 0.008, 0.02, 0.1)},
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", HARD)
def test_hard_matrices(kind, transposed):
    torch.manual_seed(0)
    W = HARD[kind]()
    assert error(W.T if transposed else W) <= 1e-3


def test_a_matrix_of_zeros(search):
    u, v = top_singular_vectors(torch.zeros(100, 80))
    assert not u.any() and v.isfinite().all()
    if search == "bidiagonalisation":  # which a later search starts from
        assert v.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("gap", [0.005, 0.02, 0.1])
def test_from_a_pair_that_is_no_longer_the_top_one(gap):
    U, S, Vt = torch.linalg.svd(gaussian(500, 400), full_matrices=False)
    S[:2] = 1.2 * S[0] * torch.tensor([1, 1 + gap])
    assert error(U * S @ Vt, Vt[0].clone()) <= 1e-3


def test_from_the_pair_of_a_matrix_nearby():
    W = gaussian(500, 400)
    _, v = top_singular_vectors(W)
    for seed in range(1, 6):
        W += 0.1 * gaussian(500, 400, seed)
        assert error(W, v) <= 1e-3
        _, v = top_singular_vectors(W, v)


def test_every_rank_finds_the_same_and_the_random_state_is_left_alone():
    W = gaussian(200, 300)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(top_singular_vectors(W))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
