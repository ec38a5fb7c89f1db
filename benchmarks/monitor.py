"""What the monitor adds to training: `python -m benchmarks.monitor`.

One process; in every round a plain update and a recorded one of the same model on the same batch.
"""

from functools import partial

from benchmarks.families import Step
from benchmarks.models import FAMILIES
from benchmarks.paired import Report, arguments, interleave
from benchmarks.watching import watching

MODELS = {"vit_small": 8, "translation_6l": 400}


def main() -> None:
    parser = arguments("monitor", __doc__, rounds=8)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(MODELS), help="(default: %(default)s)")
    parser.add_argument("--size", type=int, help="tokens or images a step")
    parser.add_argument("--every", type=int, default=100, help="updates from record to record (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="the model, with inductor")
    args = parser.parse_args()
    compiled = ", compiled" * args.compile
    report = Report(f"the monitor, a record every {args.every} updates{compiled}", args.device)
    for name in args.models:
        family = FAMILIES[name]()
        size = args.size or MODELS.get(name, family.sizes[0])
        step = Step(family, family.bases[-1], size, args.device, compiler="inductor" if args.compile else None)
        title = f"{name}, {size} {family.unit}{compiled}"
        measure = partial(interleave, rounds=args.rounds, device=args.device, label=title)
        times, between = watching(step, [args.every], measure)
        report.add(title, times, ["plain"], "ms an update", 1000)
        report.console.print(f"Monitor.step between records: {1e6 * between:.1f} µs")
    report.save(args.out)


if __name__ == "__main__":
    main()
