"""Trainer's checkpoints where checkpoint and model differ in which layers have σReparam.

After a rescue the checkpoint has layers with σReparam that the script's model has not. They get it when the optimizer is there,
as they did in the run, so that parameters and groups have the order that they had. The other way round, a plain checkpoint goes
into a model with σReparam, and so does the state of its optimizer.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from stable_core.unfolding import unfold_optimizer_state, unfold_state_dict
from stable_monitor import prepare_to_resume
from stable_monitor.resume import reparametrise_named

from .reparametrised import record
from .rescue import cut_up
from .weights import read_weights, weight_names

log = logging.getLogger(__name__)

ORIGINAL = re.compile(r"(?P<layer>.*?)parametrizations\.(?P<tensor>\w+)\.original")
WAITING = "_reparametrised_weights"  # the Trainer's attribute, from loading weights to loading the optimizer's state


@dataclass(frozen=True)
class Difference:
    """Names of weights, as the plain model has them: those with σReparam in the checkpoint alone, and in the model alone."""

    only_theirs: set[str]
    only_ours: set[str]

    def __bool__(self) -> bool:
        return bool(self.only_theirs or self.only_ours)


@dataclass(frozen=True)
class Waiting:
    """What is loaded with the optimizer's state: weights, if layers get σReparam then, and whether the state is a plain one."""

    weights: dict[str, Tensor] | None
    plain: bool


def difference(checkpoint: str, model: nn.Module) -> Difference:
    there, here = weight_names(checkpoint), set(model.state_dict())
    theirs, ours = _reparametrised(there), _reparametrised(here)
    return Difference(
        {name for name in theirs - ours if name in here}, {name for name in ours - theirs if name in there}
    )


def _reparametrised(keys: Iterable[str]) -> set[str]:
    return {match["layer"] + match["tensor"] for key in keys if (match := ORIGINAL.fullmatch(key))}


def _as_plain(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """W where W_hat belongs, which keeps its place until its layer is reparametrised."""
    places = {re.sub(r"(\w+)$", r"parametrizations.\1.", name): name for name in names}
    plain = {}
    for key, x in state.items():
        prefix = re.match(r"(.*?parametrizations\.\w+\.|)", key)[0]
        if prefix not in places:
            plain[key] = x
        elif key == f"{prefix}original":
            plain[places[prefix]] = x
    return plain


def resume_across_rescues() -> None:
    """From now on Trainer loads checkpoints so."""
    load_weights, load_state, load_best = (
        Trainer._load_from_checkpoint, Trainer._load_optimizer_and_scheduler, Trainer._load_best_model
    )  # fmt: skip

    @wraps(load_weights)
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        setattr(self, WAITING, None)
        if cut_up(self) or not _load(self, resume_from_checkpoint, self.is_in_train):
            load_weights(self, resume_from_checkpoint, model)

    @wraps(load_state)
    def _load_optimizer_and_scheduler(self, checkpoint):
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate's wraps torch's
        if checkpoint is None or cut_up(self) or not isinstance(optimizer, torch.optim.Optimizer):
            return load_state(self, checkpoint)
        handle = optimizer.register_load_state_dict_pre_hook(lambda _, saved: _prepare(self, optimizer, saved))
        try:
            load_state(self, checkpoint)
        finally:
            handle.remove()

    @wraps(load_best)
    def _load_best_model(self):
        if cut_up(self) or not _load(self, self.state.best_model_checkpoint, False):
            load_best(self)

    Trainer._load_from_checkpoint = _load_from_checkpoint
    Trainer._load_optimizer_and_scheduler = _load_optimizer_and_scheduler
    Trainer._load_best_model = _load_best_model


def _load(trainer: Trainer, checkpoint: str, optimizer_follows: bool) -> bool:
    """Loads weights into the Trainer's model, if checkpoint and model differ; returns whether they do."""
    model = trainer.model
    found = difference(checkpoint, model)
    if not found:
        return False
    if found.only_theirs and found.only_ours:
        raise ValueError(
            f"{min(found.only_theirs)} has σReparam in {checkpoint} alone, and {min(found.only_ours)} in the model alone: "
            "allowed is more of it on one side"
        )
    state = read_weights(checkpoint)
    if found.only_ours:
        state = unfold_state_dict(model, state)
        log.info("%s is plain: the model's σReparam starts from its weights", checkpoint)
    optimizer_follows &= all((Path(checkpoint) / name).is_file() for name in ("optimizer.pt", "scheduler.pt"))
    if optimizer_follows:
        setattr(trainer, WAITING, Waiting(state if found.only_theirs else None, bool(found.only_ours)))
        state = _as_plain(state, found.only_theirs)
    else:
        reparametrise_named(model, sorted(name.removesuffix(".weight") for name in found.only_theirs))
    trainer._issue_warnings_after_load(model.load_state_dict(state, strict=False))
    _record(model)
    return True


def _prepare(trainer: Trainer, optimizer: Any, saved: dict[str, Any]) -> dict[str, Any] | None:
    """Before an optimizer loads its state: brings model and optimizer into the shape of the run that saved it."""
    model, waiting = trainer.model, getattr(trainer, WAITING, None)
    setattr(trainer, WAITING, None)
    if waiting is not None and waiting.plain:
        return unfold_optimizer_state(model, optimizer, saved)
    prepare_to_resume(trainer.model_wrapped, optimizer, saved, trainer.lr_scheduler)
    if waiting is not None and waiting.weights is not None:
        if missing := _reparametrised(waiting.weights) - _reparametrised(model.state_dict()):
            raise ValueError(
                f"{min(missing)} has σReparam in the checkpoint, and not by a rescue: give it to the model, as "
                "hf_stable.sigma_reparam did, before the Trainer gets that"
            )
        model.load_state_dict(waiting.weights, strict=False)  # tied weights are not in it
        _record(model)
    return None


def _record(model: nn.Module) -> None:
    if isinstance(model, PreTrainedModel):
        record(model)
