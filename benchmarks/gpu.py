"""Everything that a GPU must say, in less than ten minutes: `python -m benchmarks.gpu --out DIR`.

Correctness against float64 on the CPU; step time, peak memory and launches of ours beside what a user would take instead,
eager and compiled, from launch-bound to compute-bound; the monitor, the entropy, CUDA graphs. It needs no network, no
fairseq and no installation: `PYTHONPATH=.:plugins python3 -m benchmarks.gpu --out DIR` in a bare checkout. What matters most
comes first. A section that fails is reported, and the others go on; each adds to DIR/gpu.json, gpu.txt and gpu.png. Models
learn from random batches, as no text comes with a checkout: times, not losses, are what is measured.
`--tiny --device cpu` runs the same code with tiny models, so that no typo costs minutes of a GPU.
"""

import argparse
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import families, hf_translation
from benchmarks.accelerator import allocated, clear, graphed, peak, trace, wait
from benchmarks.attention import HEAD_DIM, dense_entropy
from benchmarks.families import Family, Step, reparametrised_bytes
from benchmarks.gpu_checks import Finding, apart, findings
from benchmarks.paired import Report, device_named, interleave_within
from benchmarks.watching import watching
from stable_core import attention_entropy, attention_statistics

TO_COMPILE = 75.0  # seconds that must be left for a model to be compiled
TO_BEGIN = 15.0  # and for a section to begin
FEW = ["pre-LN", "σReparam + pre-LN", "σReparam, no LayerNorm"]


@dataclass(frozen=True)
class Bench:
    """What the sections share; `end` is when time is over."""

    report: Report
    device: torch.device
    tiny: bool
    end: float

    def left(self) -> float:
        return self.end - time.monotonic()

    def sized(self, full, tiny):
        """A setting, which is another where only the code is tried."""
        return tiny if self.tiny else full

    def measure(self, work: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
        return interleave_within(work, self.sized(budget, 0.0), self.device, self.sized(0.15, 0.0))

    def judge(self, title: str, found: Iterable[Finding]) -> None:
        """A table of distances; raises AssertionError where one is too large."""
        found = list(found)
        limits = {name: limit for name, _, limit in found}
        self.report.add(title, {name: [far] for name, far, _ in found}, [], "|a - b| / |b|", 1, {"at most": limits})
        wrong = [f"{name}: {far:.3g}" for name, far, limit in found if not far <= limit]
        assert not wrong, f"too far apart: {'; '.join(wrong)}"


# --------------------------------------------------------------------------------------------------- the models


def gpt(bench: Bench) -> Family:
    """GPT-2 124M, sequences of 1,024 tokens."""
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 64}
    return families.gpt(bench.sized(1024, 16), **bench.sized({}, tiny))


def vit(bench: Bench, size: str) -> Family:
    tiny = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 64}
    return families.vit(size, **bench.sized({}, tiny))


def translation(bench: Bench, layers: int) -> Family:
    return hf_translation.translation(*bench.sized((layers, 512, 25, 8000), (1, 32, 5, 64)))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


