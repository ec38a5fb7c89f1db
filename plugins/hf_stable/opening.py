"""A Trainer's checkpoint for `python -m stable_monitor.rescue_checkpoint`: its model and optimizer on the CPU."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel, Trainer

import hf_stable
from stable_core.checkpoint_file import read_checkpoint
from stable_core.sigma_layers import sigma_layers
from stable_core.unfolding import plain_parameters
from stable_monitor import prepare_to_resume
from stable_monitor.rescue_checkpoint import Opened
from stable_monitor.resume import NOTE

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
    optimizer = None if saved is None else _optimizer_of(model, saved)

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


def _optimizer_of(model: nn.Module, saved: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer that holds the saved state.

    Raises:
        ValueError: neither Trainer's groups, nor matrices and vectors, nor all in one have parameters like those of the state.
    """
    for groups in _groupings(model, {name for group in saved["param_groups"] for name in group.get(NOTE, ())}):
        optimizer = torch.optim.Optimizer([{"params": group} for group in groups], {})  # which keeps what it is given
        prepare_to_resume(model, optimizer, saved)
        if _fits(optimizer, saved):
            optimizer.load_state_dict(saved)
            return optimizer
    raise ValueError(
        f"{OPTIMIZER} is of no Adam, or of groups that are neither Trainer's, nor matrices and vectors, nor all in one: take "
        "it out of the folder, and moments start anew"
    )


def _groupings(model: nn.Module, rescued: set[str]) -> Iterator[list[list[nn.Parameter]]]:
    """The usual ways to group parameters, as they were before a rescue added gammas."""
    gammas = {id(sigma.gamma) for name, sigma in sigma_layers(model) if name in rescued}
    named = {name: p for name, p in model.named_parameters() if id(p) not in gammas}
    decayed = Trainer.get_decay_parameter_names(None, model)
    for first in (lambda name, p: name in decayed, lambda name, p: p.ndim > 1):
        chosen = [first(name, p) for name, p in named.items()]
        yield [
            [p for p, is_first in zip(named.values(), chosen, strict=True) if is_first is one] for one in (True, False)
        ]
    yield [plain_parameters(model) if rescued else list(named.values())]


def _fits(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> bool:
    ours, theirs = ([group["params"] for group in groups] for groups in (optimizer.param_groups, saved["param_groups"]))
    if list(map(len, ours)) != list(map(len, theirs)):
        return False
    pairs = [pair for group, indices in zip(ours, theirs, strict=True) for pair in zip(group, indices, strict=True)]
    return all(
        (x.shape, x.dtype) == (p.shape, p.dtype)
        for p, index in pairs
        for x in saved["state"].get(index, {}).values()
        if isinstance(x, torch.Tensor) and x.ndim
    )
