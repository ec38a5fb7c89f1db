"""Which comes first? Loss and entropy of the plain models' runs that collapse, side by side, from the logs in results/."""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from .experiments import EXPERIMENTS
from .run import halved

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SHOWN = {  # where from: the log, the model, the learning rate
    "pre-LN, 18L-18L": ("translation", "preln", 0.02),
    "DeepNorm, 18L-18L": ("translation", "deepnorm", 0.02),
    "DeepNorm, 100L-100L": ("depth", "deepnorm", 0.02),
    "ViT": ("sn_wn", "vit", 0.03),
    "ViT, weight norm": ("sn_wn", "wn", 0.03),
}


def runs(log: str, model: str, lr: float) -> list[dict]:
    """Entropy as a share of log(keys)."""
    lines = [json.loads(line) for line in (RESULTS / f"{log}.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["model"] == model and line["lr"] == lr]
    for line in lines if log not in EXPERIMENTS else ():  # the vision grid's: nats, 17 keys
        line |= {"recorded": line["steps"], "entropy": [nats / math.log(17) for nats in line["entropy"]]}
    return lines


def rise(run: dict) -> tuple[float, int]:
    """How far the loss was above its lowest before, at most, nats; and at which update it was that low."""
    lowest, result = (math.inf, 0), (0.0, 0)
    for update, loss in zip(run["steps"], run["losses"], strict=True):
        result, lowest = max(result, (loss - lowest[0], lowest[1])), min(lowest, (loss, update))
    return result


def rows() -> list[tuple[str, ...]]:
    result = []
    for label, source in SHOWN.items():
        lines = runs(*source)
        rises, since = zip(*map(rise, lines), strict=True)
        cells = (map(halved, lines), (f"{nats:.2f}" for nats in rises), map(str, since))
        result.append((label, f"{source[2]:g}", *map(" / ".join, cells)))
    return result


def picture(path: Path) -> None:
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(3.2 * len(SHOWN), 5.5), sharex="col", layout="constrained")
    for (label, source), (loss, entropy) in zip(SHOWN.items(), axes.T, strict=True):
        lines = runs(*source)
        for line, color in zip(lines, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            loss.plot(line["steps"], line["losses"], color=color, label=f"seed {line['seed']}")
            entropy.plot(line["recorded"], line["entropy"], color=color)
            for axis in (loss, entropy) if halved(line) != "-" else ():
                axis.axvline(int(halved(line)), color=color, linestyle=":")
        loss.set(title=f"{label}, lr {source[2]:g}", ylim=(0, 1.15 * max(line["losses"][0] for line in lines)))
        entropy.set(xlabel="update", ylim=(0, 1.05))
        for axis in (loss, entropy):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("training loss, nats")
    axes[1][0].set_ylabel("least layer's entropy / log(keys)")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("dotted: the first record in which entropy is below half")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m recipes.evidence.collapse", description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=Path("collapse.png"), help="(default: %(default)s)")
    output = parser.parse_args(arguments).output
    if not output.absolute().parent.is_dir():
        parser.error(f"output {output}: there is no directory {output.parent}")
    columns = ("", "learning rate", "entropy below half at update", "loss rises by, at most, nats", "from update")
    table = Table(*columns)
    for row in rows():
        table.add_row(*row)
    picture(output)
    console = Console()
    console.print(table)
    console.print(f"picture: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
