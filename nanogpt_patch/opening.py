"""Opens what nanoGPT's train.py saves, for `python -m stable_monitor.rescue_checkpoint`."""

import contextlib
import io
from pathlib import Path

import torch

from stable_core.checkpoint_file import read_checkpoint
from stable_core.options import renamed
from stable_monitor import prepare_to_resume
from stable_monitor.rescue_checkpoint import Opened

from .model import GPT, SETTINGS, STOCK, GPTConfig


def is_mine(path: Path) -> bool:
    """Whether a file is a ckpt.pt; of stock nanoGPT too."""
    try:
        return path.is_file() and {"model", "model_args", "iter_num"} <= read_checkpoint(path, mmap=True).keys()
    except ValueError:
        return False


def open_checkpoint(path: Path) -> Opened:
    """The checkpoint in memory; its optimizer is grouped as the model does."""
    checkpoint = read_checkpoint(path)
    state = {name.removeprefix("_orig_mod."): x for name, x in checkpoint["model"].items()}
    with contextlib.redirect_stdout(io.StringIO()):  # counts of parameters
        model = GPT(GPTConfig(**{**SETTINGS, **STOCK, **renamed(checkpoint["model_args"])}))
        optimizer = model.configure_optimizers(0.0, 0.0, (0.9, 0.95), "cpu")
    model.load_state_dict(state)
    prepare_to_resume(model, optimizer, checkpoint["optimizer"])
    optimizer.load_state_dict(checkpoint["optimizer"])

    def save(out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**checkpoint, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, out)

    return Opened(model, optimizer, save)
