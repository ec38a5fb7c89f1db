"""Opens the run of a recipe that trains with `engine.fit`, for `python -m stable_monitor.rescue_checkpoint RUN NEW`.

NEW is a run beside it, which the same command goes on with: `--output NEW`.
"""

import importlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn

from stable_core.checkpoint_file import read_checkpoint
from stable_core.sigma_layers import sigma_layers
from stable_monitor import prepare_to_resume
from stable_monitor.rescue_checkpoint import Opened
from stable_monitor.resume import reparametrise_named

from .data import CLASSES, SIZES, Data
from .engine import last_checkpoint, optimizer_for
from .settings import FitSettings, settings_in

RECIPES = ("recipes.vision.train", "recipes.simclr.pretrain")


def is_mine(path: Path) -> bool:
    """Whether a folder is a run of a recipe, with a whole epoch."""
    return (path / "settings.json").is_file() and last_checkpoint(path) is not None


def open_checkpoint(path: Path) -> Opened:
    """The last checkpoint of a run, without its data."""
    settings, model = _model_of(path)
    folder = last_checkpoint(path)
    averages = sorted(folder.glob("custom_checkpoint_*.pkl"), key=lambda file: int(file.stem.rpartition("_")[2]))
    average = averages[-1] if settings.ema_decay else None  # the last that `fit` registers
    optimizer, saved = optimizer_for(settings, model), read_checkpoint(folder / "optimizer.bin")
    prepare_to_resume(model, optimizer, saved)
    ema = ModelEmaV3(model, decay=settings.ema_decay) if average else None
    model.load_state_dict(load_file(folder / "model.safetensors"))
    optimizer.load_state_dict(saved)
    if ema is not None:
        ema.load_state_dict(read_checkpoint(average))

    def save(out: Path) -> None:
        # without the exported weights, which say that a run is finished
        shutil.copytree(path, out, ignore=lambda place, _: ["model.safetensors"] if Path(place) == path else [])
        new = out / folder.name
        save_file({name: x.contiguous() for name, x in model.state_dict().items()}, new / "model.safetensors")
        torch.save(optimizer.state_dict(), new / "optimizer.bin")
        if ema is not None:
            reparametrise_named(ema.module, [name for name, _ in sigma_layers(model)])
            torch.save(ema.state_dict(), new / average.name)

    return Opened(model, optimizer, save)


def _model_of(run: Path) -> tuple[FitSettings, nn.Module]:
    for name in RECIPES:
        recipe = importlib.import_module(name)
        settings = settings_in(recipe.Settings, run, weights=None)  # those that it began with may be gone
        if settings is not None:
            classes, size = CLASSES.get(settings.data, settings.num_classes), SIZES.get(settings.data)
            return settings, recipe.build(settings, Data([], [], classes, size))
    raise ValueError(f"{run}: allowed are runs of {' and '.join(RECIPES)}")
