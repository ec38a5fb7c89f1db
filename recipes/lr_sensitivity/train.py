"""One run of the comparison: a small training of a stack, with options, QK-clip and z-loss, under the monitor."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from recipes.command import command, keyword_arguments
from recipes.trainings import Characters, Characters25M, Characters85M, MuonCharacters, Training, Translation, Vision
from stable_monitor import Monitor, QKClip

STACKS = {
    "gpt": Characters,
    "gpt-25m": Characters25M,
    "gpt-85m": Characters85M,
    "gpt-muon": MuonCharacters,
    "vit": Vision,
    "translation": Translation,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    stack: tyro.conf.Positional[Literal[*STACKS]]
    """gpt (nanoGPT's, also with 25 or 85 million parameters or with Muon), vit (timm's) or translation (fairseq's)"""
    out: Path
    """folder for monitor.jsonl"""
    data: Path
    """gpt: a folder of recipes.gpt.prepare; translation: where its text is written"""
    lr: float
    seed: int
    updates: int = 200
    """of which a twentieth is warm-up; then a cosine to zero"""
    options: tuple[str, ...] = ()
    """as NAME=VALUE: reparam=sigma gamma_init=spectral z_loss=1e-4 ..."""
    qk_clip: float = 0.0
    """threshold; 0 for none"""
    device: str = "cpu"
    """a GPU computes products in TF32"""


def schedule(update: int, updates: int) -> float:
    warmup = max(1, updates // 20)
    return min((update + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * update / updates))


def train(settings: Settings) -> float:
    training: Training = STACKS[settings.stack](
        settings.data, settings.lr, settings.seed, keyword_arguments(settings.options, "options")
    )
    torch.backends.cuda.matmul.allow_tf32 = True
    training.to(torch.device(settings.device))
    training.clip = 1.0
    training.factor = lambda update: schedule(update, settings.updates)
    if settings.qk_clip:
        QKClip(training.model, settings.qk_clip, optimizer=training.optimizer)
    with Monitor(training.model, 10, path=settings.out, optimizer=training.optimizer) as monitor:
        for batch in itertools.islice(training.batches(settings.seed), settings.updates):
            loss = training.step(batch)
            monitor.step(loss)
            training.optimizer.zero_grad()
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at update {training.update}")
        loss = training.validate()
        monitor.validated({"loss": loss})
    return loss


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.lr_sensitivity.train", description=__doc__)
    print(f"validation loss {train(settings):.4f}")
    return 0


if __name__ == "__main__":
    command(main)