class Muons:
    """torch's Muon for the matrices of GPT's blocks and fused AdamW for the rest."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
        known = set(map(id, matrices))
        others = [p for p in model.parameters() if id(p) not in known]
        self.parts = torch.optim.Muon(matrices, lr=1e-4), torch.optim.AdamW(others, lr=1e-4, fused=True)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def compare(
    bench: Bench,
    title: str,
    family: Family,
    sizes: list[int],
    budget: float,
    labels: list[str] | None = None,
    *,
    autocast: bool = True,
    optimizer: Callable = adamw,
    compiled: bool = False,
) -> None:
    """A table for each size, the largest first. Raises RuntimeError after them where a model did not run at all."""
    family = family.on(bench.device, labels)
    steps, held, first, failed = {}, {}, {}, []
    compiler = bench.sized("inductor", "aot_eager") if compiled else None
    for label in family.variants:
        if compiled and bench.left() < bench.sized(TO_COMPILE, 0.0):
            failed.append(f"{label}: no time left to compile it")
            continue
        before, begin = allocated(bench.device), time.monotonic()
        try:
            step = Step(family, label, sizes[0], bench.device, autocast, optimizer, compiler)
            step()
            step()
            wait(bench.device)
        except TimeoutError:
            raise
        except Exception as error:  # out of memory, whatever the compiler raises: the others are worth their minutes
            failed.append(f"{label}: {last_line(error)}")
            continue
        steps[label], held[label] = step, allocated(bench.device) - before
        first[label] = time.monotonic() - begin
    for size in sizes:
        losses, peaks, traces = {}, {}, {}
        for label, step in steps.items():
            step.feed(family, size)
            losses[label] = step().item()
            peaks[label] = held[label] + peak(step, bench.device)
            traces[label] = trace(step, bench.device)
        columns = {
            "launches": {label: one.launches for label, one in traces.items()},
            "GPU busy, ms": {label: 1000 * one.busy for label, one in traces.items()},
            "peak, MB": {label: one / 1e6 for label, one in peaks.items()},
            "copies of W": dict(copies(family, steps, peaks)),
            "loss": losses,
        }
        if compiled:
            columns["first steps, s"] = first
        bases = [base for base in family.bases if base in steps]
        times = bench.measure(steps, budget / len(sizes))
        bench.report.add(f"{title}, {size} {family.unit}", times, bases, "ms a step", 1000, columns)
        for row in bench.report.rows[-len(times) :]:
            row["longest"] = traces[row["name"]].longest
    if failed:
        raise RuntimeError("; ".join(failed))


def copies(family: Family, steps: dict[str, Step], peaks: dict[str, int]) -> Iterator[tuple[str, float]]:
    """How much more memory than its plain one each takes, in copies of its reparametrised weights in fp32."""
    for label, step in steps.items():
        plain = next((base for base in family.bases if label.endswith(base)), family.bases[0])
        size = reparametrised_bytes(step.model)
        if size and plain in peaks:
            yield label, (peaks[label] - peaks[plain]) / size


# ------------------------------------------------------------------------------------------------- the sections


def ceilings(bench: Bench) -> None:
    """What the card itself does at most, how long it takes to ask it for something, and whether the profiler sees it."""
    n, width, many = bench.sized(2**28, 2**20), bench.sized(8192, 128), 1000
    x, y = torch.randn(2, n, device=bench.device)
    a, b = torch.randn(2, width, width, device=bench.device, dtype=torch.bfloat16)
    one = torch.zeros(1, device=bench.device)
    times = bench.measure(
        {"copy": lambda: y.copy_(x), "product": lambda: a @ b, "asking": lambda: [one.add_(1) for _ in range(many)]},
        3.0,
    )
    add = bench.report.add
    add("memory, read and written", {"copy of fp32": [8 * n / t for t in times["copy"]]}, [], "TB/s", 1e-12)
    add("arithmetic", {f"{width}^3 in bf16": [2 * width**3 / t for t in times["product"]]}, [], "TFLOP/s", 1e-12)
    add("eager calls", {"add of one number": [t / many for t in times["asking"]]}, [], "µs", 1e6)
    seen = trace(one.neg_, bench.device).launches
    assert seen == 1, f"the profiler saw {seen} launches of one: the launches below are wrong"


def correctness(bench: Bench) -> None:
    bench.judge("against float64 on the CPU", findings(bench.device))


def gpt_eager(bench: Bench) -> None:
    compare(bench, "GPT-2 124M, bf16, eager", gpt(bench), bench.sized([16384, 256], [32, 8]), 30)


def gpt_compiled(bench: Bench) -> None:
    compare(bench, "GPT-2 124M, bf16, compiled", gpt(bench), [bench.sized(16384, 32)], 12, FEW, compiled=True)


def gpt_fp32(bench: Bench) -> None:
    compare(bench, "GPT-2 124M, fp32, eager", gpt(bench), [bench.sized(4096, 32)], 10, FEW, autocast=False)


def gpt_muon(bench: Bench) -> None:
    compare(bench, "GPT-2 124M, bf16, Muon", gpt(bench), [bench.sized(16384, 32)], 10, FEW, optimizer=Muons)


def translation_6l(bench: Bench) -> None:
    compare(bench, "6L-6L of 512, bf16, eager", translation(bench, 6), bench.sized([12800, 400], [20, 5]), 16)


def translation_18l(bench: Bench) -> None:
    labels = ["pre-LN", "post-LN", "σReparam, no LayerNorm", "σReparam + post-LN"]
    labels += [
        "torch spectral_norm + post-LN",
        "plain Algorithm 1 + post-LN",
    ]  # those few: a σReparam of 288 takes seconds
    sizes = bench.sized([12800, 400], [20, 5])
    compare(bench, "18L-18L of 512, bf16, eager", translation(bench, 18), sizes, 20, labels)


def vit_small(bench: Bench) -> None:
    compare(bench, "ViT-S, bf16, eager", vit(bench, "small"), bench.sized([256, 8], [4, 2]), 16)


def vit_base(bench: Bench) -> None:
    compare(bench, "ViT-B, bf16, eager", vit(bench, "base"), bench.sized([128, 8], [4, 2]), 16)


def vit_base_compiled(bench: Bench) -> None:
    compare(bench, "ViT-B, bf16, compiled", vit(bench, "base"), [bench.sized(128, 4)], 8, FEW, compiled=True)


def gpt_small_compiled(bench: Bench) -> None:
    compare(bench, "GPT-2 124M, bf16, compiled", gpt(bench), [bench.sized(256, 8)], 8, FEW, compiled=True)


def monitor(bench: Bench) -> None:
    """A record every update, every tenth and every hundredth."""
    cases = [
        ("GPT-2 124M, bf16, eager", gpt(bench), bench.sized(16384, 32)),
        ("ViT-S, bf16, eager", vit(bench, "small"), bench.sized(256, 4)),
    ]
    for title, family, size in cases:
        step = Step(family.on(bench.device, FEW), FEW[1], size, bench.device, True, adamw)
        step()
        times, between = watching(step, [1, 10, 100], partial(bench.measure, budget=6.0))
        times["Monitor.step between records"] = [between] * len(times["plain"])
        bench.report.add(f"the monitor, {title}, {size} {family.unit}", times, ["plain"], "ms an update", 1000)


def entropy(bench: Bench) -> None:
    heads = bench.sized(8, 2)
    for tokens in bench.sized([1024, 2048, 4096, 8192, 16384], [16, 32]):
        q, k = torch.randn(2, 1, heads, tokens, HEAD_DIM, device=bench.device)
        work = {
            "dense formula": partial(dense_entropy, q, k),
            "attention_entropy": partial(attention_entropy, q, k, scale=HEAD_DIM**-0.5),
            "attention_statistics": partial(attention_statistics, q, k, scale=HEAD_DIM**-0.5),
            "... by torch's operators": partial(attention_statistics, q, k, scale=HEAD_DIM**-0.5, kernels="torch"),
        }
        for one in work.values():
            one()
        columns = {
            "peak, MB": {name: peak(one, bench.device) / 1e6 for name, one in work.items()},
            "launches": {name: trace(one, bench.device).launches for name, one in work.items()},
        }
        title = f"entropy, {heads} heads of {HEAD_DIM}, {tokens} tokens"
        bench.report.add(title, bench.measure(work, 2.0), ["dense formula"], "ms", 1000, columns)


def graphs(bench: Bench) -> None:
    """Whole steps in CUDA graphs: the same models afterwards, in less time."""
    family, size = gpt(bench).on(bench.device, FEW), bench.sized(256, 8)
    capturable = bench.device.type == "cuda"

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=capturable)

    work, found, kept = {}, [], []  # a graph reads and writes memory that is nobody's once its model is gone
    for label in FEW:
        eager, captured = (Step(family, label, size, bench.device, True, optimizer) for _ in range(2))
        start = {name: x.clone() for name, x in eager.model.state_dict().items()}
        kept.append(captured)
        replay = graphed(captured, bench.device, warm_up=3)
        for _ in range(3):
            replay()
        for _ in range(6):
            eager()
        found += after(label, start, eager.model.state_dict(), captured.model.state_dict())
        work |= {label: eager, f"{label}, CUDA graph": replay}
    bench.report.add(
        f"CUDA graphs, GPT-2 124M, bf16, {size} tokens", bench.measure(work, 8.0), FEW[:1], "ms a step", 1000
    )
    bench.judge("six steps in a CUDA graph against six eager ones", found)


def after(label: str, start: dict, eager: dict, captured: dict) -> Iterator[Finding]:
    """The changes of weights and of σReparam's state; Adam makes steps of the rounding of small gradients."""
    for kind, ours in (("weights", False), ("σReparam's state", True)):
        names = [name for name in start if name.endswith((".u", ".v", ".0.gamma")) == ours]
        if names:
            truth, got = (torch.cat([(x[n] - start[n]).flatten() for n in names]) for x in (eager, captured))
            yield f"{label}: change of {kind}", apart(got, truth.cpu().double()), 0.2


