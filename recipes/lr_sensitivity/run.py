"""The comparison: each method at seven learning rates, three seeds, in small trainings of three stacks.

It runs `python -m stable_monitor.sweep`, and goes on where it was stopped.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from recipes.command import command
from recipes.trainings import number_words
from stable_monitor import sweep

from .train import STACKS

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SIGMA = "--options reparam=sigma gamma_init="
STABLE = "--options norm=stable attention=stable init=stable"
VARIANTS = {
    "plain": "",
    "qk-norm": "--options attention=qknorm",
    "qk-clip": "--qk-clip 30",
    "z-loss": "--options z_loss=1e-4",
    "sigma-1": f"{SIGMA}one",
    "sigma": f"{SIGMA}spectral",
    "stable": STABLE,
    "stable-sigma": f"{STABLE} reparam=sigma gamma_init=spectral",
}
MORE = {
    "stable-norm": "--options norm=stable",
    "stable-attention": "--options attention=stable",
    "stable-init": "--options init=stable",
    "spectral": "--options reparam=spectral",
    "weight": "--options reparam=weight",
    "no-norm-sigma-1": f"{SIGMA}one norm=none",
    "no-norm-sigma": f"{SIGMA}spectral norm=none",
    "post-ln": "--options residual=post-ln",
    "post-ln-sigma": f"{SIGMA}spectral residual=post-ln",
    "deepnorm": "--options residual=deepnorm",
    "deepnorm-sigma": f"{SIGMA}spectral residual=deepnorm",
}
ALL = {**VARIANTS, **MORE}


@dataclass(frozen=True, kw_only=True)
class Settings:
    stack: tyro.conf.Positional[Literal[*STACKS]]
    """gpt (nanoGPT's, also with 25 or 85 million parameters or with Muon), vit (timm's) or translation (fairseq's)"""
    output: Path
    """folder of the sweep"""
    data: Path | None = None
    """of gpt: a folder of recipes.gpt.prepare"""
    variants: tuple[Literal[*ALL], ...] = tuple(VARIANTS)
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = (1, 2, 3)
    updates: int = 200
    jobs: int = os.cpu_count() or 1
    """runs at a time, a thread each"""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.stack.startswith("gpt") and not (self.data is not None and (self.data / "meta.pkl").is_file()):
            raise ValueError(f"data = {self.data}: allowed are folders that recipes.gpt.prepare wrote")


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.lr_sensitivity.run", description=__doc__)
    data = settings.data or settings.output / "data"
    if settings.stack == "translation":
        number_words(data)  # written once, before several runs look for it
    training = [
        sys.executable,
        "-m",
        "recipes.lr_sensitivity.train",
        settings.stack,
        "--out",
        "{out}",
        "--data",
        str(data),
    ]
    training += ["--lr", "{lr}", "--seed", "{seed}", "--updates", str(settings.updates)]
    training += ["--device", settings.device, "{variant}"]
    options = ["--out", str(settings.output), "--jobs", str(settings.jobs), "--seed", *map(str, settings.seeds)]
    options += ["--lr", *map(str, settings.rates)]
    options += [word for name in settings.variants for word in ("--variant", f"{name}={ALL[name]}")]
    return sweep.main([*options, "--", *training])


if __name__ == "__main__":
    command(main)
