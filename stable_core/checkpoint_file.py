"""Files that `torch.save` wrote, read with torch's safety on: nothing in them is executed."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """The dict in a file, its tensors on the CPU; options are those of `torch.load`.

    Raises:
        OSError: no such file, or one that may not be read.
        ValueError: it is cut short or of another kind, holds objects of other classes, or is no dict.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, **options)
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # of a damaged file, whatever its bytes lead to
        raise ValueError(f"{path}: {what_is_wrong(error)}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, not a state dict or a dict that holds one")
    return checkpoint


def what_is_wrong(error: Exception) -> str:
    """An error of `torch.load` in half a line; its own text has ten lines of advice."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and name:
        return f"holds {name[1]}, allowed are tensors, numbers, strings and collections of them"
    detail = "" if isinstance(error, pickle.UnpicklingError) else f" ({' '.join(str(error).split())[:100]})"
    return f"cut short, or not written by torch.save{detail}"
