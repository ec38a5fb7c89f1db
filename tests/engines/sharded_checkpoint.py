"""What each of two processes does in test_sharded_checkpoint.py."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from stable_core import param_groups
from tests.engines.fsdp2 import shard
from tests.engines.models import KINDS, build, train
from tests.engines.processes import WORLD, whole, whole_state

FIRST, LAST = range(3), range(3, 6)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """eps is large, as a bias of keys has no gradient but rounding errors, which Adam would magnify."""
    return torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1, gamma_lr_scale=2.0), eps=1e-4)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, u, v, and the optimizer's state of each parameter."""
    moments = state_of(model, optimizer)["optimizer"]["state"]
    moments = {f"{name} {what}": whole(x) for name, entry in moments.items() for what, x in entry.items()}
    return {**whole_state(model), **moments}


def run(folder: Path, rank: int, what: str, kind: str) -> dict[str, Tensor]:
    return {"save": save, "go_on": go_on, "resume": resume, "spread": spread}[what](rank, kind, folder)


def save(rank: int, kind: str, folder: Path) -> dict[str, Tensor]:
    model = shard(build(kind))
    optimizer = adamw(model)
    train(kind, model, optimizer, FIRST, (rank, WORLD))
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / kind)
    return everything(model, optimizer)


def go_on(rank: int, kind: str, folder: Path) -> dict[str, Tensor]:
    """The run that never stopped, nor saved."""
    model = shard(build(kind))
    optimizer = adamw(model)
    train(kind, model, optimizer, [*FIRST, *LAST], (rank, WORLD))
    return everything(model, optimizer)


def resume(rank: int, kind: str, folder: Path) -> dict[str, Tensor]:
    """In a new process, into a model from another seed."""
    model = shard(build(kind, seed=9))
    optimizer = adamw(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / kind)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(kind, model, optimizer, LAST, (rank, WORLD))
    return everything(model, optimizer)


def spread(rank: int, kind: str, folder: Path) -> dict[str, Tensor]:
    """A whole state dict, which rank 0 alone reads, into a sharded model that has no values yet."""
    with torch.device("meta"):
        model = KINDS[kind]()
    shard(model).to_empty(device="cpu")
    state = torch.load(folder / f"{kind}.pt") if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    return whole_state(model)
