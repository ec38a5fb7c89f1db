"""What each of two processes does in test_ddp.py."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from stable_core import recompute
from tests.engines.models import accumulated, build, checkpoint_activations, sgd, train
from tests.engines.processes import WORLD, whole_state


def plain(kind: str, rank: int, **settings) -> nn.Module:
    """Two forward passes before each backward pass, between which DDP broadcasts the buffers.

    Newer torch hides from autograd that it writes to them (pytorch issue 175024), older does not, and neither does this.
    """
    model = build(kind)
    with mock.patch.object(torch.autograd, "_unsafe_preserve_version_counter", lambda tensors: nullcontext()):
        train(kind, DistributedDataParallel(model, **settings), sgd(model), part=(rank, WORLD), micro_batches=2)
    return model


def without_exchange(called: DistributedDataParallel, losses: Iterator[Tensor]) -> None:
    """The gradients of the first micro-batch stay where they are until the last one's are exchanged."""
    with called.no_sync():
        next(losses).backward()
    accumulated(losses)


def gradient_accumulation(kind: str, rank: int) -> nn.Module:
    model = build(kind)
    called = DistributedDataParallel(model)
    backward = partial(without_exchange, called)
    train(kind, called, sgd(model), part=(rank, WORLD), micro_batches=2, backward=backward)
    return model


def activation_checkpointing(kind: str, rank: int) -> nn.Module:
    model = checkpoint_activations(build(kind))
    train(kind, DistributedDataParallel(model), sgd(model), part=(rank, WORLD), micro_batches=2, backward=accumulated)
    return model


def recomputed(kind: str, rank: int) -> nn.Module:
    model = recompute(build(kind))
    train(kind, DistributedDataParallel(model), sgd(model), part=(rank, WORLD), micro_batches=2)
    return model


def zero(kind: str, rank: int) -> nn.Module:
    """Each rank steps a part of the parameters, with an optimizer inside of another one, and sends them to the other."""
    model = build(kind)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    train(kind, DistributedDataParallel(model), optimizer, part=(rank, WORLD), micro_batches=2)
    return model


def compiled(kind: str, rank: int) -> nn.Module:
    model = build(kind)
    called = DistributedDataParallel(torch.compile(model, fullgraph=True, backend="aot_eager"))
    train(kind, called, sgd(model), part=(rank, WORLD), micro_batches=2, backward=accumulated)
    return model


WAYS = {
    "plain": plain,
    "no_broadcast": partial(plain, broadcast_buffers=False),
    "gradient_accumulation": gradient_accumulation,
    "activation_checkpointing": activation_checkpointing,
    "recomputed": recomputed,
    "zero": zero,
    "compiled": compiled,
}


def run(rank: int, way: str, kind: str) -> dict[str, Tensor]:
    return whole_state(WAYS[way](kind, rank))
