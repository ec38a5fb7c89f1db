"""QK-clip under transformers' Trainer."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stable_monitor import QKClip


class QKClipCallback(TrainerCallback):
    """Runs `stable_monitor.QKClip` under a Trainer: `Trainer(..., callbacks=[QKClipCallback(threshold=100.0)])`.

    Args:
        threshold, alpha, every: as for `QKClip`.

    Raises:
        ValueError: at the start of training, what `QKClip` refuses.
    """

    def __init__(self, threshold: float = 100.0, alpha: float = 0.5, every: int = 1) -> None:
        self.settings, self.clip = {"threshold": threshold, "alpha": alpha, "every": every}, None
        self.trainer = None  # set by introduce_trainers

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.clip = QKClip(self.trainer.model_wrapped, **self.settings)

    def on_step_end(self, args, state, control, **kwargs):
        self.clip.step()

    def on_train_end(self, args, state, control, **kwargs):
        self.clip.close()
