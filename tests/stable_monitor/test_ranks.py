"""A monitor on some of the processes: none waits for one that has none, and all of them finish."""

import datetime
import logging

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from stable_monitor import Monitor
from stable_monitor.alarm import Alarm
from stable_monitor.records import read
from tests.stable_monitor.models import gpt, train

LIMIT = datetime.timedelta(seconds=15)


def _called(model, how: str):
    if how == "FSDP2":
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in model.h:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    called = nn.parallel.DistributedDataParallel(model)
    return torch.compile(called, backend="aot_eager") if how == "compiled DDP" else called


def _worker(rank: int, folder: str, how: str, where: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(filename=f"{folder}/log{rank}")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=LIMIT)
    model, heard = gpt(), []
    called = _called(model, how)

    def monitor(called, optimizer):
        made = Monitor(called, 2, path=folder, optimizer=optimizer, on_alarm=lambda alarm: heard.append(alarm.layer))
        look = made._watch.look
        alarm = Alarm(2, f"of rank {rank}", 0.0, 0.1, 1.0, 0.0)
        made._watch.look = lambda record: [*look(record), *([alarm] if record["step"] == 2 else [])]
        return made

    torch.save(train(model, 5, monitor if rank in where else None, called=called), f"{folder}/losses{rank}")
    torch.save(heard, f"{folder}/heard{rank}")
    dist.barrier()
    dist.destroy_process_group()


def run(folder, how: str, *where: int):
    mp.start_processes(_worker, (str(folder), how, where), nprocs=2, start_method="forkserver")
    losses, heard = ([torch.load(folder / f"{what}{rank}") for rank in (0, 1)] for what in ("losses", "heard"))
    assert losses[0] == pytest.approx(train(gpt(), 5), abs=1e-4)
    return heard, (folder / "log0").read_text()


@pytest.mark.parametrize(
    "how", ["DDP", *(pytest.param(how, marks=pytest.mark.slow) for how in ("FSDP2", "compiled DDP"))]
)
def test_rank_0_alone_records_what_needs_no_other(tmp_path, how):
    heard, log = run(tmp_path, how, 0)
    records, alone = read(tmp_path), []
    train(gpt(), 5, lambda called, _: Monitor(called, 2, writers=[alone.append]))
    assert [record["step"] for record in records] == [0, 2, 4]
    for record, expected in zip(records, alone, strict=True):
        for name, layer in expected["layers"].items():
            assert record["layers"][name]["sigma"] == pytest.approx(layer["sigma"], rel=2e-3)
            assert record["layers"][name]["entropy"] == pytest.approx(layer["entropy"], abs=1e-3)
        gradient = None if how == "FSDP2" else pytest.approx(expected["grad_l2"], rel=1e-3)
        assert record["grad_l2"] == gradient
    assert heard == [["of rank 0"], []]
    assert log.count("on_alarm is not called on every rank, as some have no monitor: construct it on every rank") == 1
    assert log.count("construct it on every rank") == (2 if how == "FSDP2" else 1)


def test_another_rank_alone_acts_by_itself(tmp_path):
    heard, _ = run(tmp_path, "DDP", 1)
    assert heard == [[], ["of rank 1"]] and not (tmp_path / "monitor.jsonl").exists()


@pytest.mark.parametrize("how", ["DDP", pytest.param("FSDP2", marks=pytest.mark.slow)])
def test_together_all_do_what_rank_0_decides(tmp_path, how):
    heard, log = run(tmp_path, how, 0, 1)
    assert heard == [["of rank 0"], ["of rank 0"]] and "construct it on every rank" not in log
    assert all(record["grad_l2"] > 0 for record in read(tmp_path))
