"""Reads files of `torch.save` with weights_only=True, so that no code in them is executed."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """The dict in a file, with its tensors on the CPU; `options` are passed to `torch.load`.

    Raises:
        OSError: the file does not exist, or may not be read.
        ValueError: it is cut short, was not written by `torch.save`, holds objects that torch refuses, or is no dict.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, **options)
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file may cause any error
        raise ValueError(f"{path}: {what_is_wrong(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, not a state dict or a dict that holds one")
    return checkpoint


def what_is_wrong(error: Exception) -> str:
    """A short text for an error of `torch.load`, whose own text has ten lines."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and name:
        return f"holds {name[1]}, allowed are tensors, numbers, strings and collections of them"
    detail = "" if isinstance(error, pickle.UnpicklingError) else f" ({' '.join(str(error).split())[:100]})"
    return f"cut short, or not written by torch.save{detail}"
