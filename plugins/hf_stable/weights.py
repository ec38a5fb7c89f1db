"""The files of weights in a folder of transformers'."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from stable_core.checkpoint_file import read_checkpoint


def weight_files(folder: str | Path) -> list[Path]:
    """One, or those that an index names; none where there are no weights of a whole model."""
    folder = Path(folder)
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return [folder / name]
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
    return []


def weight_names(folder: str | Path) -> set[str]:
    names: set[str] = set()
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                names.update(weights.keys())
        else:
            names.update(read_checkpoint(file, mmap=True))
    return names


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All of them, on the CPU."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights.update(load_file(file) if file.suffix == ".safetensors" else read_checkpoint(file))
    return weights
