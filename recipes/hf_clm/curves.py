"""What a run looked like: its loss, and the attention entropy beside it."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def series(log_history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Updates and values of `name` in a Trainer's log."""
    rows = [(entry["step"], entry[name]) for entry in log_history if name in entry]
    return [step for step, _ in rows], [value for _, value in rows]


def draw(log_history: list[dict], path: Path) -> None:
    """Two plots: training and validation loss; mean and least attention entropy."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    lines = ((0, "loss", "training"), (0, "eval_loss", "validation"))
    lines += ((1, "attention_entropy", "mean"), (1, "attention_entropy_min", "least"))
    for axis, name, label in lines:
        axes[axis].plot(*series(log_history, name), label=label)
    for axis, title in zip(axes, ("loss, nats a token", "attention entropy, nats"), strict=True):
        axis.set(xlabel="update", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
