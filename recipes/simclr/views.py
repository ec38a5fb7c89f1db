"""What images go through: the random views of [σ, App. D.1], and the same numbers for the probe's."""

from lightly.transforms import GaussianBlur
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms import (
    ColorJitter,
    Compose,
    InterpolationMode,
    Normalize,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)

from recipes.vision.data import PADDED_UP_TO


def image_settings(encoder: VisionTransformer) -> dict:
    """Size, mean, deviation, interpolation and crop of the images, in timm's words; all variants have ImageNet's."""
    return {
        "input_size": (3, *encoder.patch_embed.img_size),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
    }


def random_view(images: dict, mirrored: bool, color_strength: float, crop_min: float) -> Compose:
    """PIL image -> tensor (3, height, width).

    Args:
        images: `image_settings`. Small ones are not blurred, as in SimCLR's experiments on CIFAR.
        mirrored: half of the views are from right to left.
        color_strength: 1 is SimCLR's.
        crop_min: least share of the image's area that a view shows.
    """
    size = images["input_size"][1:]
    jitter = ColorJitter(*(strength * color_strength for strength in (0.8, 0.8, 0.8, 0.2)))
    steps = [RandomResizedCrop(size, scale=(crop_min, 1), interpolation=InterpolationMode.BICUBIC)]
    if mirrored:
        steps.append(RandomHorizontalFlip())
    steps += [RandomApply([jitter], p=0.8), RandomGrayscale(p=0.2)]
    if min(size) > PADDED_UP_TO:
        steps.append(GaussianBlur(sigmas=(0.1, 2.0), prob=0.5))
    return Compose([*steps, ToTensor(), Normalize(images["mean"], images["std"])])
