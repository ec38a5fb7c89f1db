"""`--store-ema` with σReparam: what fairseq averages, and what it saves."""

import contextlib
import functools

from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer

from stable_core import converge, unfold_state_dict
from stable_core.unfolding import is_plain


@functools.cache
def follow_the_model() -> None:
    """Has the average take u as the model has it, and find its own before it is saved.

    W and gamma are averaged. The mean of unit vectors is none, and to find the average's own after each update, as loading
    it does, takes longer than the update.
    """
    EMA.__init__ = _with_skipped_vectors(EMA.__init__)
    EMA.restore = _unfolding(EMA.restore)
    EMA.build_fp32_params = _unfolding(EMA.build_fp32_params)
    Trainer.state_dict = _with_converged_average(Trainer.state_dict)


def _with_skipped_vectors(init):
    @functools.wraps(init)
    def wrapped(self, model, *args, **kwargs):
        init(self, model, *args, **kwargs)
        _skip_vectors(self)

    return wrapped


def _skip_vectors(average: EMA) -> None:
    learned = {name for name, _ in average.model.named_parameters()}
    average.skip_keys = set(average.skip_keys) | {
        key for key in average.model.state_dict() if "parametrizations." in key and key not in learned
    }


def _unfolding(load):
    """The average of a plain run, in a checkpoint, is one of plain weights."""

    @functools.wraps(load)
    def wrapped(self, state_dict=None, *args, **kwargs):
        if state_dict is not None and is_plain(state_dict):
            state_dict = unfold_state_dict(self.model, state_dict)
        return load(self, state_dict, *args, **kwargs)

    return wrapped


def reparametrise_as(average: EMA, layers: list[str]) -> None:
    """Gives the average the σReparam that layers of the model have got, with its function kept."""
    from stable_monitor.resume import reparametrise_named

    reparametrise_named(average.model, layers)
    average.model.requires_grad_(False)
    _skip_vectors(average)
    if average.config.ema_fp32:
        average.fp32_params = unfold_state_dict(average.model, average.fp32_params)


def _with_converged_average(state_dict):
    @functools.wraps(state_dict)
    def wrapped(self):
        if self.cfg.ema.store_ema:
            with contextlib.suppress(ValueError):  # NaN, which the checkpoint then holds: to say so is not its task
                converge(self.ema.get_model())
        return state_dict(self)

    return wrapped
