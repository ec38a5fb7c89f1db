"""Peak memory of training steps, ours beside what a user would take instead: `python -m benchmarks.memory`.

Each model in a process of its own. On a GPU what torch allocated at most, on the CPU how far the process's resident memory
grew. The last column is what a model takes beyond its plain one, in copies of the weights that are reparametrised (fp32).
"""

import json
import resource
import subprocess
import sys

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.families import Step, reparametrised_bytes
from benchmarks.models import FAMILIES
from benchmarks.paired import Report, arguments

STEPS = 3


def peak(step: Step, device: torch.device) -> int:
    """Bytes."""
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = arguments("memory", __doc__, rounds=3)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="(default: all)")
    parser.add_argument("--size", type=int, help="tokens or images a step (default: each model's smaller one)")
    parser.add_argument("--autocast", action="store_true", help="the forward pass in bfloat16")
    parser.add_argument("--only", help="measure one model in this process and print it: what the benchmark calls")
    args = parser.parse_args()
    if args.only:
        family = FAMILIES[args.models[0]]()
        step = Step(family, args.only, args.size, args.device, args.autocast)
        print(json.dumps({"peak": peak(step, args.device), "copy": reparametrised_bytes(step.model)}))
        return
    report = Report("peak memory, autocast to bfloat16" if args.autocast else "peak memory", args.device)
    for name in args.models:
        family = FAMILIES[name]()
        size = args.size or family.sizes[0]
        title = f"{name}, {size} {family.unit}"
        peaks, copies = {label: [] for label in family.variants}, {}
        for _ in track(range(args.rounds), title, console=Console(stderr=True)):
            for label, own in peaks.items():
                command = [sys.executable, "-m", "benchmarks.memory", "--models", name, "--only", label]
                command += ["--size", str(size), "--device", args.device.type] + ["--autocast"] * args.autocast
                answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
                own.append(answer["peak"])
                copies[label] = answer["copy"]
        report.add(title, peaks, family.bases, "MB", 1e-6)
        for label, copy in copies.items():
            plain = next((base for base in family.bases if label.endswith(base)), family.bases[0])
            if copy:
                extra = (min(peaks[label]) - min(peaks[plain])) / copy
                report.console.print(f"{label}: {extra:+.2f} copies of the weights beside {plain}")
        report.save(args.out)


if __name__ == "__main__":
    main()
