"""The monitor under transformers' Trainer."""

from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stable_monitor import Alarm, Monitor


class MonitorCallback(TrainerCallback):
    """Runs `stable_monitor.Monitor` under a Trainer: `Trainer(..., callbacks=[MonitorCallback(every=100)])`.

    Records go to `monitor.jsonl` in the output directory, and `attention_entropy_min`, the least entropy of a layer in nats,
    and `attention_logit_max` into the Trainer's log. Gradients are those that the optimizer steps with, after clipping. A
    resumed run goes on in the same file.

    Args:
        every: updates from one record to the next.
        stop_on_alarm: ends the training, with a checkpoint, when a layer's entropy collapses.
        **monitor: further arguments of `Monitor`, such as `alarm`, `on_alarm` and `writers`.
    """

    def __init__(self, every: int = 100, stop_on_alarm: bool = False, **monitor) -> None:
        self.every, self.stop_on_alarm, self.settings, self.monitor = every, stop_on_alarm, monitor, None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._alarms: list[Alarm] = []
        settings = {"path": Path(args.output_dir), **self.settings, "on_alarm": self._on_alarm}
        self.monitor = Monitor(
            kwargs["model"], self.every, optimizer=kwargs["optimizer"], step=state.global_step, **settings
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.monitor.read_gradients()

    def on_step_end(self, args, state, control, **kwargs):
        record = self.monitor.step()
        if record is not None and record["layers"]:
            layers = record["layers"].values()
            state.log_history.append({
                "step": state.global_step,
                "attention_entropy_min": min(sum(layer["entropy"]) / len(layer["entropy"]) for layer in layers),
                "attention_logit_max": max(max(layer["max_logit"]) for layer in layers),
            })  # fmt: skip
        if self._alarms and self.stop_on_alarm:
            control.should_training_stop = control.should_save = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.monitor.close()

    def _on_alarm(self, alarm: Alarm) -> None:
        self._alarms.append(alarm)
        if self.settings.get("on_alarm"):
            self.settings["on_alarm"](alarm)
