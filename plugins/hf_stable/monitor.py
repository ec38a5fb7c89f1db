"""The monitor under transformers' Trainer."""

import inspect
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stable_monitor import Alarm
from stable_monitor.callbacks import Watching, logged

from .rescue import TrainerRescue, introduce_trainers

CLOCKS = ("runtime", "per_second", "epoch", "time")  # what the Trainer's metrics say of the clock and not of the model


class MonitorCallback(Watching, TrainerCallback):
    """Runs `stable_monitor.Monitor` under a Trainer: `Trainer(..., callbacks=[MonitorCallback(every=100)])`.

    Records go to `monitor.jsonl` in the output directory, and `attention_entropy`, `attention_entropy_min` (nats),
    `attention_logit_max` and `attention_healthy`, 1 or 0, into what the Trainer logs: the console, TensorBoard, W&B. The loss
    is that of the update's first batch (of which transformers, with accumulation or several processes, makes a share of the
    whole update's; it is scaled back as if all batches had as many items); gradients are those that the optimizer steps with,
    after clipping. A resumed run goes on in the same file. Evaluations during training are written there too, as validations.

    Args:
        every: updates from one record to the next.
        on_alarm: what to do when a layer's entropy collapses: "warn"; "stop", which ends the training with a checkpoint;
            "rescue", which is `stable_monitor.rescue` before the next update, and where that cannot be done stops with a line
            that says how to go on; or a function of the `Alarm`.
        alarm, writers, attention: as for `Monitor`.

    Raises:
        ValueError: every is no whole number from 1, or on_alarm is something else. At the start of training, what else
            `Monitor` refuses.
    """

    trainer: Any = None
    _rescuing: TrainerRescue | None = None
    _training = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._training = True
        if self.on_alarm == "rescue":  # before the monitor, which compiled models are called through as well
            self._rescuing = TrainerRescue(self.trainer)
        self._processes, self._batches = _sharing_processes(kwargs["model"], args), 1
        self._watch(
            self.trainer.model_wrapped,
            path=Path(args.output_dir),
            optimizer=kwargs["optimizer"],
            step=state.global_step,
            stack="transformers",
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.monitor.read_gradients()

    def on_substep_end(self, args, state, control, **kwargs):
        self._batches += 1

    def on_step_end(self, args, state, control, **kwargs):
        shares = self._processes * self._batches if self._processes else 1
        record, self._batches = self.monitor.step(output_loss_scale=shares), 1
        if record is not None:
            own_turn = control.should_log  # which any log takes for done
            self.trainer.log(logged(record))
            control.should_log = own_turn
        if self._stop:
            control.should_training_stop = control.should_save = True
        return control

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self._training:  # later ones are the user's own, perhaps of the test set
            found = {name.removeprefix("eval_"): value for name, value in metrics.items() if not name.endswith(CLOCKS)}
            self.monitor.validated(found, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        self.monitor.close()
        if self._rescuing is not None:
            self._rescuing.close()

    def _rescue(self, alarm: Alarm) -> Any:
        done, state = self._rescuing(alarm), self.trainer.state
        if done:
            names = [rescued.layer for rescued in done]
            state.log_history.append({"attention_rescued": names, "step": state.global_step})
        return done

    def _way_on(self, alarm: Alarm) -> tuple[str, str]:
        checkpoint = f"{self.trainer.args.output_dir}/checkpoint-{self.trainer.state.global_step}"
        return checkpoint, self._rescuing.way_on(checkpoint, alarm.layer)


introduce_trainers()


def _sharing_processes(model: nn.Module, args: TrainingArguments) -> int:
    """In how many processes Trainer has the model give its share of an update's loss: 0 where it gives its batch's own.

    It tells models whose forward takes **kwargs how many items the update has.
    """
    parameters = inspect.signature(extract_model_from_parallel(model).forward).parameters.values()
    if not getattr(model, "accepts_loss_kwargs", any(p.kind is p.VAR_KEYWORD for p in parameters)):
        return 0
    return args.world_size if args.average_tokens_across_devices else 1
