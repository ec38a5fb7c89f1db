"""Which comes first, collapse or divergence? The runs in results/ and of the vision grid whose loss turns, side by side."""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from recipes.vision.grid import MODELS

from .experiments import EXPERIMENTS
from .run import halved

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
GRID = Path(__file__).parents[1] / "vision" / "results" / "grid.jsonl"
RISE = 0.4  # nats; the loss of runs that go well is up to 0.38 above its lowest before


def runs() -> list[dict]:
    """Each run once, with a label, and entropy as a share of log(keys)."""
    result = {}
    for path in [*sorted(RESULTS.glob("*.jsonl")), GRID]:
        experiment = EXPERIMENTS.get(path.stem)
        for line in map(json.loads, path.read_text().splitlines()):
            models = experiment.models if experiment else MODELS
            line["label"] = f"{path.stem}: {models[line['model']].label}, lr {line['lr']:g}, seed {line['seed']}"
            if not experiment:  # nats, 17 keys
                line |= {"recorded": line["steps"], "entropy": [nats / math.log(17) for nats in line["entropy"]]}
            result.setdefault((line["name"], *line["losses"]), line)  # logs of ViT share runs
    return list(result.values())


def turned(run: dict) -> int | None:
    """The update at which the loss was first seen `RISE` above its lowest before, or NaN."""
    lowest = math.inf
    for update, loss in zip(run["steps"], run["losses"], strict=True):
        if not loss < lowest + RISE:
            return update
        lowest = min(lowest, loss)
    return None


def table(all_runs: list[dict]) -> Table:
    """Of those whose loss turns."""
    columns = ("", "entropy below half at update", f"loss {RISE} nats up at", "at the end, nats up", "least entropy")
    result = Table(*columns)
    for run in all_runs:
        if (update := turned(run)) is not None:
            end = run["losses"][-1] - min(run["losses"])
            result.add_row(run["label"], halved(run), str(update), f"{end:.2f}", f"{min(run['entropy']):.2f}")
    return result


def summary(all_runs: list[dict]) -> str:
    collapsed = [run for run in all_runs if halved(run) != "-"]
    both = sum(turned(run) is not None for run in collapsed)
    neither = sum(turned(run) is not None for run in all_runs) - both
    return (
        f"{len(all_runs)} runs. Entropy falls below half of log(keys) in {len(collapsed)}: the loss turns in {both} of them, "
        f"and in {neither} of the others"
    )


def picture(shown: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(2, len(shown), figsize=(3 * len(shown), 5), sharex="col", layout="constrained")
    for run, (loss, entropy) in zip(shown, axes.T, strict=True):
        loss.plot(run["steps"], run["losses"])
        entropy.plot(run["recorded"], run["entropy"])
        for axis in (loss, entropy):
            axis.axvline(turned(run), color="tab:red", linestyle=":", label="loss turns")
            if halved(run) != "-":
                axis.axvline(int(halved(run)), color="tab:green", linestyle="--", label="entropy below half")
            axis.grid(alpha=0.3)
        loss.set_title(run["label"].replace(", lr", "\nlr"), fontsize=9)
        loss.set_ylim(0, 1.15 * run["losses"][0])
        entropy.set(xlabel="update", ylim=(0, 1.05))
    axes[0][0].set_ylabel("training loss, nats")
    axes[1][0].set_ylabel("least layer's entropy / log(keys)")
    axes[0][0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m recipes.evidence.collapse", description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=Path("collapse.png"), help="(default: %(default)s)")
    output = parser.parse_args(arguments).output
    if not output.absolute().parent.is_dir():
        parser.error(f"output {output}: there is no directory {output.parent}")
    all_runs = runs()
    picture([run for run in all_runs if turned(run) is not None], output)
    console = Console()
    console.print(table(all_runs))
    console.print(f"{summary(all_runs)}\npicture: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
