"""QK-clip on two processes: all clip by the largest logit of all of them, and alike; as one process with the whole batch."""

import datetime

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from stable_core import sigma_reparam
from stable_monitor import QKClip
from tests.stable_monitor.models import batch, gpt

THRESHOLD = 0.02  # which a model that is not trained exceeds
ENGINES = ("DDP", "FSDP2", "FSDP2, σReparam")


def _trained(engine: str, rank: int | None) -> dict[str, torch.Tensor]:
    """The weights after two updates, with half of each batch, or, without a rank, with the whole one."""
    model = gpt()
    for block in model.h:
        block.attn.dropout = block.mlp[-1].p = 0.0
    if "σReparam" in engine:
        sigma_reparam(model)
    called = model
    if rank is not None and "FSDP2" in engine:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in model.h:
            fully_shard(block, mesh=mesh)
        called = fully_shard(model, mesh=mesh)
    elif rank is not None:
        called = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(called.parameters(), 0.1)
    QKClip(called, THRESHOLD, optimizer=optimizer)
    for step in range(2):
        called(*[x if rank is None else x[2 * rank : 2 * rank + 2] for x in batch(step)])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in model.state_dict().items()}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=limit)
    torch.save({engine: _trained(engine, rank) for engine in ENGINES}, f"{folder}/states{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_processes_clip_by_the_largest_of_all_and_alike(tmp_path):
    mp.start_processes(_worker, (str(tmp_path),), nprocs=2, start_method="forkserver")
    states = [torch.load(tmp_path / f"states{rank}") for rank in (0, 1)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for engine in ENGINES:
        torch.testing.assert_close(states[0][engine], _trained(engine, None), rtol=1e-4, atol=1e-5)
