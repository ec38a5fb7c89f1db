"""Checkpoints whose layers are reparametrised where the command builds them plain, and the other way.

A rescued run writes into `extra_state` which layers a rescue gave σReparam. A run that goes on from the checkpoint gives it to
them, too; whatever else reads the checkpoint (fairseq-generate, a pretrained encoder) gets them folded.
"""

import contextlib
import functools
import logging
import zipfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.optim import FairseqOptimizer
from fairseq.trainer import Trainer

from stable_core import fold_state_dict, unfold_optimizer_state
from stable_core.checkpoint_file import read_checkpoint
from stable_core.sigma_layers import sigma_layers
from stable_core.unfolding import plain_parameters

from .masters import is_flat, models_own, split_flat

log = logging.getLogger(__name__)
KEY = "rescued"  # of extra_state, and of the optimizer's groups: stable_monitor/resume.py
_goes_on = ContextVar("_goes_on", default=False)  # whether a trainer reads the checkpoint


@functools.cache
def install() -> None:
    """Has fairseq write, read and fold what a rescue did."""
    Trainer.state_dict = _with_note(Trainer.state_dict)
    Trainer._build_optimizer = _in_order(Trainer._build_optimizer)
    Trainer.load_checkpoint = _in_the_shape_of_the_checkpoint(Trainer.load_checkpoint)
    checkpoint_utils.load_checkpoint_to_cpu = _folded(checkpoint_utils.load_checkpoint_to_cpu)


def _with_note(state_dict):
    @functools.wraps(state_dict)
    def wrapped(self):
        state = state_dict(self)
        if names := getattr(self, "rescued", []):
            state["extra_state"][KEY] = names
        return state

    return wrapped


def read(path: str | Path) -> dict:
    """A checkpoint without its tensors, which are read when they are used. Raises what `read_checkpoint` does."""
    return read_checkpoint(path, **{"mmap": True} if zipfile.is_zipfile(path) else {})


def rescued_layers(checkpoint: dict) -> list[str]:
    """The names of the layers that a rescue gave σReparam."""
    groups = (checkpoint.get("last_optimizer_state") or {}).get("param_groups", [])
    noted = (name for group in groups for name in group.get(KEY, []))
    return list(dict.fromkeys([*(checkpoint.get("extra_state") or {}).get(KEY, []), *noted]))


def layer_of(key: str) -> str:
    """The layer of a key of a state dict with "parametrizations." in it, named as `sigma_layers` does."""
    layer, _, rest = key.partition("parametrizations.")
    tensor = rest.partition(".")[0]
    return layer.removesuffix(".") if tensor == "weight" else layer + tensor


def fold_rescued(checkpoint: dict) -> None:
    """Folds, in place, the layers that a rescue gave σReparam."""
    names, state = set(rescued_layers(checkpoint)), checkpoint["model"]
    theirs = {key: x for key, x in state.items() if "parametrizations." in key and layer_of(key) in names}
    if theirs:
        checkpoint["model"] = {key: x for key, x in state.items() if key not in theirs} | fold_state_dict(theirs)
        checkpoint["extra_state"].pop(KEY, None)


def _folded(load_checkpoint_to_cpu):
    @functools.wraps(load_checkpoint_to_cpu)
    def wrapped(*args, **kwargs):
        checkpoint = load_checkpoint_to_cpu(*args, **kwargs)
        if not _goes_on.get():
            fold_rescued(checkpoint)
        return checkpoint

    return wrapped


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """A context in which `load_checkpoint_to_cpu` folds nothing."""
    token = _goes_on.set(True)
    try:
        yield
    finally:
        _goes_on.reset(token)


def _in_the_shape_of_the_checkpoint(load_checkpoint):
    @functools.wraps(load_checkpoint)
    def wrapped(self, filename, *args, **kwargs):
        said = None if self.is_fsdp else _said(self, filename)
        if said is not None:
            _reparametrise(self, said)
        with going_on():
            try:
                return load_checkpoint(self, filename, *args, **kwargs)
            finally:
                vars(self).pop("saved_layers", None)

    return wrapped


