"""Writers of the monitor's records to TensorBoard and Weights & Biases, two packages that are optional."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from stable_core.extras import extra

from .records import PACE, in_words


def by_layer(record: dict[str, Any], key: str, over_heads: Callable[[list[float]], float]) -> dict[str, float]:
    """{layer: over_heads(layer[key])}, for layers with any number that is not null."""
    known = {name: [x for x in layer[key] if x is not None] for name, layer in record["layers"].items()}
    return {name: over_heads(heads) for name, heads in known.items() if heads}


def headline(record: dict[str, Any]) -> dict[str, float]:
    """A summary of a record for a log line; empty where no attention was measured.

    "entropy" is the mean over layers and heads and "entropy_min" that of the layer with the least, both in nats; "logit_max" is
    the largest logit of all, and "healthy" 1 or 0, the verdict so far: loggers draw numbers."""
    entropies, logits = by_layer(record, "entropy", fmean).values(), by_layer(record, "max_logit", max).values()
    if not entropies or not logits:
        return {}
    found = {"entropy": fmean(entropies), "entropy_min": min(entropies), "logit_max": max(logits)}
    return found | ({"healthy": float(record["verdict"] == "healthy")} if "verdict" in record else {})


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """A record as {name: number}: its `headline`, and numbers such as "entropy/encoder.layers.0.self_attn".

    Entropy and its bound are means over heads, entropy_min and max_logit the least and the largest; nulls are left out."""
    flat = {name: record.get(name) for name in ("loss", "lr", *PACE, "grad_l2", "grad_linf")}
    flat.update((f"lr/{group}", rate) for group, rate in enumerate(record.get("lrs", ())))
    flat.update(headline(record))
    for key, over_heads in (("entropy", fmean), ("bound", fmean), ("entropy_min", min), ("max_logit", max)):
        flat.update((f"{key}/{name}", value) for name, value in by_layer(record, key, over_heads).items())
    for name, layer in record["layers"].items():
        for key in ("sigma", "lag"):
            flat.update((f"{key}_{role}/{name}", value) for role, value in layer[key].items())
        flat.update((f"{key}/{name}", layer[key]) for key in ("grad_l2", "grad_linf"))
    return {name: value for name, value in flat.items() if value is not None}


class TensorBoardWriter:
    """Writes records to a directory for TensorBoard, and the verdict as text when it changes. Needs the package tensorboard."""

    def __init__(self, directory: str | Path) -> None:
        with extra("monitor"):
            from torch.utils.tensorboard import SummaryWriter

        self._writer, self._verdict = SummaryWriter(str(directory)), ""

    def __call__(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        for alarm in record["alarms"]:
            self._writer.add_text("alarm", f"{alarm['layer']}: {in_words(alarm['entropy'], ' nats')}", record["step"])
        if (verdict := record.get("verdict", "")) != self._verdict:
            self._writer.add_text("verdict", verdict, record["step"])
            self._verdict = verdict
        self._writer.flush()


class WandbWriter:
    """Logs records to a Weights & Biases run; without one, to that of `wandb.init`. Needs the package wandb."""

    def __init__(self, run: Any = None) -> None:
        if run is None:
            import wandb

            run = wandb.run or wandb.init()
        self._run = run

    def __call__(self, record: dict[str, Any]) -> None:
        said = {"alarms": len(record["alarms"]), "verdict": record.get("verdict")}
        self._run.log({"update": record["step"], **scalars(record), **said})
