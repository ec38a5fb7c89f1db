"""Sharded checkpoints of FSDP2, by torch.distributed.checkpoint: into as many processes, into one, and from one."""

import copy
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from stable_core import fold, fold_state_dict
from tests.engines import sharded_checkpoint
from tests.engines.models import KINDS, REPARAMETRISED, assert_same_run, batch, build, logits, train
from tests.engines.processes import agreed, spawn
from tests.engines.sharded_checkpoint import FIRST, adamw

every_kind = pytest.mark.parametrize("kind", KINDS)
every_reparametrised = pytest.mark.parametrize("kind", REPARAMETRISED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def before(folder, tmp_path_factory):
    """The processes that save."""
    cases = [(what, kind) for what in ("save", "go_on") for kind in KINDS]
    return spawn(partial(sharded_checkpoint.run, folder), cases, tmp_path_factory.mktemp("before"))


@pytest.fixture(scope="module")
def after(before, folder, tmp_path_factory):
    """Those that load."""
    for kind in KINDS:
        torch.save(trained(kind).state_dict(), folder / f"{kind}.pt")
    cases = [(what, kind) for what in ("resume", "spread") for kind in KINDS]
    return spawn(partial(sharded_checkpoint.run, folder), cases, tmp_path_factory.mktemp("after"))


def trained(kind: str) -> torch.nn.Module:
    """By one process, as far as the sharded run was when it saved."""
    model = build(kind)
    train(kind, model, adamw(model), FIRST)
    return model


def unsharded(kind: str, folder) -> dict:
    dcp_to_torch_save(folder / kind, folder / "whole.pt")
    return torch.load(folder / "whole.pt")


def different(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name, tensor in a.items() if not torch.equal(tensor, b[name])]


@every_kind
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(before, after, kind):
    resumed, straight = agreed(after, "resume", kind), agreed(before, "go_on", kind)
    assert different(resumed, straight) == []
    saved = agreed(before, "save", kind)
    assert different(resumed, saved)  # it went on


@every_kind
def test_one_process_loads_it(before, folder, kind):
    state, saved = unsharded(kind, folder)["model"], agreed(before, "save", kind)
    assert different(state, {name: saved[name] for name in state}) == []
    model, expected, (inputs, _) = build(kind, seed=9), trained(kind), batch(kind, 99)
    model.load_state_dict(state)
    assert_same_run(state, expected.state_dict())
    torch.testing.assert_close(logits(kind, model, inputs), logits(kind, expected, inputs), rtol=1e-4, atol=1e-4)


@every_reparametrised
def test_one_process_folds_it(before, folder, kind):
    state = unsharded(kind, folder)["model"]
    model, inputs = build(kind, seed=9), batch(kind, 99)[0]
    model.load_state_dict(state)
    expected = logits(kind, trained(kind), inputs)
    torch.testing.assert_close(logits(kind, fold(model), inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fold_state_dict(state), dict(model.state_dict()))


@every_kind
def test_a_whole_checkpoint_is_spread(after, kind):
    assert different(agreed(after, "spread", kind), trained(kind).state_dict()) == []


@pytest.mark.parametrize("kind", ["sigma_vit", "gpt2"])
def test_loading_the_model_and_then_the_optimizer(kind):
    """As Accelerate does under FSDP2. torch fills a new optimizer by a step with a learning rate of 0."""
    source = build(kind)
    source_optimizer = adamw(source)
    train(kind, source, source_optimizer, FIRST)
    saved = (
        copy.deepcopy(get_model_state_dict(source)),
        copy.deepcopy(get_optimizer_state_dict(source, source_optimizer)),
    )
    model = build(kind, seed=9)
    optimizer = adamw(model)
    set_model_state_dict(model, saved[0])
    set_optimizer_state_dict(model, optimizer, saved[1])
    assert different(model.state_dict(), saved[0]) == []


def test_saving_before_the_first_step():
    model = build("sigma_vit")
    start = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, adamw(model))
    assert different(model.state_dict(), start) == []