def _in_order(build_optimizer):
    @functools.wraps(build_optimizer)
    def wrapped(self):
        rescued = getattr(self, "rescued", [])
        own = sorted(name for name, _ in sigma_layers(self.get_model()))
        carries = own != getattr(self, "saved_layers", own)  # which is there while a checkpoint is loaded
        if carries or sum(len(group["params"]) for group in getattr(self, "saved_groups", [])) > 1:
            self.cfg.common.fp16_no_flatten_grads = True  # --fp16 as it was saved, or as it can be carried over
        build_optimizer(self)
        if rescued:
            _order(self)
        if carries:
            self._optimizer.load_state_dict = functools.partial(_carry, self, self._optimizer)

    return wrapped


def _said(trainer: Trainer, filename: str) -> dict[str, Any] | None:
    """What the checkpoint, if there is one, says of its layers; the same on every process."""
    said = None
    if trainer.data_parallel_rank == 0 and PathManager.isfile(filename):
        with contextlib.suppress(ValueError):  # of a damaged file, which fairseq is about to read
            checkpoint = read(PathManager.get_local_path(filename))
            said = {
                "rescued": rescued_layers(checkpoint),
                "reparametrised": sorted({layer_of(key) for key in checkpoint["model"] if key.endswith(".0.gamma")}),
                "groups": (checkpoint.get("last_optimizer_state") or {}).get("param_groups", []),
            }
    if trainer.data_parallel_world_size > 1:
        group = trainer.data_parallel_process_group
        said = distributed_utils.broadcast_object(said, src_rank=0, group=group, dist_device=trainer.device)
    return said


def _reparametrise(trainer: Trainer, said: dict[str, Any]) -> None:
    trainer.saved_layers, trainer.saved_groups, trainer.rescued = (
        said["reparametrised"],
        said["groups"],
        said["rescued"],
    )
    if trainer.rescued:
        from stable_monitor.resume import reparametrise_named  # costs a second, which runs without it need not pay

        trainer.as_built = list(trainer.get_model().parameters())
        if reparametrise_named(trainer.get_model(), trainer.rescued):
            trainer.reinitialize()


def _order(trainer: Trainer) -> None:
    """A rescue leaves the optimizer's parameters where they were, and adds gammas after them, in a group that says so.

    In the model a weight that is reparametrised comes after its layer's bias, and before that it came first.
    """
    from stable_monitor import prepare_to_resume
    from stable_monitor.optimizers import place_without_decay
    from stable_monitor.resume import note_gammas

    model, place = trainer.get_model(), {p: index for index, p in enumerate(trainer.as_built)}
    noted = any(group.get(KEY) for group in trainer.saved_groups)
    with models_own(trainer._optimizer) as optimizer:
        for group in optimizer.param_groups:
            group["params"].sort(key=lambda p: place.get(p, len(place)))
        if noted:
            prepare_to_resume(model, optimizer, {"param_groups": trainer.saved_groups})
            return
        gammas = {name: sigma.gamma for name, sigma in sigma_layers(model) if name in trainer.rescued}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p in place or p not in set(gammas.values())]
        place_without_decay([optimizer], trainer.as_built, None)(gammas)
        note_gammas([optimizer], gammas)


def _carry(trainer: Trainer, optimizer: FairseqOptimizer, saved: dict, overrides: dict | None = None) -> None:
    del optimizer.load_state_dict  # this, which stands before the optimizer's own
    try:
        with models_own(optimizer) as own:
            learned = [p for p in plain_parameters(trainer.get_model()) if p.requires_grad]
            if is_flat(saved, learned):
                saved = split_flat(saved, learned)
            saved = unfold_optimizer_state(trainer.get_model(), own, saved)
    except ValueError as error:
        log.warning("the optimizer's moments start anew: %s. --reset-optimizer does so on purpose", error)
        return
    optimizer.load_state_dict(saved, overrides)
