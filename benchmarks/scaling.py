"""How σReparam's cost goes with depth, width, length and processes: `python -m benchmarks.scaling`.

Translation models of fairseq, post-LN with and without σReparam, interleaved: the ratio of their step times along each axis
must not grow. `depth` counts the layers of encoder and decoder together; `processes` is DDP and FSDP2 over gloo (CPU) or
NCCL (GPUs), a process a device, in which every process does the whole batch.
"""

import gc
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.families import Family, Step
from benchmarks.models import translation
from benchmarks.paired import Report, arguments, interleave

PLAIN, OURS = "post-LN", "σReparam + post-LN"
AXES = {
    "depth": (6, 18, 50, 100, 200),
    "width": (64, 128, 256, 512, 1024),
    "length": (25, 100, 400, 1600),
    "processes": (1, 2),
}
ENGINES = ("ddp", "fsdp2")


def family(axis: str, value: int) -> tuple[Family, int]:
    """The models at a point of an axis, and the tokens of a step; the other axes stay at 12 layers, width 256, length 25."""
    usual = {"depth": 12, "width": 256, "length": 25}
    depth, width, length = (value if axis == name else usual[name] for name in usual)
    return translation(depth // 2, width, length), max(400, length)


def kept_for_backward(step: Step) -> int:
    """Bytes of the parameters and of every tensor that the forward pass saves."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in step.model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step.loss(step.model, step.batch)  # alive until it is counted, so that no address is used twice
    del loss
    return sum(storages.values())


def distributed(rank: int, world: int, engine: str, rounds: int, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=world)
    models, tokens = family("processes", world)
    steps = {}
    for label in (PLAIN, OURS):
        step = Step(models, label, tokens, here)
        if engine == "ddp":
            step.model = DistributedDataParallel(step.model)
        else:
            mesh = init_device_mesh(device, (world,))
            for layer in (*step.model.encoder.layers, *step.model.decoder.layers, step.model):
                fully_shard(layer, mesh=mesh)
        step.optimizer = torch.optim.Adam(step.model.parameters(), lr=1e-4)
        steps[label] = step
    times = interleave(steps, rounds, here, f"{engine}, {world} processes")
    if rank == 0:
        Path(folder, "times").write_text(json.dumps(times))
    dist.destroy_process_group()


def in_processes(engine: str, world: int, rounds: int, device: str) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        given = world, engine, rounds, device, folder
        mp.start_processes(distributed, given, nprocs=world, start_method="forkserver")
        return json.loads(Path(folder, "times").read_text())


def main() -> None:
    parser = arguments("scaling", __doc__, rounds=5)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="(default: all)")
    args = parser.parse_args()
    report = Report("scaling", args.device)
    for axis in args.axes:
        for value in AXES[axis]:
            if axis == "processes":
                if args.device.type == "cuda" and value > torch.cuda.device_count():
                    continue
                for engine in ENGINES:
                    times = in_processes(engine, value, args.rounds, args.device.type)
                    report.add(f"{engine}, {value} processes", times, [PLAIN], "ms a step", 1000)
                    report.save(args.out)
                continue
            models, tokens = family(axis, value)
            steps = {label: Step(models, label, tokens, args.device) for label in (PLAIN, OURS)}
            title = f"{axis} {value}, {tokens} tokens"
            report.add(title, interleave(steps, args.rounds, args.device, title), [PLAIN], "ms a step", 1000)
            memory = {label: [kept_for_backward(step)] for label, step in steps.items()}
            report.add(f"{title}: parameters, and what is kept for backward", memory, [PLAIN], "MB", 1e-6)
            report.save(args.out)
            steps.clear()
            gc.collect()  # parametrised modules are in reference cycles, and the next models would find no room


if __name__ == "__main__":
    main()
