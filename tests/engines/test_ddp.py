"""DistributedDataParallel: two processes end where one ends that has the whole batch, u and v included."""

import pytest
import torch

from tests.engines import ddp
from tests.engines.models import KINDS, REPARAMETRISED, alone, assert_same_run
from tests.engines.processes import agreed, spawn

WAYS = {
    "plain": KINDS,
    "no_broadcast": REPARAMETRISED,
    "gradient_accumulation": KINDS,
    "activation_checkpointing": [kind for kind in KINDS if kind != "nanogpt"],  # which has none, as upstream
    "recomputed": REPARAMETRISED,
    "zero": REPARAMETRISED,
    "compiled": ("sigma_vit", "stable_gpt"),  # test_compile.py has all
}
CASES = [(way, kind) for way, kinds in WAYS.items() for kind in kinds]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawn(ddp.run, CASES, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("way, kind", CASES)
def test_two_processes_are_one(ranks, way, kind):
    assert_same_run(agreed(ranks, way, kind), alone(kind))


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_the_broadcast_of_buffers_changes_nothing(ranks, kind):
    """It would hide a rank whose u and v went astray, and would break a backward pass that reads them."""
    broadcast, own = (agreed(ranks, way, kind) for way in ("plain", "no_broadcast"))
    assert not [name for name, tensor in broadcast.items() if not torch.equal(tensor, own[name])]
