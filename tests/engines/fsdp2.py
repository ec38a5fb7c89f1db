"""What each of two processes does in test_fsdp2.py."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from stable_core import converge, recompute
from tests.engines.models import accumulated, blocks, build, checkpoint_activations, losses, reparametrised, sgd, train
from tests.engines.processes import WORLD, whole_state

SKIPPED = 3  # the step in which `scaled` meets an inf


def shard(model: nn.Module, mesh_shape: tuple[int, ...] = (WORLD,), **settings) -> nn.Module:
    """Each block, and the rest; in place."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for block in blocks(model):
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def plain(kind: str, rank: int, **settings) -> nn.Module:
    """Two forward passes before each backward pass."""
    model = shard(build(kind), **settings)
    train(kind, model, sgd(model), part=(rank, WORLD), micro_batches=2)
    return model


def along_the_last_even_dimension(parameter: nn.Parameter) -> Shard:
    """Inputs of Linear layers, outputs of Conv1D layers, columns of a convolution's kernel; 131 and 99 stay with the rows."""
    return Shard(next((d for d in reversed(range(parameter.ndim)) if parameter.shape[d] % WORLD == 0), 0))


def without_exchange(model: nn.Module, losses: Iterator[Tensor]) -> None:
    """The gradients of the first micro-batch stay where they are until the last one's are exchanged."""
    model.set_requires_gradient_sync(False)
    next(losses).backward()
    model.set_requires_gradient_sync(True)
    accumulated(losses)


def gradient_accumulation(kind: str, rank: int) -> nn.Module:
    model = shard(build(kind))
    train(kind, model, sgd(model), part=(rank, WORLD), micro_batches=2, backward=partial(without_exchange, model))
    return model


def activation_checkpointing(kind: str, rank: int) -> nn.Module:
    model = shard(checkpoint_activations(build(kind)))
    train(kind, model, sgd(model), part=(rank, WORLD), micro_batches=2, backward=accumulated)
    return model


def recomputed(kind: str, rank: int) -> nn.Module:
    model = recompute(shard(build(kind)))
    train(kind, model, sgd(model), part=(rank, WORLD), micro_batches=2)
    return model


def compiled(kind: str, rank: int) -> nn.Module:
    """Block by block, as FSDP2 wants it: it gathers parameters between the graphs."""
    model = build(kind)
    for block in blocks(model):
        block.compile(fullgraph=True, backend="aot_eager")
    shard(model)
    train(kind, model, sgd(model), part=(rank, WORLD), micro_batches=2, backward=accumulated)
    return model


def scaled(kind: str, rank: int) -> nn.Module:
    """A loss scaler that meets an inf in one rank's shard: both must skip the step, u too."""
    model = shard(build(kind))
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    gradient_of = next(p for p in model.parameters() if p.to_local().numel() > 100)
    for step in range(SKIPPED * 2 + 1):
        optimizer.zero_grad()
        scaler.scale(sum(losses(kind, model, step, (rank, WORLD)))).backward()
        if step == SKIPPED and rank == 1:
            gradient_of.grad.to_local().view(-1)[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    return model


def found_afresh(kind: str, rank: int, length: float) -> nn.Module:
    """A u that is none of the weight's: of length 1 for `converge`, of another for loading to notice."""
    model = plain(kind, rank)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith(".u"):
            tensor.copy_(length * tensor.roll(1, -1))
    model.load_state_dict(state)
    return converge(model) if length == 1 else model


BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS = {
    "plain": plain,
    "replicated": partial(plain, mesh_shape=(WORLD, 1)),
    "other_dimensions": partial(plain, shard_placement_fn=along_the_last_even_dimension),
    "gradient_accumulation": gradient_accumulation,
    "activation_checkpointing": activation_checkpointing,
    "recomputed": recomputed,
    "compiled": compiled,
    "scaled": scaled,
    "mixed_precision": partial(plain, mp_policy=BFLOAT16),
    "converged": partial(found_afresh, length=1.0),
    "averaged": partial(found_afresh, length=0.9),
}


def sigmas(model: nn.Module) -> dict[str, Tensor]:
    return {f"sigma {i}": layer.sigma() for i, layer in enumerate(reparametrised(model))}


def run(rank: int, way: str, kind: str) -> dict[str, Tensor]:
    model = WAYS[way](kind, rank)
    return {**whole_state(model), **sigmas(model)}
