"""What is no collapse: nanoGPT's GPT of characters with SGD at 1.0. The loss rises first, and entropy falls after it.

A line of JSON a seed, on the standard output. Half a minute.
"""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from recipes.command import command
from recipes.trainings import Characters
from stable_monitor import Monitor


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path
    """folder of train.bin, val.bin and meta.pkl, by recipes.gpt.prepare"""
    lr: float = 1.0
    seeds: tuple[int, ...] = (1, 2, 3)
    updates: int = 15


def train(settings: Settings, seed: int) -> dict:
    """Loss, and the least layer's entropy / log(keys), at each update until the loss is not a number."""
    training = Characters(settings.data, settings.lr, seed)
    training.clip, training.optimizer = 0.0, torch.optim.SGD(training.model.parameters(), settings.lr)
    losses, entropy = [], []
    with Monitor(training.model, 1, optimizer=training.optimizer) as monitor:
        for batch in itertools.islice(training.batches(seed), settings.updates):
            loss = training.step(batch)
            record = monitor.step(loss)
            training.optimizer.zero_grad()
            if record is None or not torch.isfinite(loss):
                break
            layers = record["layers"].values()
            losses.append(round(loss.item(), 3))
            entropy.append(round(min(median(layer["entropy"]) / math.log(layer["keys"]) for layer in layers), 3))
    return {"optimizer": "sgd", "lr": settings.lr, "seed": seed, "loss": losses, "entropy": entropy}


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.rescue.blow_up", description=__doc__)
    for seed in settings.seeds:
        print(json.dumps(train(settings, seed)), flush=True)
    return 0


if __name__ == "__main__":
    command(main)
