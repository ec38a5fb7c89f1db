"""A Trainer's checkpoint for `python -m stable_monitor.rescue_checkpoint`: its model and optimizer on the CPU."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel, Trainer

import hf_stable
from stable_core.checkpoint_file import read_checkpoint
from stable_monitor.rescue_checkpoint import Opened
from stable_monitor.saved_optimizer import Groups, optimizer_holding, usual_groupings

from .undecayed import without_gammas
from .weights import weight_files

OPTIMIZER = "optimizer.pt"
# What is written anew, or, as FSDP's own files, would be read in its place.
WRITTEN = ("config.json", "generation_config.json", "optimizer*", "*.safetensors", "*.index.json", "pytorch_model*")


def is_mine(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file() and bool(weight_files(path))


def open_checkpoint(path: Path) -> Opened:
    """Raises ValueError: the model's class is not of transformers or this plugin; the optimizer has unusual groups."""
    model = _class_of(path).from_pretrained(path, dtype="auto").train()
    saved = read_checkpoint(path / OPTIMIZER) if (path / OPTIMIZER).is_file() else None
    optimizer = None if saved is None else optimizer_holding(model, saved, _groupings(model))
    if saved is not None and optimizer is None:
        raise ValueError(
            f"{path / OPTIMIZER} is of no Adam, or of groups that are neither Trainer's, nor matrices and vectors, nor all in "
            "one: take it out of the folder, and moments start anew"
        )

    def save(out: Path) -> None:
        shutil.copytree(path, out, ignore=shutil.ignore_patterns(*WRITTEN))
        model.save_pretrained(out)
        if optimizer is not None:
            torch.save(optimizer.state_dict(), out / OPTIMIZER)

    return Opened(model, optimizer, save)


def _class_of(path: Path) -> type[PreTrainedModel]:
    (name,) = AutoConfig.from_pretrained(path).architectures or [None]
    for package in (hf_stable, transformers):
        if name is not None and hasattr(package, name):
            return getattr(package, name)
    raise ValueError(f"{path}: config.json has architectures = {name!r}: allowed are transformers' and hf_stable's")


def _groupings(model: nn.Module) -> Iterator[Groups]:
    """Trainer's, those of one with UndecayedGamma, and the usual ones."""
    trainers, named = Trainer.get_decay_parameter_names(None, model), dict(model.named_parameters())
    for decayed in (trainers, without_gammas(model, trainers)):
        yield [[p for name, p in named.items() if (name in decayed) is one] for one in (True, False)]
    yield from usual_groupings(model)
