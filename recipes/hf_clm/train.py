"""Trains StableGPT, or the GPT it is held against, with transformers' Trainer [ST, Tables 2 and 3a].

One process trains as it is; `accelerate launch --config_file recipes/hf_clm/configs/ddp.yaml -m recipes.hf_clm.train` takes
several GPUs. An interrupted command goes on after its last checkpoint.
"""

import logging
import math
import os
from pathlib import Path

import torch
import tyro
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_stable import MonitorCallback, StableGPTForCausalLM, fold
from recipes.command import command
from stable_core.sigma_layers import sigma_layers

from .curves import draw, series
from .data import AllBlocks, RandomBlocks
from .settings import Settings, claim


class Stopped(RuntimeError):
    """A run ended before its last update."""


class StopAtNaN(TrainerCallback):
    """Ends a run whose loss is not a number any more; Trainer goes on, and its log would hide it."""

    def on_log(self, args, state, control, logs, **kwargs):
        control.should_training_stop |= not math.isfinite(logs.get("loss", 0.0))


class StableGPTTrainer(Trainer):
    decay_steps: int | None = None
    """updates that the learning rate's schedule is made for; by default those of the run"""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        return super().create_scheduler(self.decay_steps or num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Those with two dimensions; by its names for them Trainer would decay StableNorm's gain and σReparam's gamma."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def training_arguments(settings: Settings, block_size: int) -> TrainingArguments:
    """Trainer's, for the devices and processes that are here."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    arguments = TrainingArguments(
        str(settings.output),
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.device_batch,
        per_device_eval_batch_size=settings.device_batch,
        gradient_accumulation_steps=settings.accumulation(block_size, processes),
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.grad_clip,
        train_sampling_strategy="sequential",  # the dataset is random
        dataloader_num_workers=settings.workers,
        prediction_loss_only=True,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_steps=settings.save_every,
        save_total_limit=1,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to="none",
        seed=settings.seed,
    )
    if arguments.n_gpu > 1:
        raise ValueError(f"{arguments.n_gpu} GPUs and one process: start it with accelerate launch, or show it one GPU")
    return arguments


def last_checkpoint(run: Path) -> str | None:
    """The newest whole one: Trainer writes a checkpoint's state last."""
    whole = [path.parent for path in run.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.partition("-")[2]))) if whole else None


def train(settings: Settings) -> Trainer:
    """Runs it, validates and saves; returns the Trainer, whose state holds the log of earlier, interrupted calls too."""
    if not (settings.data / "tokenizer").is_dir():  # transformers would look for it on the Hub
        raise ValueError(f"{settings.data}: holds no tokenizer/; python -m recipes.hf_clm.prepare makes such a folder")
    tokenizer = AutoTokenizer.from_pretrained(settings.data / "tokenizer")
    end = tokenizer.eos_token_id
    config = settings.config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end)
    tokenizer.model_max_length = config.block_size
    arguments = training_arguments(settings, config.block_size)
    blocks = settings.batch_tokens // config.block_size * settings.steps
    training = RandomBlocks(settings.data / "train.bin", config.block_size, blocks, settings.seed)
    validation = AllBlocks(settings.data / "val.bin", config.block_size)
    if arguments.process_index == 0:
        claim(settings)
    set_seed(settings.seed)
    model = StableGPTForCausalLM(config)
    if settings.compile:
        model.compile()  # Trainer's own torch_compile would hide the model from the monitor
    trainer = StableGPTTrainer(
        model,
        arguments,
        train_dataset=training,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[MonitorCallback(settings.monitor_every, settings.on_alarm), StopAtNaN()],
    )
    trainer.decay_steps = settings.decay_steps
    trainer.train(resume_from_checkpoint=last_checkpoint(settings.output))
    done, log = trainer.state.global_step, trainer.state.log_history
    if done == settings.steps != max(series(log, "eval_loss")[0], default=0):
        trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        draw(log, settings.output / "curves.png")
    if done < settings.steps:
        loss = max(series(log, "loss")[1][-1:], default=0.0)
        why = "attention entropy collapsed" if math.isfinite(loss) else f"the loss is {loss}"
        raise Stopped(f"stopped after {done} updates: {why}; log and curves in {settings.output}")
    trainer.save_model(str(settings.output / "model"))
    return trainer


def export_folded(run: Path) -> None:
    """Plain weights of a model with σReparam, and its tokenizer."""
    fold(AutoModelForCausalLM.from_pretrained(run / "model")).save_pretrained(run / "folded")
    AutoTokenizer.from_pretrained(run / "model").save_pretrained(run / "folded")


def sample(folder: Path, seed: int) -> str:
    """Text that a saved model writes from nothing."""
    set_seed(seed)
    generate = pipeline("text-generation", str(folder))
    start = generate.tokenizer.eos_token
    return generate(start, max_new_tokens=80, do_sample=True, top_k=50, return_full_text=False)[0]["generated_text"]


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.hf_clm.train", description=__doc__)
    trainer = train(settings)
    if not trainer.is_world_process_zero():
        return 0
    reparametrised = any(sigma_layers(trainer.model))  # from the start, or since a rescue
    if reparametrised:
        export_folded(settings.output)
    folder = settings.output / ("folded" if reparametrised else "model")
    loss = series(trainer.state.log_history, "eval_loss")[1][-1]
    print(
        f"validation loss {loss:.4f} nats a token, perplexity {math.exp(loss):.2f}; log and curves in {settings.output}"
    )
    print(f"what it writes: {sample(folder, settings.seed)!r}")
    print(f"next: python -m stable_monitor.report {settings.output} -o {settings.output / 'report.html'}")
    print(
        f'or: transformers.pipeline("text-generation", "{folder}", trust_remote_code=True)("The"), with or without this package'
    )
    return 0


if __name__ == "__main__":
    logging.getLogger("stable_monitor").setLevel(logging.ERROR)  # alarms are in the log, and warnings would cut the bar
    command(main, "; the same command goes on after the last checkpoint", (Stopped, OSError, ValueError))
