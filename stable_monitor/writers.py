"""Where records go besides the file: TensorBoard and Weights & Biases, for those who have them."""

import math
from pathlib import Path


def scalars(record: dict) -> dict[str, float]:
    """A record as flat names and numbers: "entropy/encoder.layers.0.self_attn" is the mean over the heads, min or max for
    what is a least or a largest; what was not measured is left out."""
    flat = {name: record[name] for name in ("loss", "lr", "grad_l2", "grad_linf")}
    for name, layer in record["layers"].items():
        for key, over_heads in (("entropy", _mean), ("bound", _mean), ("entropy_min", min), ("max_logit", max)):
            known = [value for value in layer[key] if value is not None]
            flat[f"{key}/{name}"] = over_heads(known) if known else None
        for role, sigma in layer["sigma"].items():
            flat[f"sigma_{role}/{name}"] = sigma
        for key in ("grad_l2", "grad_linf"):
            flat[f"{key}/{name}"] = layer[key]
    return {name: value for name, value in flat.items() if value is not None}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


class TensorBoardWriter:
    """Writes records for TensorBoard. Needs the package tensorboard."""

    def __init__(self, directory: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def __call__(self, record: dict) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        for alarm in record["alarms"]:
            self._writer.add_text("alarm", f"{alarm['layer']}: {alarm['entropy']:.3g} nats", record["step"])
        self._writer.flush()


class WandbWriter:
    """Logs records to a run of Weights & Biases; the one that `wandb.init` began, if none is given. Needs the package wandb."""

    def __init__(self, run=None) -> None:
        if run is None:
            import wandb

            run = wandb.run or wandb.init()
        self._run = run

    def __call__(self, record: dict) -> None:
        self._run.log({"update": record["step"], **scalars(record), "alarms": len(record["alarms"])})
