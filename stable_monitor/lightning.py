"""The monitor under Lightning's Trainer: `from stable_monitor.lightning import MonitorCallback`.

It works with the packages `lightning` and `pytorch_lightning`. Neither is imported before that name is asked for.
"""

import functools
import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .alarm import Alarm, AlarmConfig
from .callbacks import Watching, logged
from .chosen import Chosen
from .lightning_resume import Resuming, replace, together
from .records import FILE_NAME, begin_with
from .rescue import Rescue

if TYPE_CHECKING:
    MonitorCallback: Any

log = logging.getLogger("stable_monitor")
PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}  # and where their Callback is
COMMAND = (
    "stable rescue {path} RESCUED.ckpt --model MODULE:FUNCTION --layers {layer}, and fit(ckpt_path='RESCUED.ckpt')"
)
VALIDATION = re.compile(r"val(id(ation)?)?[_/]")


class LightningWatching(Watching):
    """`Trainer(callbacks=[MonitorCallback(every=100)])`: runs `stable_monitor.Monitor` under Lightning.

    Records go to `monitor.jsonl`; `attention_entropy`, `attention_entropy_min` (nats), `attention_logit_max` and
    `attention_healthy`, 1 or 0, to all of the Trainer's loggers with every record, and into the progress bar and
    `callback_metrics`. The loss is the mean of the update's batches; gradients are those before clipping. Metrics of
    validations in training whose names begin with val_ or val/ are written without that, as validations.

    `training_step` of a recorded update is run through a module that has the parts of yours, as what Lightning calls itself is
    no forward pass. Where they are compiled it is run once more, without gradient, so that what it logs for the epoch counts
    that batch twice. Manual optimization is not followed; a warning says what to do. FSDP was not tried.

    A rescue runs `training_step` twice or more on the update's batch, without what it logs; metrics of torchmetrics count that
    batch again. With the callback in the Trainer, `fit`, `test` and the like take a checkpoint of a rescued run, as
    `ckpt_path`, into a module that is built as ever.

    Args:
        every, alarm, writers, attention: as for `Monitor`.
        on_alarm: "warn"; "stop", which ends the training; "rescue", which is `stable_monitor.rescue` before the next update,
            and where that cannot be done stops with a checkpoint and a line that says how to go on; or a function of the
            `Alarm`.
        path: directory or .jsonl file. If left out, the first logger's directory, or without a logger the Trainer's
            `default_root_dir`. A resumed run goes on in the same file if it is given the same path, and else begins with the
            earlier records, where they are still there.

    Raises:
        ValueError: every is no whole number from 1, or on_alarm is something else. At the start of training, what else
            `Monitor` refuses, and "rescue" where the weights are cut up (FSDP, DeepSpeed, ModelParallelStrategy).
    """

    def __init__(
        self,
        every: int = 100,
        on_alarm: str | Callable[[Alarm], Any] = "warn",
        *,
        path: str | Path | None = None,
        alarm: AlarmConfig | None = None,
        writers: Iterable[Callable[[dict[str, Any]], None]] = (),
        attention: Chosen | None = None,
    ) -> None:
        super().__init__(every, on_alarm, alarm=alarm, writers=writers, attention=attention)
        self.path = path
        self._step: Any = None  # a _TrainingStep, while a training is followed
        self._loss: Any = None  # the sum over the update's batches, of which each gives its share
        self._trainer: Any = None
        self._rescuing: Any = None
        self._resuming: Resuming | None = None
        self._records: Any = None  # the Path of this run's
        self._earlier: str | None = None  # the records of the run that goes on
        self._kept = False  # whether a checkpoint of what could not be rescued is there

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__} of {self.path or 'the logger'} every {self.every}"

    def state_dict(self) -> dict[str, Any]:
        return {} if self._records is None else {"records": str(self._records.absolute())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._earlier = state.get("records")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._resuming = Resuming(pl_module, stage)
        elif self.on_alarm == "rescue" and stage == "fit":
            raise ValueError(
                f"on_alarm = 'rescue': {type(trainer.strategy).__name__} cuts up the weights, which cannot be rescued in "
                "place; allowed are 'warn', 'stop' and functions of an Alarm"
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._resuming is not None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._resuming.finish(trainer.strategy.model, trainer.optimizers, schedulers)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._resuming is not None:
            self._resuming.close()
        self._resuming = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not pl_module.automatic_optimization:
            log.warning(
                "automatic_optimization = False: the monitor does not see such a training; in on_fit_start write "
                "Monitor(self.part, every, path=..., optimizer=self.trainer.optimizers, follow=True), of the module that "
                "training_step calls"
            )
            return
        log_dir = trainer.log_dir  # which all processes must ask for
        path = Path(self.path or log_dir or trainer.default_root_dir)
        self._step, self._trainer = _TrainingStep(pl_module), trainer
        self._records = path if path.suffix == ".jsonl" else path / FILE_NAME
        earlier = Path(self._earlier) if self._earlier else None
        if earlier is not None and earlier.is_file() and not self._records.exists() and trainer.is_global_zero:
            try:
                # A logger has a new folder for a run that goes on.
                begin_with(earlier, self._records, trainer.global_step)
            except OSError as error:
                log.warning("the records of before are not carried on: %s", error)
        self._earlier, self._kept = None, False
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._rescuing = Rescue(
            trainer.strategy.model, trainer.optimizers, self._same_batch, scheduler=together(schedulers)
        )
        self._watch(
            self._step,
            path=path,
            optimizer=trainer.optimizers,
            step=trainer.global_step,
            stack="lightning",
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._step is not None and self.monitor is not None and self.monitor.is_recording:
            self._step.take_over()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._step is not None and self.monitor is not None:
            self.monitor.read_gradients()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._step is None or self.monitor is None:
            return
        self._step.give_back()
        share = outputs.get("loss") if isinstance(outputs, dict) else None
        if self.monitor.is_recording and share is not None:
            self._loss = share if self._loss is None else self._loss + share
        if trainer.global_step <= self.monitor.updates:  # more batches belong to the update
            return
        loss, self._loss = self._loss, None
        record = self.monitor.step(loss)
        if record is not None:
            found = logged(record)
            for logger in trainer.loggers:
                logger.log_metrics(found, record["step"])
            pl_module.log_dict(found, prog_bar=True, logger=False)
        self._step.given = (), {}
        if self._stop and self.on_alarm == "rescue" and not self._kept:  # it could not be done
            self._kept = True
            trainer.save_checkpoint(self._checkpoint())
        trainer.should_stop = trainer.should_stop or self._stop

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._step is None or self.monitor is None:
            return
        metrics = {name: value for name, value in trainer.callback_metrics.items() if VALIDATION.match(name)}
        if metrics:
            self.monitor.validated({VALIDATION.sub("", name, 1): value for name, value in metrics.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._step is not None and self.monitor is not None:
            self._step.give_back()
            self.monitor.close()
            self._step = self._trainer = self._rescuing = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "")

    def _rescue(self, alarm: Alarm) -> Any:
        return self._rescuing(alarm)

    def _same_batch(self) -> None:
        with self._trainer.precision_plugin.train_step_context():
            self._step.again()

    def _checkpoint(self) -> Path:
        return self._records.parent / f"alarm-step={self._trainer.global_step}.ckpt"

    def _way_on(self, alarm: Alarm) -> tuple[str, str]:
        path = self._checkpoint()
        return str(path), COMMAND.format(path=path, layer=alarm.layer)


class _TrainingStep(nn.Module):
    """A LightningModule's `training_step` as a forward pass, with the LightningModule's own parts by their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        self._of = [module]  # in a list, as it is no part
        self._undo: Callable[[], None] | None = None
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}  # what the module's was called with last

    def take_over(self) -> None:
        """Has the module's `training_step` run through this one, until `give_back`."""
        (module,) = self._of
        if self._undo is not None:
            return
        step: Any = module.training_step
        self.training, self.forward = module.training, step

        @functools.wraps(self.forward)  # Lightning looks at its arguments
        def through(*args: Any, **kwargs: Any) -> Any:
            self.given = args, kwargs
            return self(*args, **kwargs)

        self._undo = replace(module, "training_step", through)

    def give_back(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def again(self) -> None:
        """The same call of `training_step`, which logs nothing."""
        (module,), (args, kwargs) = self._of, self.given
        step: Any = module.training_step
        log_again = replace(module, "log", lambda *args, **kwargs: None)
        try:
            step(*args, **kwargs)
        finally:
            log_again()


def __getattr__(name: str) -> Any:
    """Makes `MonitorCallback`, a Callback of the package that is in use already, or else of one that is installed."""
    if name != "MonitorCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = sorted(
        (package for package in PACKAGES if find_spec(package)), key=lambda package: package not in sys.modules
    )
    if not found:
        raise ImportError("MonitorCallback needs Lightning: pip install lightning, or pytorch-lightning")
    base = importlib.import_module(PACKAGES[found[0]]).Callback
    own = {"__module__": __name__, "__doc__": LightningWatching.__doc__}
    globals()[name] = made = type(name, (LightningWatching, base), own)
    return made
