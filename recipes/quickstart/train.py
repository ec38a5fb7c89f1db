"""One training of the quickstart: a small GPT at a rate that is too high, in a loop as anybody has one, under the monitor."""

import argparse
import itertools
import logging
from pathlib import Path

import torch

from recipes.command import command
from recipes.trainings import Characters
from stable_monitor import Monitor, Rescue

RUNS = ("alone", "rescued", "sigma")
OPTIONS = {"sigma": {"reparam": "sigma", "gamma_init": "spectral"}}
LR = 0.016  # five times the plain model's best rate (recipes/lr_sensitivity), without warm-up
EVERY = 10


def train(name: str, data: Path, out: Path, updates: int, seed: int) -> float:
    """Returns the validation loss in nats."""
    training = Characters(data, LR, seed, OPTIONS.get(name, {}))
    model, optimizer = training.model, training.optimizer
    others = training.batches(seed + 1000)
    rescue = Rescue(model, optimizer, lambda: training.loss(next(others))) if name == "rescued" else None
    with Monitor(model, EVERY, path=out, optimizer=optimizer, on_alarm=rescue) as monitor:
        for batch in itertools.islice(training.batches(seed), updates):
            loss = training.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            monitor.step(loss)
            optimizer.zero_grad()
        loss = training.validate()
        monitor.validated({"loss": loss})
    return loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m recipes.quickstart.train")
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("--data", type=Path, required=True, help="a folder of recipes.gpt.prepare")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the monitor's records")
    parser.add_argument("--updates", type=int, default=280)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    print(f"validation loss {train(args.name, args.data, args.out, args.updates, args.seed):.3f}")
    return 0


if __name__ == "__main__":
    command(main)
