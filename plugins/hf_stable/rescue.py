"""A rescue between two updates of transformers' Trainer, on the last batch that it trained on."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from stable_monitor import Alarm, Rescue
from stable_monitor.compiled import unwrap
from stable_monitor.rescue import Rescued

from .reparametrised import record

COMMAND = "python -m stable_monitor.rescue_checkpoint {checkpoint} RESCUED --layers {layer}"


class TrainerRescue:
    """`stable_monitor.Rescue` of what a Trainer trains, which it must be given when training begins."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._called = trainer, trainer.model_wrapped
        self._batch: tuple[tuple, dict] = (), {}
        self._rescue = Rescue(self._called, trainer.optimizer, self._forward, scheduler=trainer.lr_scheduler)
        self._remove = before_each_call(self._called, self._keep)

    def __call__(self, alarm: Alarm) -> list[Rescued]:
        """Rescues, and has the model's config say so.

        Raises:
            ValueError: the weights are cut up; as `rescue`.
        """
        if cut_up(self._trainer):
            raise ValueError("FSDP and DeepSpeed have cut up the weights and the optimizer's state")
        done = self._rescue(alarm)
        if isinstance(self._trainer.model, PreTrainedModel):
            record(self._trainer.model)
        return done

    def way_on(self, checkpoint: str, layer: str) -> str:
        """What to do where it could not be done, from a checkpoint that is written now."""
        if hasattr(unwrap(self._called), "peft_config"):
            return "what an adapter adds to frozen weights is not bounded; model.merge_and_unload(), and train what it returns"
        command = COMMAND.format(checkpoint=checkpoint, layer=layer)
        if cut_up(self._trainer):
            return f"{command}, which needs model.safetensors there (FULL_STATE_DICT), and train from_pretrained('RESCUED')"
        return f"{command}, and trainer.train(resume_from_checkpoint='RESCUED')"

    def close(self) -> None:
        self._remove()
        self._batch = (), {}

    def _keep(self, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._called.training:
            self._batch = args, kwargs

    def _forward(self) -> None:
        args, kwargs = self._batch
        with self._trainer.compute_loss_context_manager():
            self._called(*args, **kwargs)


def cut_up(trainer: Trainer) -> bool:
    """Whether the weights and the optimizer's state are where this process does not have them."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def before_each_call(module: nn.Module, act: Callable[[tuple, dict[str, Any]], None]) -> Callable[[], None]:
    """Has `act` called with the arguments of each call of `module`, plain or compiled; returns what ends it."""
    compiled = module._compiled_call_impl
    if compiled is None:
        return module.register_forward_pre_hook(lambda _, args, kwargs: act(args, kwargs), with_kwargs=True).remove

    def call(*args, **kwargs):  # a hook would be compiled, too
        act(args, kwargs)
        return compiled(*args, **kwargs)

    def remove() -> None:
        module._compiled_call_impl = compiled

    module._compiled_call_impl = call
    return remove


def introduce_trainers() -> None:
    """From now on a callback that has an attribute `trainer` has its Trainer there, while that trains."""
    train = Trainer.train

    @wraps(train)
    def introduced(self, *args, **kwargs):
        callbacks = [callback for callback in self.callback_handler.callbacks if hasattr(callback, "trainer")]
        for callback in callbacks:
            callback.trainer = self
        try:
            return train(self, *args, **kwargs)
        finally:
            for callback in callbacks:
                callback.trainer = None

    Trainer.train = introduced
