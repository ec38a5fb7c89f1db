"""SimCLR pretraining of ViT-B/16 on ImageNet-1k, the four variants of the σReparam paper [σ, Section 4.2, App. D].

The settings are those of Table 6. One process trains as it is; `torchrun -m recipes.simclr.pretrain` makes it several, and
negatives come from all of them. An interrupted command goes on after its last whole epoch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator, PartialState
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.transforms.multi_view_transform import MultiViewTransform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recipes.command import keyword_arguments
from recipes.vision.data import Data, load, test_transform
from recipes.vision.engine import fit, run_command, start
from recipes.vision.settings import FitSettings
from recipes.vision.train import evaluator

from .encoder import encoder
from .loss import contrastive
from .online import OnlineProbe
from .views import image_settings, random_view


@dataclass(frozen=True, kw_only=True)
class Settings(FitSettings):
    """Of a pretraining run."""

    variant: Literal["baseline", "frozen_patcher", "sigma", "sigma_preln"]
    epochs: int = 300
    batch_size: int = 4096
    """images of an update, over all processes; each gives two views"""
    lr: float = 2e-4
    lr_base_size: int | None = 256
    """lr is for this many images an update, and grows with batch_size; None: lr is what it is"""
    weight_decay: float = 0.1
    """of matrices; vectors, gamma among them, are not decayed"""
    warmup_epochs: float = 40.0
    warmup_prefix: bool = True
    """the schedule begins after the warm-up, not beside it"""
    temperature: float = 0.1
    """of the NT-Xent loss"""
    color_strength: float = 0.5
    """of the colour jitter; 1 is SimCLR's"""
    crop_min: float = 0.08
    """least share of an image's area that a view shows"""
    hidden_dim: int = 4096
    """of the projection head"""
    model_kwargs: tuple[str, ...] = ()
    """changes of ViT-B/16, as NAME=VALUE: embed_dim=384 num_heads=6 ..."""
    grad_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    data: str = ""
    """digits, cifar10, cifar100, or a dataset of timm's; "" is a folder that holds train/ and val/"""
    data_dir: Path | None = None
    num_classes: int | None = 1000
    """of a dataset of timm's; the probe's"""
    img_size: int | None = None
    """side of the images, pixels; by default that of the data, or else 224"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "hidden_dim"):
            self._check(name, getattr(self, name) > 0, "numbers above 0")
        self._check("color_strength", 0 <= self.color_strength <= 2.5, "numbers from 0 to 2.5")
        self._check("crop_min", 0 < self.crop_min <= 1, "numbers above 0, up to 1")
        self._check("accumulation", self.accumulation == 1, "1: negatives come from one batch")
        keyword_arguments(self.model_kwargs)


class SimCLR(nn.Module):
    """images -> what the loss compares, (batch, 256); the head is the same in all variants, without σReparam."""

    def __init__(self, encoder: VisionTransformer, hidden_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = SimCLRProjectionHead(encoder.embed_dim, hidden_dim, 256, num_layers=3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        self.features = features.detach()  # of the last images, for the probe
        return self.head(features)

    def no_weight_decay(self) -> set[str]:
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


def build(settings: Settings, data: Data) -> SimCLR:
    """The model, for the images of `data`."""
    kwargs = keyword_arguments(settings.model_kwargs)
    vit = encoder(settings.variant, settings.img_size or data.image_size, kwargs)
    vit.set_grad_checkpointing(settings.grad_checkpointing)
    return SimCLR(vit, settings.hidden_dim)


def pretrain(settings: Settings) -> list[dict]:
    """Runs it; returns the log, a row an epoch."""
    data = load(settings.data, settings.data_dir, settings.num_classes)
    accelerator = start(settings)
    model = build(settings, data)
    view = random_view(image_settings(model.encoder), data.mirrored, settings.color_strength, settings.crop_min)
    data.train.transform = MultiViewTransform([view, view])
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":  # torch has it on accelerators alone
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return fit(settings, accelerator, model, data.train, *probed(settings, accelerator, model, data))


def probed(
    settings: Settings, accelerator: Accelerator, model: SimCLR, data: Data
) -> tuple[Callable[[nn.Module, list], Tensor], Callable[[SimCLR], dict[str, float]]]:
    """The loss, at whose every call a probe learns from the features, and the probe's accuracy on the test images, percent."""
    online = OnlineProbe(model.encoder.embed_dim, data.num_classes, accelerator.device)
    accelerator.register_for_checkpointing(online)
    data.test.transform = test_transform(data, image_settings(model.encoder))
    # a generator of its own: training draws from torch's
    test = DataLoader(data.test, 256, num_workers=settings.workers, generator=torch.Generator())
    nt_xent, accuracy = contrastive(settings.temperature), evaluator(accelerator, test)

    def loss_of(wrapped: nn.Module, batch: list) -> Tensor:
        loss = nt_xent(wrapped, batch)
        online.learn(model.features, batch[1].repeat(2))
        return loss

    def evaluate(model: SimCLR) -> dict[str, float]:
        return {"probe_top1": accuracy(nn.Sequential(model.encoder, online).eval())["top1"]}

    return loss_of, evaluate


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.simclr.pretrain", description=__doc__)
    rows = pretrain(settings)
    say = PartialState().print  # in one process
    say(f"loss {rows[-1]['train_loss']:.3f}, log and weights in {settings.output}")
    say(f"next: python -m recipes.simclr.probe {settings.output} --output {settings.output / 'probe'}")
    return 0


if __name__ == "__main__":
    run_command(main)
