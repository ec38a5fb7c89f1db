"""What an accelerator alone can tell of a piece of work. Each has a twin on the CPU, so that code that asks runs there too."""

import gc
import json
import resource
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHED = ("kernel", "gpu_memcpy", "gpu_memset")  # what a trace calls the work of a GPU


@dataclass(frozen=True)
class Trace:
    """What ran on the device: how many launches, for how many seconds together, and those that took longest, by name."""

    launches: int
    busy: float
    longest: dict[str, float]


def trace(work: Callable[[], object], device: torch.device, keep: int = 30) -> Trace:
    """Of one call. On the CPU operators are counted, those within others too."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [event for event in events if event.get("cat") in (LAUNCHED if on_gpu else ("cpu_op",))]
    by_name = Counter()
    for event in events:
        by_name[event["name"][:100]] += event["dur"] / 1e6
    return Trace(len(events), sum(by_name.values()), dict(by_name.most_common(keep)))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the device; on the CPU the most that the process had so far."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else _most_resident()


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call takes beyond what is there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = allocated(device)
    work()
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else _most_resident()) - before


def _most_resident() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def graphed(work: Callable[[], object], device: torch.device, warm_up: int = 3) -> Callable[[], object]:
    """`work`, called `warm_up` times and then captured in a CUDA graph: what replays it. On the CPU nothing is captured."""
    if device.type != "cuda":
        for _ in range(warm_up):
            work()
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def clear(device: torch.device) -> None:
    """Parametrised modules are in reference cycles, and the next models would find no room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
