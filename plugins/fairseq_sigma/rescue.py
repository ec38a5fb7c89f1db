"""`fairseq-train --monitor-alarm rescue`: `stable_monitor.rescue` between two updates of any architecture and task."""

import contextlib
import logging
import math
from collections.abc import Iterator

import torch
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.modules import LayerDropModuleList
from fairseq.optim import AMPOptimizer
from fairseq.trainer import Trainer
from torch import nn

from stable_core.sigma_layers import sigma_layers

from . import ema
from .masters import models_own

log = logging.getLogger(__name__)


class RescueOnAlarm:
    """An `on_alarm` of the monitor of a trainer, to be given each update's `samples` first.

    What cannot be rescued ends training with a checkpoint, as --max-update does, and a line that says why.
    """

    def __init__(self, trainer: Trainer) -> None:
        from stable_monitor import Rescue

        self.samples: list = []
        self._trainer = trainer
        self._rescue = Rescue(trainer.model, trainer.optimizer.optimizer, self._forward)

    def __call__(self, alarm) -> list:
        trainer = self._trainer
        before = {name for name, _ in sigma_layers(trainer.get_model())}
        try:
            if math.isnan(alarm.entropy):  # rank 0's, so that all processes stop
                raise ValueError(f"{alarm.layer}: its entropy is not a number: go back to a sound checkpoint")
            if trainer.is_fsdp or trainer.cfg.distributed_training.ddp_backend == "slowmo":
                raise ValueError(
                    f"--ddp-backend {trainer.cfg.distributed_training.ddp_backend}: it has cut up the weights"
                )
            with models_own(trainer.optimizer):
                done = self._rescue(alarm)
        except Exception as error:  # of the forward pass, which is anybody's, too
            updates = trainer.get_num_updates()
            trainer.cfg.optimization.max_update = updates
            log.error(
                "--monitor-alarm rescue: %s. Training ends after update %d; to go on: python -m "
                "stable_monitor.rescue_checkpoint CHECKPOINT OUT --layers %s, then --restore-file OUT",
                *(" ".join(str(error).split())[:300], updates, alarm.layer),
            )
            return []
        new = {name: sigma for name, sigma in sigma_layers(trainer.get_model()) if name not in before}
        trainer.rescued = [*getattr(trainer, "rescued", []), *new]
        average_gradients(trainer.model, [sigma.gamma for sigma in new.values()])
        if trainer._ema is not None:
            ema.reparametrise_as(trainer._ema, list(new))
        return done

    def _forward(self) -> None:
        trainer = self._trainer
        sample, _ = trainer._prepare_sample(self.samples[0])
        amp = isinstance(trainer.optimizer, AMPOptimizer) and trainer.cuda
        with torch.autocast(trainer.device.type, enabled=amp), _every_layer(trainer.get_model()):
            trainer.get_criterion()(trainer.get_model(), sample)


@contextlib.contextmanager
def _every_layer(model: nn.Module) -> Iterator[None]:
    """--encoder-layerdrop and --decoder-layerdrop might drop the layer that is to be seen."""
    lists = {module: module.p for module in model.modules() if isinstance(module, LayerDropModuleList)}
    for module in lists:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in lists.items():
            module.p = p


def average_gradients(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Adds parameters to what fairseq's own data parallelism averages over processes; torch's is `rescue`'s to tell."""
    for module in model.modules():
        if isinstance(module, LegacyDistributedDataParallel):
            for known in module.per_device_params:
                known.extend(p for p in parameters if p.device == known[0].device)
