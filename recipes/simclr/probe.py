"""Linear probe: the top-1 accuracy of a linear classifier on the frozen features of a pretrained encoder.

The features are the class token's, normalised by a BatchNorm without parameters; the data are those of the pretraining run. The
defaults are MoCo v3's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch.nn.functional as F
import tyro
from accelerate import PartialState
from accelerate.utils import set_seed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recipes.vision.data import Data, load, test_transform, train_transform
from recipes.vision.engine import fit, load_export, run_command, start
from recipes.vision.settings import FitSettings, read_settings
from recipes.vision.train import evaluator

from . import pretrain
from .views import image_settings


@dataclass(frozen=True, kw_only=True)
class Settings(FitSettings):
    """Of a probe."""

    run: tyro.conf.Positional[Path]
    """directory of the finished pretraining run"""
    untrained: bool = False
    """probe the encoder as it was before pretraining"""
    epochs: int = 90
    batch_size: int = 1024
    """images of an update, over all processes and accumulated batches"""
    opt: str = "momentum"
    """an optimizer of timm's; this one is SGD without Nesterov's look ahead"""
    lr: float = 3.0
    lr_base_size: int | None = 256
    """lr is for this many images an update, and grows with batch_size; None: lr is what it is"""
    augment: bool = True
    """train on random crops; or else on the images as they are tested"""
    data_dir: Path | None = None
    """by default that of the pretraining run"""
    test_batch_size: int = 256
    """images of each process"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("test_batch_size", self.test_batch_size >= 1, "whole numbers from 1")


class Probe(nn.Module):
    """images -> logits. The encoder is frozen, and in eval mode whatever the mode of the rest."""

    def __init__(self, encoder: VisionTransformer, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.norm = nn.BatchNorm1d(encoder.embed_dim, affine=False)
        self.head = nn.Linear(encoder.embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(images)))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()
        return self


def encoder_of(run: Path, settings: pretrain.Settings, data: Data, untrained: bool) -> VisionTransformer:
    """The encoder of the run with these settings, pretrained or as it was before."""
    set_seed(settings.seed)  # pretraining drew its weights with it
    model = pretrain.build(settings, data)
    return (model if untrained else load_export(model, run)).encoder


def probe(settings: Settings) -> list[dict]:
    """Runs it; returns the log, a row an epoch."""
    trained = read_settings(pretrain.Settings, settings.run)
    data = load(trained.data, settings.data_dir or trained.data_dir, trained.num_classes)
    accelerator = start(settings)
    encoder = encoder_of(settings.run, trained, data, settings.untrained)
    images = image_settings(encoder)
    data.test.transform = test_transform(data, images)
    data.train.transform = train_transform(data, images) if settings.augment else data.test.transform
    set_seed(settings.seed)
    model = Probe(encoder, data.num_classes)
    test = DataLoader(data.test, settings.test_batch_size, num_workers=settings.workers)
    return fit(settings, accelerator, model, data.train, _loss_of, evaluator(accelerator, test))


def _loss_of(model: nn.Module, batch: list) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.simclr.probe", description=__doc__)
    rows = probe(settings)
    what = "untrained" if settings.untrained else "pretrained"
    PartialState().print(
        f"linear probe of the {what} encoder: {rows[-1]['top1']:.2f} %, log and weights in {settings.output}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
