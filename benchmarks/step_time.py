"""Training step time, ours beside what a user would take instead: `python -m benchmarks.step_time`.

One process, one batch, one model after the other in every round. Prints the median over rounds, and the median and
quartiles of the ratios to the plain pre-LN (and post-LN) model of the same round. "plain Algorithm 1" is the paper's
listing with autograd; torch's `spectral_norm` has no gamma to learn.
"""

import argparse
import gc

from benchmarks.families import Family, Step
from benchmarks.models import FAMILIES
from benchmarks.paired import Report, arguments, interleave


def measure(family: Family, size: int, args: argparse.Namespace, title: str) -> dict[str, list[float]]:
    steps = {label: Step(family, label, size, args.device, args.autocast) for label in family.variants}
    times = interleave(steps, args.rounds, args.device, title)
    steps.clear()
    gc.collect()  # parametrised modules are in reference cycles, and the next models would find no room
    return times


def main() -> None:
    parser = arguments("step_time", __doc__, rounds=8)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="(default: all)")
    parser.add_argument("--sizes", type=int, nargs="+", help="tokens or images a step (default: two for each model)")
    parser.add_argument("--autocast", action="store_true", help="the forward pass in bfloat16")
    args = parser.parse_args()
    report = Report("step time, autocast to bfloat16" if args.autocast else "step time", args.device)
    for name in args.models:
        family = FAMILIES[name]()
        for size in args.sizes or family.sizes:
            title = f"{name}, {size} {family.unit}"
            times = measure(family, size, args, title)
            report.add(title, times, family.bases, "ms a step", 1000)
            report.save(args.out)  # after each, as all of them take long


if __name__ == "__main__":
    main()
