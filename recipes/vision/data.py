"""Images and labels: the small sets that train on a laptop, and whatever timm reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from timm.data import create_dataset, create_transform
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import RandomCrop

from recipes.small_data import data_folder

CLASSES = {"digits": 10, "digits32": 10, "cifar10": 10, "cifar100": 100}  # of the small sets
SIZES = {"digits": 8, "digits32": 32, "cifar10": 32, "cifar100": 32}  # of their images, pixels
PADDED_UP_TO = 64  # pixels: images this small are shifted, larger ones cropped and resized


class Arrays(Dataset):
    """Images (n, height, width, 3), uint8, and their labels (n,); `transform` turns a PIL image into a tensor."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(self.images[index])
        return (self.transform(image) if self.transform else image), int(self.labels[index])


@dataclass(frozen=True)
class Data:
    train: Dataset
    test: Dataset
    num_classes: int
    image_size: int | None = None  # of small sets, whose images all have one
    mirrored: bool = True  # an image from right to left has the same label


def load(name: str, directory: Path | None = None, num_classes: int | None = None) -> Data:
    """The data called `name`.

    Args:
        name: "digits" (8 x 8, of scikit-learn), "digits32" (the same at CIFAR's size), "cifar10", "cifar100", or a dataset of
            timm's `create_dataset`, such as "" for a folder of class folders under train/ and val/, "hfds/..." or "wds/...".
        directory: where it is. CIFAR is fetched into it, by default $STABLE_DATA or runs/data.
        num_classes: of a dataset of timm's, which does not always know.

    Raises:
        ValueError: nothing there; num_classes missing.
    """
    if name in ("digits", "digits32"):
        digits, size = load_digits(), SIZES[name]
        images = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
        images = images.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
        test = np.arange(len(images)) % 5 == 4  # every fifth image
        parts = (Arrays(images[part], digits.target[part]) for part in (~test, test))
        return Data(*parts, num_classes=CLASSES[name], image_size=size, mirrored=False)
    if name in CLASSES:
        arrays = _cifar(name, directory or data_folder())
        return Data(*(Arrays(*part) for part in arrays), num_classes=CLASSES[name], image_size=SIZES[name])
    if num_classes is None:
        raise ValueError(f"num_classes is missing: data {name!r} is none of {', '.join(CLASSES)}")
    if directory is None or not directory.is_dir():
        raise ValueError(f"data_dir = {directory}: it has to be the directory of data {name!r}")
    parts = (create_dataset(name, directory, split, is_training=split == "train") for split in ("train", "validation"))
    return Data(*parts, num_classes=num_classes)


def _cifar(name: str, directory: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    packed = directory / f"{name}.npz"
    directory.mkdir(parents=True, exist_ok=True)
    if packed.exists():
        arrays = np.load(packed)
        return [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
    dataset = CIFAR10 if name == "cifar10" else CIFAR100
    parts = (dataset(directory, train=train, download=True) for train in (True, False))
    return [(part.data, np.array(part.targets)) for part in parts]


def train_transform(data: Data, settings: dict, **augmentation) -> Callable:
    """timm's, of `settings` as `timm.data.resolve_data_config` gives them; small images are padded and cropped [DeiT]."""
    settings = {name: settings[name] for name in ("input_size", "mean", "std", "interpolation")}
    transform = create_transform(
        **settings, is_training=True, hflip=0.5 if data.mirrored else 0.0, color_jitter=None, **augmentation
    )
    size = settings["input_size"][-1]
    if data.image_size == size <= PADDED_UP_TO:
        transform.transforms[0] = RandomCrop(size, padding=size // 8)
    for operation in (each for step in transform.transforms for each in getattr(step, "ops", ())):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """For timm's, which asks for 0 bits at full strength, a black image; Pillow refuses that since version 12."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def test_transform(data: Data, settings: dict) -> Callable:
    """timm's resize and centre crop; small images whole."""
    names = ("input_size", "mean", "std", "interpolation")
    crop = 1.0 if data.image_size else settings["crop_pct"]
    return create_transform(**{name: settings[name] for name in names}, crop_pct=crop)
