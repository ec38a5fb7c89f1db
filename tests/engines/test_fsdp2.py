"""FSDP2: two processes that share the parameters end where one ends that has them all, u and v included."""

import pytest
import torch

from stable_core.targets import matrix
from tests.engines import fsdp2
from tests.engines.models import KINDS, REPARAMETRISED, alone, assert_same_run, build, reparametrised
from tests.engines.processes import agreed, spawn

SAME = {
    "plain": KINDS,
    "replicated": ("sigma_vit", "gpt2"),
    "other_dimensions": ("sigma_vit", "sigma_gpt", "gpt2"),
    "gradient_accumulation": REPARAMETRISED,
    "activation_checkpointing": ("sigma_vit", "sigma_gpt", "gpt2"),
    "recomputed": REPARAMETRISED,
    "compiled": ("sigma_vit", "gpt2"),
}
FRESH = {"converged": ("sigma_vit", "gpt2"), "averaged": ("sigma_vit", "gpt2")}
OTHER = {"scaled": REPARAMETRISED, "mixed_precision": KINDS}


def pairs(ways: dict) -> list[tuple[str, str]]:
    return [(way, kind) for way, kinds in ways.items() for kind in kinds]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawn(fsdp2.run, pairs(SAME | FRESH | OTHER), tmp_path_factory.mktemp("fsdp2"))


def with_sigmas(kind: str, state: dict) -> dict:
    """What `fsdp2.run` returns."""
    model = build(kind)
    model.load_state_dict(state)
    return {**state, **fsdp2.sigmas(model)}


@pytest.mark.parametrize("way, kind", pairs(SAME))
def test_two_processes_are_one(ranks, way, kind):
    assert_same_run(agreed(ranks, way, kind), with_sigmas(kind, alone(kind)))


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_skipped_step_never_was(ranks, kind):
    steps = tuple(step for step in range(2 * fsdp2.SKIPPED + 1) if step != fsdp2.SKIPPED)
    assert_same_run(agreed(ranks, "scaled", kind), with_sigmas(kind, alone(kind, steps)))


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_is_near(ranks, kind):
    """bfloat16 parameters are gathered for the layers; those that are stepped, and all of σReparam's state, stay in fp32."""
    state, expected, start = agreed(ranks, "mixed_precision", kind), alone(kind), build(kind).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}

    def distance(a: dict, b: dict) -> torch.Tensor:
        return torch.cat([(a[name] - b[name]).flatten() for name in expected if not name.endswith(".u")]).norm()

    assert 1e-3 < distance(state, expected) / distance(start, expected) < 0.05  # 0 would be fp32


@pytest.mark.parametrize("way, kind", pairs(FRESH))
def test_u_and_v_are_found_afresh(ranks, way, kind):
    """By `converge`, and in loading a state dict that is an average: every sigma is then the spectral norm."""
    found, model = agreed(ranks, way, kind), build(kind)
    model.load_state_dict(alone(kind))
    norms = {}
    for i, layer in enumerate(reparametrised(model)):
        W = torch.cat([matrix(W.detach(), layer.transposed) for W in layer.originals()])
        norms[f"sigma {i}"] = torch.stack([torch.linalg.matrix_norm(block, 2) for block in W.split(layer.rows)])
    torch.testing.assert_close({name: found[name] for name in norms}, norms, rtol=1e-3, atol=0)
