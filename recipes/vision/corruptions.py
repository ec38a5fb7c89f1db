"""Accuracy on corrupted test images: CIFAR-100-C, or the same corruptions made here [ST, Table 4].

Without --cifar-c, the test images are corrupted by imagecorruptions. Its severities are those of ImageNet-C, harder on small
images than those of CIFAR-C: they compare models with one another, not with the paper. What is finished is kept in
RUN/corruptions.json.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import imagecorruptions
import numpy as np
import tyro
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset, Subset

from recipes.command import command

from . import train
from .data import CLASSES, Arrays, Data, load, test_transform
from .engine import load_export
from .settings import read_settings
from .train import build, evaluator, image_settings

NAMES = tuple(imagecorruptions.get_corruption_names())  # the fifteen of CIFAR-C; its four others are for validation
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which runs, on what."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """directories of recipes.vision.train"""
    cifar_c: Path | None = None
    """CIFAR-10-C or CIFAR-100-C as published: a .npy file for each corruption, and labels.npy"""
    images: int = 10_000
    """of each corruption and severity, the first ones"""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images = {self.images}: allowed are whole numbers from 1")
        if self.cifar_c is not None and not (self.cifar_c / "labels.npy").is_file():
            raise ValueError(
                f"cifar_c = {self.cifar_c}: allowed are directories with labels.npy and a file for each corruption"
            )


class Corrupted(Dataset):
    """The images of `data` with one corruption, the same ones whenever they are looked at."""

    def __init__(self, data: Arrays, name: str, severity: int) -> None:
        self.data, self.name, self.severity = data, name, severity

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple:
        np.random.seed(index)
        image = imagecorruptions.corrupt(self.data.images[index], self.severity, self.name)
        return self.data.transform(Image.fromarray(image)), int(self.data.labels[index])


def variants(settings: Settings, data: Data) -> Iterator[tuple[str, int, Dataset]]:
    """Corruption, severity, images."""
    labels = np.load(settings.cifar_c / "labels.npy") if settings.cifar_c else None
    for name in NAMES:
        published = np.load(settings.cifar_c / f"{name}.npy", mmap_mode="r") if settings.cifar_c else None
        for severity in SEVERITIES:
            if published is None:
                yield name, severity, Corrupted(data.test, name, severity)
            else:  # 10,000 of each severity, one after the other
                part = slice(10_000 * (severity - 1), 10_000 * severity)
                images = Arrays(published[part], labels[part])
                images.transform = data.test.transform
                yield name, severity, images


def evaluate(run: Path, settings: Settings) -> dict[str, float]:
    """{"clean": accuracy, "fog 3": accuracy, ...} of the run's weights, percent."""
    trained = read_settings(train.Settings, run)
    if trained.data not in CLASSES:
        raise ValueError(f"{run}: trained on {trained.data!r}; allowed are {', '.join(CLASSES)}")
    data = load(trained.data, trained.data_dir)
    model = load_export(build(trained, data), run).eval()
    data.test.transform = test_transform(data, image_settings(model))
    accelerator = Accelerator()
    model.to(accelerator.device)

    def accuracy(images: Dataset) -> float:
        subset = Subset(images, range(min(settings.images, len(images))))
        return evaluator(accelerator, DataLoader(subset, trained.test_batch_size))(model)["top1"]

    path = run / "corruptions.json"
    of = f"{settings.cifar_c.name if settings.cifar_c else 'imagecorruptions'}, {settings.images} images"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = kept.setdefault(of, {})
    if "clean" not in found:
        found["clean"] = accuracy(data.test)
    for name, severity, images in track(variants(settings, data), str(run), len(NAMES) * len(SEVERITIES)):
        key = f"{name} {severity}"
        if key not in found:
            found[key] = accuracy(images)
            path.write_text(json.dumps(kept, indent=1) + "\n")
    return found


def summary(runs: dict[Path, dict[str, float]]) -> Table:
    """Accuracies of each run, the mean over corruptions, and each corruption's over its severities."""
    table = Table("", *(str(run) for run in runs), title="accuracy, %")
    rows: dict[str, Callable[[dict], list[float]]] = {
        "clean": lambda found: [found["clean"]],
        "corrupted, mean": lambda found: [value for key, value in found.items() if key != "clean"],
        **{name: lambda found, name=name: [found[f"{name} {severity}"] for severity in SEVERITIES] for name in NAMES},
    }
    for name, values in rows.items():
        table.add_row(name, *(f"{np.mean(values(found)):.1f}" for found in runs.values()))
    return table


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.vision.corruptions", description=__doc__)
    Console().print(summary({run: evaluate(run, settings) for run in settings.runs}))
    return 0


if __name__ == "__main__":
    command(main, "; the same command goes on after the last finished corruption")