SECTIONS = {
    section.__name__: section
    for section in (
        ceilings,
        correctness,
        gpt_eager,
        gpt_compiled,
        translation_6l,
        translation_18l,
        vit_small,
        vit_base,
        monitor,
        entropy,
        graphs,
        gpt_fp32,
        gpt_muon,
        vit_base_compiled,
        gpt_small_compiled,
    )
}


# ------------------------------------------------------------------------------------------------------ the run


@contextmanager
def alarm(after: float) -> Iterator[None]:
    """TimeoutError in what runs inside when so many seconds are over."""

    def ring(*_) -> None:
        raise TimeoutError("the minutes are over")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()[:300]


def run(bench: Bench, names: Iterable[str], out: Path) -> dict[str, str]:
    """What became of each section: "ok", "no time left", or the last line of its traceback."""
    states = {}
    for name in names:
        begin, left = time.monotonic(), bench.left()
        if left < TO_BEGIN:
            states[name] = "no time left"
        else:
            try:
                with alarm(left):
                    SECTIONS[name](bench)
                states[name] = "ok"
            except Exception as error:  # whatever it is, the sections after it are worth their minutes
                states[name] = last_line(error)
                traceback.print_exc()
        torch._dynamo.reset()
        clear(bench.device)
        took = time.monotonic() - begin
        bench.report.rows.append({"title": "sections", "name": name, "seconds": round(took, 1), "state": states[name]})
        bench.report.console.print(f"{name}: {states[name]} ({took:.0f} s)")
        bench.report.save(out / "gpu")
    return states


def summary(rows: list[dict]) -> Iterator[str]:
    """A line for each table: the first one's median, and the ratios of the others to it."""
    titles = dict.fromkeys(row["title"] for row in rows if "values" in row)
    for title in titles:
        own = [row for row in rows if row["title"] == title]
        base = next((key for key in own[0] if key.startswith("/ ")), None)
        if base is not None:
            plain = f"{base[2:]} {statistics.median(own[0]['values']):.4g} {own[0]['unit']}"
            others = (f"{row['name']} {statistics.median(row[base]):.3f}" for row in own if f"/ {row['name']}" != base)
            yield f"{title}: {plain}; {'; '.join(others)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder, for gpu.json, gpu.txt and gpu.png")
    parser.add_argument("--device", type=device_named, default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the code")
    parser.add_argument("--minutes", type=float, default=9.0, help="(default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report("the GPU bench" + ", tiny" * args.tiny, args.device)
    bench = Bench(report, args.device, args.tiny, time.monotonic() + 60 * args.minutes)
    states = run(bench, args.sections, args.out)
    print("\n".join(["", report.machine, *summary(report.rows), ""]))
    print("\n".join(f"{name}: {state}" for name, state in states.items()))
    return int(any(state not in ("ok", "no time left") for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
