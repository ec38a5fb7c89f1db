"""Mixed precision on the CPU: autocast to bfloat16 and float16, the latter with a loss scaler that skips steps.

σReparam's state is in fp32 all the time, and follows Algorithm 1 in fp64 of the weights that were trained.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from stable_core import converge, fold
from stable_core.reference import Algorithm1
from stable_core.targets import matrix
from tests.engines.models import KINDS, REPARAMETRISED, batch, build, mean_loss, reparametrised

every_reparametrised = pytest.mark.parametrize("kind", REPARAMETRISED)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def adamw(model: nn.Module, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4, **settings)


def new_scaler(init_scale: float = 2.0**10) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)


def step(kind: str, model: nn.Module, optimizer, dtype: torch.dtype | None, scaler=None) -> float:
    """One on the same batch each time, so that the loss falls."""
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = mean_loss(kind, model, *batch(kind, 0))
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.item()


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_in_fp32(kind, dtype):
    low, full = build(kind), build(kind)
    low_optimizer, full_optimizer, scaler = adamw(low), adamw(full), new_scaler() if dtype == "float16" else None
    curve = [
        (step(kind, low, low_optimizer, DTYPES[dtype], scaler), step(kind, full, full_optimizer, None))
        for _ in range(10)
    ]
    first, last = curve[0][1], curve[-1][1]
    assert last < 0.8 * first
    for ours, expected in curve:
        assert ours == pytest.approx(expected, abs=0.02 * first)
    assert {tensor.dtype for tensor in low.state_dict().values()} == {torch.float32}


def blocks_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """W and u of each sigma in fp64."""
    found = []
    for layer in reparametrised(model):
        W = torch.cat([matrix(W.detach(), layer.transposed) for W in layer.originals()])
        found += zip(W.split(layer.rows), layer.u.split(layer.rows), strict=True)
    return [tuple(tensor.double() for tensor in block) for block in found]


def next_iterates(model: nn.Module, state: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """One power iteration from the u of `state` with the weights that `model` has now, by Algorithm 1."""
    slow = [Algorithm1(W, torch.ones(1), u) for (W, _), (_, u) in zip(blocks_of(model), state, strict=True)]
    for block in slow:
        block.step()
    return [block.u for block in slow]


def assert_state(model: nn.Module, expected: list[Tensor]) -> None:
    """u as expected, in fp32, and so is sigma."""
    torch.testing.assert_close([u for _, u in blocks_of(model)], expected, rtol=0, atol=1e-6)
    sigmas = torch.cat([layer.sigma() for layer in reparametrised(model)])
    truth = torch.stack([(W.T @ u).norm() for W, u in blocks_of(model)])
    torch.testing.assert_close(sigmas.double(), truth, rtol=1e-6, atol=0)
    assert {tensor.dtype for layer in reparametrised(model) for tensor in layer.buffers()} == {torch.float32}


@every_dtype
@every_reparametrised
def test_u_follows_algorithm_1(kind, dtype):
    model = build(kind)
    optimizer, scaler = adamw(model), new_scaler() if dtype == "float16" else None
    for _ in range(4):
        before = blocks_of(model)
        step(kind, model, optimizer, DTYPES[dtype], scaler)
        assert_state(model, next_iterates(model, before))


@pytest.mark.parametrize("fused", [False, True], ids=["skipped outside", "skipped inside"])
@every_reparametrised
def test_a_skipped_step(kind, fused):
    """The scaler does not call most optimizers then. A fused one it calls, which then leaves the weights as they are: u
    has another iteration with them, which brings sigma nearer to the spectral norm."""
    model, skipped, taken = build(kind), 0, 0
    optimizer, scaler = adamw(model, fused=fused), new_scaler(init_scale=2.0**22)
    for _ in range(10):
        weights, before = [p.clone() for p in model.parameters()], blocks_of(model)
        scale = scaler.get_scale()
        step(kind, model, optimizer, torch.float16, scaler)
        unchanged = all(torch.equal(p, W) for p, W in zip(model.parameters(), weights, strict=True))
        assert unchanged == (scaler.get_scale() < scale)
        if unchanged and not fused:
            assert_state(model, [u for _, u in before])
        else:
            assert_state(model, next_iterates(model, before))
        if unchanged:
            skipped += 1
            for (W, u), (_, old) in zip(blocks_of(model), before, strict=True):
                assert (W.T @ old).norm() <= (W.T @ u).norm() + 1e-6 <= torch.linalg.matrix_norm(W, 2) + 2e-6
        else:
            taken += 1
    assert skipped > 1 and taken > 1


def changes(kind: str) -> list[dict[str, Tensor]]:
    """States of a model after a step of the optimizer, looking for u afresh, and folding."""
    model = build(kind)
    optimizer, states = adamw(model), []
    with torch.autocast("cpu", enabled=False):
        mean_loss(kind, model, *batch(kind, 0)).backward()
    for change in (lambda model: optimizer.step(), converge, fold):
        change(model)
        states.append(copy.deepcopy(model.state_dict()))
    return states


@every_dtype
@every_reparametrised
def test_inside_of_autocast_as_outside(kind, dtype):
    """Building a model too. Only the forward pass belongs there, but loops that do all of it there are not rare."""
    outside = changes(kind)
    with torch.autocast("cpu", DTYPES[dtype]):
        inside = changes(kind)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
