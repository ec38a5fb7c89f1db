"""Two gloo processes on one machine, and what they leave behind.

Each file of tests starts two, for all of its cases. They are forked from a process that has imported what they need, which
takes seconds: timm, transformers and torch's compilers. Spawned ones would abort now and then when they end, as a thread of
gloo lets go of a tensor while Python finalizes (pytorch issue 190489).
"""

import multiprocessing
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WORLD = 2


def spawn(run: Callable[..., dict[str, Tensor]], cases: Iterable[tuple], folder: Path) -> list[dict]:
    """For each rank and case what `run(rank, *case)` returns, or the traceback of what it raises."""
    multiprocessing.set_forkserver_preload(["tests.engines.ddp", "tests.engines.sharded_checkpoint"])
    args = run, list(cases), folder.absolute()
    mp.start_processes(_process, args, nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _process(rank: int, run: Callable[..., dict[str, Tensor]], cases: list[tuple], folder: Path) -> None:
    torch.set_num_threads(1)
    # A rank that waits for a collective that the other does not call gives up.
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=patience)
    results = {}
    for case in cases:
        try:
            results[case] = run(rank, *case)
        except Exception:  # a test of another case must not fail for it
            results[case] = traceback.format_exc()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def agreed(ranks: list[dict], *case) -> dict[str, Tensor]:
    """The result of a case, bitwise the same on every rank."""
    results = [rank[case] for rank in ranks]
    for result in results:
        assert not isinstance(result, str), result
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert not [name for name, tensor in results[0].items() if not torch.equal(tensor, other[name])]
    return results[0]


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded one; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}
