"""Trains a model of timm's registry on images: the supervised vision experiments of both papers.

One process trains as it is; `accelerate launch -m recipes.vision.train` takes all GPUs. An interrupted command goes on after
its last whole epoch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator, PartialState
from timm.data import Mixup, resolve_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import timm_stable  # noqa: F401  which registers the models
from recipes.command import keyword_arguments

from .data import Data, load, test_transform, train_transform
from .engine import fit, run_command, start
from .settings import FitSettings


@dataclass(frozen=True, kw_only=True)
class Settings(FitSettings):
    """Of a supervised run."""

    model: str
    """timm's or ours: vit_base_patch16_224, sigma_vit_base_patch16_224, stablevit_large, ..."""
    model_kwargs: tuple[str, ...] = ()
    """as NAME=VALUE: alpha=0.25 num_heads=8 ..."""
    weights: Path | None = None
    """a checkpoint to begin with; a head for other classes is left out"""
    grad_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    data: str = "cifar10"
    """digits, digits32, cifar10, cifar100, or a dataset of timm's; "" is a folder that holds train/ and val/"""
    data_dir: Path | None = None
    num_classes: int | None = None
    """needed for timm's datasets"""
    img_size: int | None = None
    """side of the images, pixels; by default that of the data, or else of the model"""
    test_batch_size: int = 256
    """images of each process"""
    drop_path: float = 0.0
    """stochastic depth"""
    smoothing: float = 0.0
    """of labels"""
    mixup: float = 0.0
    cutmix: float = 0.0
    auto_augment: str | None = None
    """timm's: rand-m9-mstd0.5-inc1"""
    erasing: float = 0.0
    """probability of random erasing"""
    repeats: int = 1
    """repeated augmentation: so many views of an image in one update"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("model", timm.is_model(self.model), "timm.list_models(), and with timm_stable imported ours")
        for name in ("drop_path", "smoothing", "erasing"):
            self._check(name, 0 <= getattr(self, name) < 1, "numbers from 0 to under 1")
        for name in ("mixup", "cutmix"):
            self._check(name, getattr(self, name) >= 0, "numbers from 0")
        for name in ("repeats", "test_batch_size"):
            self._check(name, getattr(self, name) >= 1, "whole numbers from 1")
        self._check("weights", self.weights is None or self.weights.is_file(), "files")
        keyword_arguments(self.model_kwargs)


def build(settings: Settings, data: Data) -> nn.Module:
    """The model, for the classes and images of `data`."""
    kwargs = {"num_classes": data.num_classes, **keyword_arguments(settings.model_kwargs)}
    if settings.drop_path:
        kwargs["drop_path_rate"] = settings.drop_path
    size = settings.img_size or data.image_size
    if size is not None:
        kwargs["img_size"] = size
    if settings.weights is not None:
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(settings.weights)}}
    try:
        model = timm.create_model(settings.model, **kwargs)
    except TypeError as error:
        raise ValueError(f"model_kwargs = {' '.join(settings.model_kwargs)}: {error}") from None
    model.set_grad_checkpointing(settings.grad_checkpointing)
    return model


def image_settings(model: nn.Module) -> dict:
    """Size, mean, deviation and interpolation of the images that `model` takes."""
    return {**resolve_data_config(model=model), "input_size": (3, *model.patch_embed.img_size)}


def criterion(settings: Settings, num_classes: int) -> Callable[[nn.Module, list], Tensor]:
    """(model, (images, labels)) -> mean cross-entropy, of mixed images where the settings say so."""
    if settings.mixup or settings.cutmix:
        mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_classes)
        loss = SoftTargetCrossEntropy()
    else:
        mix, loss = (lambda *batch: batch), LabelSmoothingCrossEntropy(settings.smoothing)

    def loss_of(model: nn.Module, batch: list) -> Tensor:
        images, labels = mix(*batch)
        return loss(model(images), labels)

    return loss_of


def evaluator(accelerator: Accelerator, loader: DataLoader) -> Callable[[nn.Module], dict[str, float]]:
    """model -> test_loss, nats, and top1 and top5, percent."""
    loader = accelerator.prepare(loader)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        losses, ranks = [], []
        for images, labels in loader:
            with accelerator.autocast():
                logits = model(images).float()
            own = logits.gather(1, labels[:, None])
            each = F.cross_entropy(logits, labels, reduction="none"), (logits > own).sum(1)
            loss, rank = accelerator.gather_for_metrics(each)
            losses.append(loss)
            ranks.append(rank)
        rank = torch.cat(ranks)
        top1, top5 = (100 * (rank < k).float().mean().item() for k in (1, 5))
        return {"test_loss": torch.cat(losses).mean().item(), "top1": top1, "top5": top5}

    return evaluate


def train(settings: Settings) -> list[dict]:
    """Runs it; returns the log, a row an epoch."""
    data = load(settings.data, settings.data_dir, settings.num_classes)
    accelerator = start(settings)
    model = build(settings, data)
    config = image_settings(model)
    data.train.transform = train_transform(
        data, config, auto_augment=settings.auto_augment, re_prob=settings.erasing, re_mode="pixel"
    )
    data.test.transform = test_transform(data, config)
    sampler = None
    if settings.repeats > 1:  # Accelerate shares the batches out, so this one serves all processes
        sampler = RepeatAugSampler(data.train, num_replicas=1, rank=0, num_repeats=settings.repeats)
    test = DataLoader(data.test, settings.test_batch_size, num_workers=settings.workers)
    return fit(
        settings,
        accelerator,
        model,
        data.train,
        criterion(settings, data.num_classes),
        evaluator(accelerator, test),
        sampler,
    )


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.vision.train", description=__doc__)
    rows = train(settings)
    say = PartialState().print  # in one process
    say(f"accuracy {rows[-1]['top1']:.2f} %, log and weights in {settings.output}")
    say(f"next: python -m stable_monitor.report {settings.output} -o {settings.output / 'report.html'}")
    return 0


if __name__ == "__main__":
    run_command(main)
