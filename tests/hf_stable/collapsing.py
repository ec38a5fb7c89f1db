"""Trainer's runs that collapse and are rescued; apart from test_rescue.py, as its two processes import what they need anew."""

import os

import torch
import transformers

from hf_stable import MonitorCallback
from stable_monitor import AlarmConfig

from .test_monitor import train

LAYER = "transformer.h.1.attn"
SAVING = {"save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}


class Collapse(transformers.TrainerCallback):
    """Blows up the queries of one layer after two updates."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.transformer.h[1].attn.c_attn.weight[:, :32] *= 300


def rescued(folder, *callbacks, **settings):
    callback = MonitorCallback(1, "rescue", alarm=AlarmConfig(fraction=0.5, logit=0))
    return train(folder, Collapse(), callback, *callbacks, **settings)


def without_dropout(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def in_a_process(rank: int | None, folder: str) -> dict[str, torch.Tensor]:
    """The weights of a rescued run after six updates, and of one that is resumed after four; each rank has half of a batch."""
    if rank is not None:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in here.items()}, ACCELERATE_USE_CPU="true")
    settings = {**SAVING, "optim": "sgd", "per_device_train_batch_size": 4 if rank is None else 2, "learning_rate": 0.1,
                "prepare": without_dropout}  # fmt: skip
    if rank is not None:
        settings["ddp_backend"] = "gloo"
    whole = rescued(f"{folder}/whole", **settings)
    again = train(f"{folder}/again", resume=f"{folder}/whole/checkpoint-4", **settings)
    wrapped = isinstance(whole.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert wrapped == (rank is not None)
    return {f"{name}.{key}": x for name, trainer in (("whole", whole), ("again", again))
            for key, x in trainer.model.state_dict().items()}  # fmt: skip
