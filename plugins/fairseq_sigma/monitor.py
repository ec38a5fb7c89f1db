"""`fairseq-train --monitor-every N`: `stable_monitor.Monitor` in the training and validation of any architecture and task."""

import argparse
import functools
import logging
import math
import sys

import fairseq_cli.train  # noqa: F401  which validates
import torch
from fairseq.logging import metrics
from fairseq.optim import AMPOptimizer
from fairseq.trainer import Trainer

from .common_flags import add_common_flags
from .rescue import RescueOnAlarm

log = logging.getLogger(__name__)


@functools.cache
def install() -> None:
    """Adds the flags to fairseq-train, and the monitor to its trainer where they are given."""
    add_common_flags(
        "monitor",
        monitor_every={"type": _updates, "metavar": "N", "help": "record attention entropy, spectral norms and gradient "
                       "norms every N updates, in monitor.jsonl in --save-dir (default: 0, never)"},
        monitor_alarm={"choices": ("warn", "stop", "rescue"), "help": "when a layer's entropy collapses: log a "
                       "warning, or also save a checkpoint and end training, or bound the layer's queries and keys and go on "
                       "(default: warn)"},
    )  # fmt: skip
    Trainer.train_step = _with_monitor(Trainer.train_step)
    for name in ("fairseq_cli.train", "__main__"):  # the latter under python -m fairseq_cli.train
        if hasattr(sys.modules[name], "get_valid_stats"):
            sys.modules[name].get_valid_stats = _with_validation(sys.modules[name].get_valid_stats)


def _updates(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are whole numbers from 0, which is off")
    return int(text)


def _with_monitor(train_step):
    @functools.wraps(train_step)
    def wrapped(self, samples, raise_oom=False):
        if not getattr(self.cfg.common, "monitor_every", 0):
            if _alarm(self) != "warn":
                raise ValueError(f"--monitor-alarm {_alarm(self)}: it needs --monitor-every N")
            return train_step(self, samples, raise_oom)
        if not hasattr(self, "_monitor"):
            self._rescue = RescueOnAlarm(self) if _alarm(self) == "rescue" else None
            self._monitor = _attach(self)
        if self._rescue is not None:
            self._rescue.samples = samples
        lr = self.get_lr()  # this update's; train_step leaves the next one's
        output = train_step(self, samples, raise_oom)
        # Not so after an update that fairseq skips (overflow, out of memory), nor in the outer of two calls where --amp
        # tries a batch again by calling train_step within itself.
        if self._monitor.updates < self.get_num_updates():
            record = self._monitor.step(output.get("loss"), lr)
            if record is not None:
                _show(self._monitor)
                if _alarm(self) == "stop":
                    _stop_on(record["alarms"], self)
        return output

    return wrapped


def _alarm(trainer: Trainer) -> str:
    return getattr(trainer.cfg.common, "monitor_alarm", "warn")


def _with_validation(get_valid_stats):
    @functools.wraps(get_valid_stats)
    def wrapped(cfg, trainer, stats, tracking_best):
        if tracking_best and hasattr(trainer, "_monitor"):  # of the first subset, as fairseq's best checkpoint is
            found = {
                name: value for name, value in stats.items() if name not in ("wps", "wpb", "bsz")
            }  # of the machine
            trainer._monitor.validated(found, trainer.get_num_updates())
        return get_valid_stats(cfg, trainer, stats, tracking_best)

    return wrapped


def _attach(trainer: Trainer):
    """A monitor of the trainer's model that goes on from the updates made so far, and reads gradients before clipping."""
    from stable_monitor import Monitor  # costs a second, which runs without it need not pay

    monitor = Monitor(
        trainer.model,
        every=trainer.cfg.common.monitor_every,
        path=trainer.cfg.checkpoint.save_dir,
        step=trainer.get_num_updates(),
        on_alarm=trainer._rescue,
        stack="fairseq",
    )
    clip_grad_norm = trainer.clip_grad_norm  # comes after the gradients are summed over processes and normalised

    @functools.wraps(clip_grad_norm)
    def read_and_clip(max_norm):
        monitor.read_gradients(_carried_scale(trainer.optimizer))
        return clip_grad_norm(max_norm)

    trainer.clip_grad_norm = read_and_clip
    return monitor


def _carried_scale(optimizer) -> float:
    """What the model's gradients are still multiplied by, once fairseq has normalised them."""
    if isinstance(optimizer, AMPOptimizer):
        return optimizer.scaler.get_scale()
    # --fp16 and --bf16 normalise the fp32 gradients at the end, all factors in one.
    return 1 / float(getattr(optimizer, "_multiply_factor", 1))


def _show(monitor) -> None:
    """Has fairseq log the newest record's entropy from now on: in the progress bar, TensorBoard and the like.

    Derived metrics are shown as they are until the next record comes, where averages would be None, and are in no checkpoint.
    """

    from stable_monitor import headline

    for name in ("entropy", "entropy_min", "logit_max", "healthy"):
        metrics.log_derived(
            name, lambda _, name=name: round(headline(monitor.last).get(name, math.nan), 3), priority=450
        )


def _stop_on(alarms: list[dict], trainer: Trainer) -> None:
    """Ends training as --max-update does, with a checkpoint, if rank 0 has an alarm."""
    number = torch.tensor(len(alarms), device=trainer.device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(number, src=0)  # each process watches its own batches; all must stop or none
    if number:
        updates = trainer.get_num_updates()
        log.info("--monitor-alarm stop: entropy collapse; training ends after update %d", updates)
        trainer.cfg.optimization.max_update = updates
