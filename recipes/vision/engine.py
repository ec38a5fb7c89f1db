"""The training loop of the vision recipes: timm's optimizers, schedules and moving average, with Accelerate as its engine.

One process trains as it is; `torchrun` or `accelerate launch` make it several. A run is a directory: `settings.json`,
`log.jsonl` (a line an epoch), `monitor.jsonl`, the last checkpoint, `curves.png`, and at its end `model.safetensors`, which are
plain weights.
"""

import copy
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NoReturn

import matplotlib
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset, Sampler

from recipes.command import command
from stable_core import converge, fold, sigma_layers
from stable_core.checkpoint_file import read_checkpoint
from stable_monitor import Alarm, EntropyCollapse, Monitor, Rescue, Rescued, prepare_to_resume, stop_training
from stable_monitor.resume import reparametrise_named

from .settings import FitSettings, claim

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSS_EVERY = 10  # updates from one look at the loss to the next: each waits for the device


def run_command(main: Callable[[], int]) -> NoReturn:
    """`command` for a trainer."""
    logging.getLogger("stable_monitor").setLevel(logging.ERROR)  # alarms are in the log, and warnings would cut the bar
    ends = Diverged, EntropyCollapse, NotRescued, OSError, ValueError
    command(main, "; the same command goes on after the last whole epoch", ends)


class Diverged(RuntimeError):
    """The loss is not a number any more."""


class NotRescued(RuntimeError):
    """Attention entropy has collapsed in a model that cannot be rescued where it is."""


def start(settings: FitSettings) -> Accelerator:
    """The engine; seeds all random numbers alike in every process, for a model to be built."""
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
    )
    shares = accelerator.num_processes * settings.accumulation
    if settings.batch_size % shares:
        raise ValueError(
            f"batch_size = {settings.batch_size}: allowed are multiples of processes x accumulation, {shares}"
        )
    set_seed(settings.seed)
    return accelerator


def optimizer_for(settings: FitSettings, model: nn.Module) -> torch.optim.Optimizer:
    """timm's, with weight decay of matrices alone. LARS adapts everything, whatever the weight decay, as You et al.'s does."""
    # at weight decay 0 timm tells no vectors from matrices
    vectors, matrices = param_groups_weight_decay(
        model, 1.0, no_weight_decay_list=getattr(model, "no_weight_decay", set)()
    )
    matrices |= {"weight_decay": settings.weight_decay, "decayed": True}
    has_betas = settings.opt.startswith(("adam", "nadam", "lamb"))
    own = {"betas": settings.betas} if has_betas else {"momentum": settings.momentum}
    if "lars" in settings.opt:
        own["always_adapt"] = True
    return create_optimizer_v2([vectors, matrices], opt=settings.opt, lr=settings.peak_lr, **own)


def fit(
    settings: FitSettings,
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset,
    loss_of: Callable[[nn.Module, list], Tensor],
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    sampler: Sampler | None = None,
) -> list[dict]:
    """Trains `model` and returns the rows of the log, one an epoch: those of an earlier, interrupted call too.

    Args:
        dataset: of which batches are collated; `sampler` picks from it, by default all of it in random order.
        loss_of: (model, batch) -> the mean loss of the batch.
        evaluate: model, in eval mode -> metrics; called after each epoch, and with the moving average.

    Raises:
        Diverged, NotRescued, stable_monitor.EntropyCollapse: after a row that says so.
        ValueError: there is not one update in an epoch.
    """
    with accelerator.main_process_first():
        claim(settings)
    loop = _Loop(settings, accelerator, model, dataset, sampler)
    log, rows = settings.output / "log.jsonl", loop.resume()
    with loop.monitor, loop.bar:
        for epoch in range(len(rows), settings.epochs):
            row, trouble = loop.epoch(epoch, loss_of)
            if trouble is not None:
                row["stopped"] = str(trouble)
            elif evaluate is not None:
                row |= loop.evaluate(evaluate)
            rows.append(row)
            if accelerator.is_main_process:
                part = log.with_suffix(".part")  # resuming reads it: a kill must not leave half of it
                part.write_text("".join(json.dumps(row) + "\n" for row in rows))
                part.replace(log)
                curves(rows, settings.output / "curves.png")
            if trouble is not None:
                raise trouble
            if accelerator.is_main_process:
                loop.bar.console.print(_headline(row))
            _save(accelerator, settings.output, epoch + 1)
    if accelerator.is_main_process:
        export(loop.final(), settings.output)
    return rows


