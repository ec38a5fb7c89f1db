"""What the monitor adds to training: `python -m benchmarks.monitor`.

One process; in every round a plain update and a recorded one of the same model on the same batch. Between records there is
nothing on the model but the call of `Monitor.step`, timed by itself. The first record, which sets the hooks up, is not in it.
"""

from benchmarks.models import FAMILIES, Step
from benchmarks.paired import Report, arguments, interleave, seconds
from stable_monitor import Monitor

MODELS = {"vit_small": 8, "translation_6l": 400}
IDLE = 1000


def main() -> None:
    parser = arguments("monitor", __doc__, rounds=8)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(MODELS), help="(default: %(default)s)")
    parser.add_argument("--size", type=int, help="tokens or images a step")
    parser.add_argument("--every", type=int, default=100, help="updates from record to record (default: %(default)s)")
    args = parser.parse_args()
    report = Report(f"the monitor, a record every {args.every} updates", args.device)
    for name in args.models:
        family = FAMILIES[name]()
        size = args.size or MODELS.get(name, family.sizes[0])
        step = Step(family, family.bases[-1], size, args.device)
        monitor = Monitor(step.model, 2)
        step()
        monitor.step(1.0)  # the first record; from here on the hooks are there only in `recorded`

        def recorded(step: Step = step, monitor: Monitor = monitor) -> None:
            monitor.step(1.0)  # puts the hooks in
            step()
            monitor.step(1.0)

        title = f"{name}, {size} {family.unit}"
        times = interleave({"plain": step, "recorded": recorded}, args.rounds, args.device, title)
        monitor.close()
        idle = Monitor(step.model, 10**9, step=1)
        between = seconds(lambda idle=idle: [idle.step() for _ in range(IDLE)], args.device) / IDLE
        pairs = zip(times["plain"], times["recorded"], strict=True)
        watched = [a + between + (b - a - between) / args.every for a, b in pairs]
        mean = f"mean of {args.every} watched"
        report.add(title, times | {mean: watched}, ["plain"], "ms an update", 1000)
        report.console.print(f"Monitor.step between records: {1e6 * between:.1f} µs")
    report.save(args.out)


if __name__ == "__main__":
    main()
