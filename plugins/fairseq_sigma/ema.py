"""`--store-ema` with σReparam: what fairseq averages, and what it saves."""

import contextlib
import functools

from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer

from stable_core import converge


@functools.cache
def follow_the_model() -> None:
    """Has the average take u as the model has it, and find its own before it is saved.

    W and gamma are averaged. The mean of unit vectors is none, and to find the average's own after each update, as loading
    it does, takes longer than the update.
    """
    EMA.__init__ = _with_skipped_vectors(EMA.__init__)
    Trainer.state_dict = _with_converged_average(Trainer.state_dict)


def _with_skipped_vectors(init):
    @functools.wraps(init)
    def wrapped(self, model, *args, **kwargs):
        init(self, model, *args, **kwargs)
        learned = {name for name, _ in model.named_parameters()}
        self.skip_keys = set(self.skip_keys) | {
            key for key in model.state_dict() if "parametrizations." in key and key not in learned
        }

    return wrapped


def _with_converged_average(state_dict):
    @functools.wraps(state_dict)
    def wrapped(self):
        if self.cfg.ema.store_ema:
            with contextlib.suppress(ValueError):  # NaN, which the checkpoint then holds: to say so is not its task
                converge(self.ema.get_model())
        return state_dict(self)

    return wrapped
