"""The monitor under transformers' Trainer."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stable_monitor import Alarm, AlarmConfig, Monitor, headline

CLOCKS = ("runtime", "per_second", "epoch", "time")  # what the Trainer's metrics say of the clock and not of the model


class MonitorCallback(TrainerCallback):
    """Runs `stable_monitor.Monitor` under a Trainer: `Trainer(..., callbacks=[MonitorCallback(every=100)])`.

    Records go to `monitor.jsonl` in the output directory, and `attention_entropy`, `attention_entropy_min` (nats) and
    `attention_logit_max` into the Trainer's log history (TensorBoard and W&B do not hear of them there: give `writers`). The
    loss is that of the update's first batch (of which transformers, with accumulation or several processes, makes a share of
    the whole update's; it is scaled back as if all batches had as many items); gradients are those that the optimizer steps
    with, after clipping.
    A resumed run goes on in the same file. Evaluations during training are written there too, as validations.

    Args:
        every: updates from one record to the next.
        stop_on_alarm: ends the training, with a checkpoint, when a layer's entropy collapses.
        alarm, on_alarm, writers: as for `Monitor`.

    Raises:
        ValueError: every is no whole number from 1. At the start of training, what else `Monitor` refuses, and
            `torch_compile=True`, which compiles where a callback cannot look: call `model.compile()` before the Trainer gets
            the model.
    """

    def __init__(
        self,
        every: int = 100,
        stop_on_alarm: bool = False,
        *,
        alarm: AlarmConfig | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
        writers: Iterable[Callable[[dict], None]] = (),
    ) -> None:
        if not isinstance(every, int) or every < 1:  # the monitor would say so at the start of training
            raise ValueError(f"every = {every!r}: allowed are whole numbers from 1")
        self.every, self.stop_on_alarm, self.on_alarm = every, stop_on_alarm, on_alarm
        self.alarm, self.writers, self.monitor, self._training = alarm, writers, None, False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if args.torch_compile:
            raise ValueError(
                "torch_compile = True hides the model from the monitor: leave it out, and call model.compile()"
            )
        self._collapsed, self._training = False, True
        self._processes, self._batches = _sharing_processes(kwargs["model"], args), 1
        self.monitor = Monitor(
            kwargs["model"],
            self.every,
            path=Path(args.output_dir),
            optimizer=kwargs["optimizer"],
            step=state.global_step,
            alarm=self.alarm,
            on_alarm=self._on_alarm,
            writers=self.writers,
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.monitor.read_gradients()
        self._lr = kwargs["optimizer"].param_groups[0]["lr"]

    def on_substep_end(self, args, state, control, **kwargs):
        self._batches += 1

    def on_step_end(self, args, state, control, **kwargs):
        shares = self._processes * self._batches if self._processes else 1
        record, self._batches = self.monitor.step(lr=self._lr, output_loss_scale=shares), 1
        if record is not None:
            numbers = {f"attention_{name}": value for name, value in headline(record).items()}
            state.log_history.append({**numbers, "step": state.global_step})
        if self._collapsed and self.stop_on_alarm:
            control.should_training_stop = control.should_save = True
        return control

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self._training:  # later ones are the user's own, perhaps of the test set
            found = {name.removeprefix("eval_"): value for name, value in metrics.items() if not name.endswith(CLOCKS)}
            self.monitor.validated(found, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        self.monitor.close()

    def _on_alarm(self, alarm: Alarm) -> None:
        self._collapsed = True
        if self.on_alarm is not None:
            self.on_alarm(alarm)


def _sharing_processes(model: nn.Module, args: TrainingArguments) -> int:
    """In how many processes Trainer has the model give its share of an update's loss: 0 where it gives its batch's own.

    It tells models whose forward takes **kwargs how many items the update has.
    """
    parameters = inspect.signature(extract_model_from_parallel(model).forward).parameters.values()
    if not getattr(model, "accepts_loss_kwargs", any(p.kind is p.VAR_KEYWORD for p in parameters)):
        return 0
    return args.world_size if args.average_tokens_across_devices else 1
