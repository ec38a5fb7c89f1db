"""Two gloo processes against one: the same parameters, u and v on every rank and as in the run with the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from stable_core import SigmaReparamConfig, advance, recompute, sigma_reparam
from stable_core.sigma_reparam import JointMember, SigmaReparam
from tests.stable_core.models import alive_after_forward

STEPS, WORLD = 5, 2


class Conv1D(nn.Module):
    """As transformers has it, (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(70, 73))

    def forward(self, x):
        return x @ self.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(70, 70) for _ in range(3))
        self.packed = nn.MultiheadAttention(70, 2, batch_first=True)
        self.conv = nn.Conv1d(70, 70, 3, padding=1)

    def forward(self, x):
        x = nn.functional.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return self.conv(self.packed(x, x, x)[0].mT).mT


def build(qkv: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Conv1D(), nn.Linear(73, 71))
    return sigma_reparam(model, SigmaReparamConfig(qkv=qkv, n_power_iterations=2))


def train(model: nn.Module, rank: int | None) -> None:
    """Two forwards before each backward, between which DDP broadcasts the buffers; every rank sees its half."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(2 * WORLD, 6, 70, generator=generator)
        if rank is not None:
            x = x.chunk(WORLD)[rank]
        loss = model(x).square().mean() + model(2 * x).sin().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def worker(rank: int, engine: str, qkv: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=WORLD)
    model = build(qkv)
    if engine == "ddp":
        train(nn.parallel.DistributedDataParallel(model), rank)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.debug import CommDebugMode

        mesh = init_device_mesh("cpu", (WORLD,))

        def columns(parameter: nn.Parameter) -> Shard:
            return Shard(1 if parameter.ndim > 1 and parameter.shape[1] % WORLD == 0 else 0)

        for layer in model:
            fully_shard(layer, mesh=mesh, shard_placement_fn=columns if engine == "fsdp2 by columns" else None)
        fully_shard(model, mesh=mesh)
        if engine == "fsdp2 recomputed":
            recompute(model)
        train(model, rank)
        weights = sum(1 for module in model.modules() if isinstance(module, SigmaReparam | JointMember))
        alive = alive_after_forward(model, torch.randn(2, 6, 70, requires_grad=True))
        assert alive == (
            0 if engine == "fsdp2 recomputed" else weights
        )  # of the shards, each process would keep the whole
        state = copy.deepcopy(model.state_dict())
        with CommDebugMode() as messages:
            advance(model.parameters())
        if engine == "fsdp2":  # by columns, the convolution's kernel is gathered
            assert messages.get_total_counts() == 2 * 2, "two for the whole model, in each of the two power iterations"
        model.load_state_dict(state)
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    torch.save(state, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("engine", "qkv"),
    [
        ("ddp", "separate"),
        ("fsdp2", "joint"),
        ("fsdp2 by columns", "separate"),
        ("fsdp2 recomputed", "joint"),
        pytest.param("ddp", "joint", marks=pytest.mark.slow),
        pytest.param("fsdp2", "separate", marks=pytest.mark.slow),
        pytest.param("fsdp2 by columns", "joint", marks=pytest.mark.slow),
        pytest.param("fsdp2 recomputed", "separate", marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one(engine, qkv, tmp_path):
    mp.start_processes(worker, (engine, qkv, str(tmp_path)), nprocs=WORLD, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    alone = build(qkv)
    untrained = copy.deepcopy(alone.state_dict())
    train(alone, None)
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)
        moved = not torch.allclose(value, untrained[key], atol=1e-6)
        assert moved or key.endswith(("bias", "_extra_state")), f"{key} did not move"
