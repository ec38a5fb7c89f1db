"""The record file: killed, resumed, and written by one of several processes; and the other writers."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from stable_monitor import AlarmConfig, EntropyCollapse, Monitor, TensorBoardWriter, WandbWriter, stop_training
from stable_monitor.records import read
from stable_monitor.report import report
from tests.stable_monitor.models import batch, gpt, train

ROOT = Path(__file__).parents[2]


def steps(path) -> list[int]:
    return [record["step"] for record in read(path)]


def test_kill_9_loses_at_most_the_record_being_written(tmp_path):
    script = f"""
from stable_monitor import Monitor
from tests.stable_monitor.models import gpt, train
train(gpt(), 10**6, lambda called, _: Monitor(called, 1, path={str(tmp_path)!r}))
"""
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    file = tmp_path / "monitor.jsonl"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    lines = file.read_bytes().count(b"\n")
    assert steps(tmp_path) == list(range(lines))

    # As it would be had the kill come in the middle of a write; the resumed run goes on from there.
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 40])
    assert steps(tmp_path) == list(range(lines - 1))
    report([tmp_path], tmp_path / "report.html")  # opens on what is left
    assert 'id="' in (tmp_path / "report.html").read_text()
    train(gpt(), 2, lambda called, _: Monitor(called, 1, path=tmp_path, step=lines - 1))
    assert steps(tmp_path) == list(range(lines + 1))


def test_a_run_resumed_from_an_earlier_checkpoint_replaces_what_it_repeats(tmp_path):
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def monitor(path, step=0):
        return lambda called, optimizer: Monitor(called, 2, path=path, step=step, optimizer=optimizer)

    train(model, 4, monitor(tmp_path / "resumed"), optimizer)
    saved = {name: state.state_dict() for name, state in (("model", model), ("optimizer", optimizer))}
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(model, 5, monitor(tmp_path / "resumed", 4), optimizer, first=4)

    model = gpt(seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    saved = torch.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, 3, monitor(tmp_path / "resumed", 4), optimizer, first=4)
    assert steps(tmp_path / "resumed") == [0, 2, 4, 6]

    model = gpt()
    train(model, 7, monitor(tmp_path / "whole"))
    resumed, whole = (read(tmp_path / name) for name in ("resumed", "whole"))
    for a, b in zip(resumed, whole, strict=True):
        for key in ("loss", "lr", "grad_l2", "grad_linf"):
            assert a[key] == b[key]
        for name, layer in b["layers"].items():
            sigma, expected = a["layers"][name].pop("sigma"), layer.pop("sigma")
            assert a["layers"][name] == layer
            assert sigma == pytest.approx(expected, rel=2e-3)  # iterations that start elsewhere


def test_a_file_may_be_named(tmp_path):
    train(gpt(), 1, lambda called, _: Monitor(called, 1, path=tmp_path / "deep" / "run.jsonl"))
    assert steps(tmp_path / "deep" / "run.jsonl") == [0]


def _worker(rank: int, folder: str, how: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = gpt()
    if how == "FSDP2":
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in model.h:
            fully_shard(block, mesh=mesh)
        called = fully_shard(model, mesh=mesh)
    elif how == "FSDP1":
        called = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        called = torch.nn.parallel.DistributedDataParallel(model)
    seen = []
    train(model, 3, lambda c, _: Monitor(c, 2, path=folder, writers=[seen.append]), called=called)
    assert len(seen) == (2 if rank == 0 else 0)
    _stop_together(rank, called)
    dist.destroy_process_group()


def _stop_together(rank: int, called) -> None:
    """Rank 0 sees a collapse, and both stop."""
    monitor = Monitor(called, 1, on_alarm=stop_training, alarm=AlarmConfig(logit=0))
    monitor._watch.look({"step": 0, "layers": {"h.0.attn": {"entropy": [1e6 if rank == 0 else 0.0], "bound": [0.0]}}})
    _, loss = called(*batch(0))
    loss.backward()
    with pytest.raises(EntropyCollapse, match=r"h\.0\.attn"):
        monitor.step(loss)


@pytest.mark.parametrize("how", ["FSDP2", *(pytest.param(how, marks=pytest.mark.slow) for how in ("DDP", "FSDP1"))])
def test_two_processes_write_one_file(tmp_path, how):
    mp.start_processes(_worker, (str(tmp_path), how), nprocs=2, start_method="forkserver")
    alone = []
    train(gpt(), 3, lambda called, _: Monitor(called, 2, writers=[alone.append]))  # both ranks have the same batches
    records = read(tmp_path)
    assert [record["step"] for record in records] == [0, 2]
    for record, expected in zip(records, alone, strict=True):
        gradient = (
            None if how == "FSDP1" else pytest.approx(expected["grad_l2"], rel=1e-3)
        )  # there each has flat shards
        assert record["grad_l2"] == gradient
        assert list(record["layers"]) == ["h.0.attn", "h.1.attn"]
        for name, layer in record["layers"].items():
            assert layer["entropy"] == pytest.approx(expected["layers"][name]["entropy"], abs=1e-3)
            assert layer["sigma"] == pytest.approx(expected["layers"][name]["sigma"], rel=1e-3)
            gradient = pytest.approx(expected["layers"][name]["grad_linf"], rel=1e-3)
            assert layer["grad_linf"] == (None if how == "FSDP1" else gradient)


def test_tensorboard(tmp_path):
    records = []
    writers = [TensorBoardWriter(tmp_path), records.append]
    train(gpt(), 3, lambda called, optimizer: Monitor(called, 2, optimizer=optimizer, writers=writers))
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, value in (
        ("loss", lambda r: r["loss"]),
        ("entropy/h.1.attn", lambda r: sum(r["layers"]["h.1.attn"]["entropy"]) / 4),
        ("entropy_min/h.1.attn", lambda r: min(r["layers"]["h.1.attn"]["entropy_min"])),
        ("max_logit/h.0.attn", lambda r: max(r["layers"]["h.0.attn"]["max_logit"])),
        ("sigma_out/h.0.attn", lambda r: r["layers"]["h.0.attn"]["sigma"]["out"]),
    ):
        points = events.Scalars(tag)
        assert [point.step for point in points] == [0, 2]
        assert [point.value for point in points] == pytest.approx([value(r) for r in records], rel=1e-5)


def test_wandb(monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run, init=None))
    model = gpt()
    monitor = Monitor(model, 1, writers=[WandbWriter()])
    _, loss = model(*batch(0))
    loss.backward()
    monitor.step(loss)
    assert logged[0]["update"] == 0 and logged[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged[0]["grad_l2/h.0.attn"] > 0 and logged[0]["alarms"] == 0