class _Loop:
    """What an epoch needs: the wrapped model, optimizer and data, the schedule, the moving average, monitor and progress."""

    def __init__(
        self,
        settings: FitSettings,
        accelerator: Accelerator,
        model: nn.Module,
        dataset: Dataset,
        sampler: Sampler | None,
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.per_batch = settings.batch_size // accelerator.num_processes // settings.accumulation
        loader = DataLoader(
            dataset,
            self.per_batch,
            shuffle=sampler is None,
            sampler=sampler,
            num_workers=settings.workers,
            drop_last=True,
            pin_memory=accelerator.device.type == "cuda",
        )
        optimizer = optimizer_for(settings, model)
        self.ema = ModelEmaV3(model, decay=settings.ema_decay).to(accelerator.device) if settings.ema_decay else None
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)
        self.updates_per_epoch = len(self.loader) // settings.accumulation
        if self.updates_per_epoch == 0:
            raise ValueError(f"batch_size = {settings.batch_size}: allowed are at most the {len(dataset)} images")
        self.schedule, _ = create_scheduler_v2(
            optimizer,
            settings.sched,
            settings.epochs - settings.warmup_epochs * settings.warmup_prefix,
            decay_epochs=settings.decay_epochs,
            decay_rate=settings.decay_rate,
            min_lr=settings.min_lr,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.peak_lr / 1000,
            warmup_prefix=settings.warmup_prefix,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )
        columns = (
            "{task.description}",
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(
            *columns, "{task.fields[loss]}", console=Console(stderr=True), disable=not accelerator.is_main_process
        )
        set_seed(settings.seed, device_specific=True)

    def resume(self) -> list[dict]:
        """Goes to the last checkpoint, if there is one; the rows of the log until then."""
        rows, checkpoint = [], last_checkpoint(self.settings.output)
        if checkpoint is not None:
            self._take_shape(checkpoint / "optimizer.bin")
            self.accelerator.load_state(str(checkpoint))
            done = int(checkpoint.name.partition("-")[2])
            log = (self.settings.output / "log.jsonl").read_text()
            rows = [row for row in map(json.loads, log.splitlines()) if row["epoch"] <= done]
        self.update, self.updates = len(rows) * self.updates_per_epoch, self.settings.epochs * self.updates_per_epoch
        self.task = self.bar.add_task("", total=self.updates, completed=self.update, loss="")
        self.monitor = Monitor(
            self.model,
            self.settings.monitor_every,
            path=self.settings.output,
            optimizer=self.optimizer.optimizer,
            step=self.update,
            on_alarm={"warn": None, "stop": stop_training, "rescue": self._rescue}[self.settings.on_alarm],
            stack="timm",
        )
        if self.settings.on_alarm == "rescue":
            last: list[tuple] = []  # what the model was last called with

            def keep(model: nn.Module, arguments: tuple) -> None:  # a method's object would be copied with the model
                last[:] = [arguments]

            self.model.register_forward_pre_hook(keep)
            self.rescue = Rescue(self.model, self.optimizer.optimizer, lambda: self.model(*last[0]))
        return rows

    def _take_shape(self, optimizer: Path) -> None:
        """Reparametrises what a rescued run has reparametrised, as the state of its optimizer says."""
        if optimizer.is_file():
            prepare_to_resume(self.model, self.optimizer.optimizer, read_checkpoint(optimizer))
            self._reparametrise_average()

    def _reparametrise_average(self) -> None:
        """As the model is, with the average's own function kept: it goes on averaging tensor by tensor, in their order."""
        if self.ema is not None:
            model = self.accelerator.unwrap_model(self.model)
            reparametrise_named(self.ema.module, [name for name, _ in sigma_layers(model)])

    def _rescue(self, alarm: Alarm) -> list[Rescued]:
        try:
            done = self.rescue(alarm)
        except ValueError as error:
            run, layer = self.settings.output, alarm.layer
            raise NotRescued(
                f"{alarm}. It was not rescued: {error}. To go on from the last whole epoch: python -m "
                f"stable_monitor.rescue_checkpoint {run} NEW --layers {layer}, then the same command with --output NEW"
            ) from error
        self._reparametrise_average()
        if self.accelerator.is_main_process:
            for rescued in done:
                self.bar.console.print(str(rescued), highlight=False, soft_wrap=True)
        return done

    def epoch(self, epoch: int, loss_of: Callable[[nn.Module, list], Tensor]) -> tuple[dict, Exception | None]:
        """The epoch's row, and what ended it early."""
        self.bar.update(self.task, description=f"epoch {epoch + 1}/{self.settings.epochs}")
        began, losses, trouble = time.perf_counter(), [], None
        self.loader.set_epoch(epoch)
        self.model.train()
        try:
            for batch in islice(self.loader, self.updates_per_epoch * self.settings.accumulation):
                with self.accelerator.accumulate(self.model):
                    with self.accelerator.autocast():
                        loss = loss_of(self.model, batch)
                    self.accelerator.backward(loss)
                    losses.append(loss.detach().float())
                    if self.accelerator.sync_gradients:
                        self._step(losses[-1])
        except (Diverged, EntropyCollapse, NotRescued) as error:
            trouble = error
        seconds = time.perf_counter() - began
        row = {
            "epoch": epoch + 1,
            "updates": self.update,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.accelerator.reduce(torch.stack(losses).mean(), "mean").item(),
            "seconds": round(seconds, 2),
            "images_per_second": round(len(losses) * self.per_batch * self.accelerator.num_processes / seconds, 1),
        }
        return row, trouble

    def _step(self, loss: Tensor) -> None:
        """One update."""
        self.schedule.step_update(self.update)
        self._set_weight_decay()
        self.monitor.read_gradients()
        if self.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.update += 1
        self.monitor.step(loss)
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model), step=self.update)
        self.bar.advance(self.task)
        if self.update % LOSS_EVERY == 0:
            now = self.accelerator.reduce(loss, "mean").item()
            self.bar.update(self.task, loss=f"loss {now:.3f}")
            if not math.isfinite(now):
                raise Diverged(f"the loss is {now} after {self.update} updates")

    def _set_weight_decay(self) -> None:
        begin, end = self.settings.weight_decay, self.settings.weight_decay_end
        if end is None:
            return
        for group in self.optimizer.param_groups:
            if group.get("decayed"):
                group["weight_decay"] = end + (begin - end) * (1 + math.cos(math.pi * self.update / self.updates)) / 2

    def evaluate(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
        """Of the model, and of its moving average."""
        row = evaluate(self.accelerator.unwrap_model(self.model).eval())
        if self.ema is not None:
            row |= {f"ema_{name}": value for name, value in evaluate(converge(self.ema.module).eval()).items()}
        self.monitor.validated({"loss" if name == "test_loss" else name: value for name, value in row.items()})
        return row

    def final(self) -> nn.Module:
        """What is exported."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module


def export(model: nn.Module, run: Path) -> None:
    """Writes the weights of the folded model to run/model.safetensors: plain layers, which load without this package."""
    plain, part = _folded(converge(copy.deepcopy(model))), run / "model.part"
    save_file({name: x.detach().cpu().contiguous() for name, x in plain.state_dict().items()}, part)
    part.replace(run / "model.safetensors")  # a file of this name says that the run is finished


def load_export(model: nn.Module, run: Path) -> nn.Module:
    """`model`, folded, with the weights that a finished run exported."""
    model = _folded(model)
    model.load_state_dict(load_file(run / "model.safetensors"))
    return model


def _folded(model: nn.Module) -> nn.Module:
    return fold(model) if any(map(parametrize.is_parametrized, model.modules())) else model


def last_checkpoint(output: Path) -> Path | None:
    """Of a run's directory, the last whole one."""
    whole = (path for path in output.glob("checkpoint-*") if not path.name.endswith(".part"))
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _save(accelerator: Accelerator, output: Path, epoch: int) -> None:
    """Keeps the last checkpoint; it gets its name when it is whole."""
    before, part = last_checkpoint(output), output / f"checkpoint-{epoch}.part"
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        part.rename(output / f"checkpoint-{epoch}")
        if before is not None:
            shutil.rmtree(before)
    accelerator.wait_for_everyone()


def _headline(row: dict) -> str:
    shown = (f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float) and name != "seconds")
    return f"epoch {row['epoch']}: " + ", ".join(shown)


def curves(rows: list[dict], path: Path) -> None:
    """Losses and accuracies by epoch."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, kind in zip(axes, ("loss", "top1"), strict=True):
        for name in (name for name in rows[0] if name.endswith(kind)):
            axis.plot(
                [row["epoch"] for row in rows if name in row], [row[name] for row in rows if name in row], label=name
            )
        axis.set(xlabel="epoch", title={"loss": "loss, nats", "top1": "accuracy, %"}[kind])
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
