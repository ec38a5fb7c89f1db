"""`fairseq-train --qk-clip 100`: `stable_monitor.QKClip` after each update of any architecture and task."""

import argparse
import functools
import math

from fairseq.trainer import Trainer

from .common_flags import add_common_flags


@functools.cache
def install() -> None:
    """Adds the flag to fairseq-train, and QK-clip to its trainer where it is given."""
    add_common_flags(
        "QK-clip",
        qk_clip={"type": _threshold, "metavar": "T", "help": "after an update, shrink the query and key weights of heads "
                 "whose largest attention logit exceeded T (Kimi K2: 100; default: 0, never)"},
    )  # fmt: skip
    Trainer.train_step = _with_clip(Trainer.train_step)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are positive numbers, and 0, which is off")
    return value


def _with_clip(train_step):
    @functools.wraps(train_step)
    def wrapped(self, samples, raise_oom=False):
        threshold = getattr(self.cfg.common, "qk_clip", 0)
        if not threshold:
            return train_step(self, samples, raise_oom)
        if not hasattr(self, "_qk_clip"):
            self._qk_clip = _attach(self, threshold)
        before = self.get_num_updates()
        output = train_step(self, samples, raise_oom)
        if self.get_num_updates() > before:  # not so after an update that fairseq skips
            self._qk_clip.step()
        return output

    return wrapped


def _attach(trainer: Trainer, threshold: float):
    from stable_monitor import QKClip  # costs a second, which runs without it need not pay

    common = trainer.cfg.common
    for name in ("fp16", "bf16"):
        if getattr(common, name) and not getattr(common, f"memory_efficient_{name}"):
            raise ValueError(
                f"--qk-clip {threshold}: --{name} steps fp32 copies of the weights, which would overwrite what is clipped; "
                f"allowed are --memory-efficient-{name} and --amp"
            )
    return QKClip(trainer.model, threshold)
