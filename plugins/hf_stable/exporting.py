"""A folder that loads where this library is not, written whole or not at all."""

import copy
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from .reparametrised import fold, record


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    folded: bool = False,
    processors: tuple = (),
    files: Iterable[Path] = (),
) -> Path:
    """Writes weights, configuration, source and `processors` (tokenizers, image processors) to `folder`, all or nothing.

    Args:
        model: one of this plugin's; or any other, folded if it is reparametrised.
        folder: new or empty.
        folded: fold σReparam into plain weights, which cost nothing to serve; `model` itself is not changed.
        files: to be copied as they are, but not over what is written.

    Raises:
        ValueError: `folder` is a file or not empty; nothing to fold; a model of `hf_stable.sigma_reparam` is not folded.
    """
    folder = Path(folder).absolute()
    check_vacant(folder)
    record(model)
    if folded:
        model = fold(copy.deepcopy(model))
    elif getattr(model.config, "quantization_config", None) is not None:  # where sigma_reparam says what it did
        what = f"{type(model).__name__} with σReparam by sigma_reparam"
        raise ValueError(f"{what}: only folded does it load without this library; allowed is folded=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        whole = Path(scratch, folder.name)
        for part in (model, *processors):
            part.save_pretrained(whole)
        for file in files:
            if not (whole / file.name).exists():
                shutil.copyfile(file, whole / file.name)
        if not folder.exists():
            whole.replace(folder)
        else:  # it may be the working directory, a link or a mount
            for path in whole.iterdir():
                shutil.move(path, folder)
    return folder


def check_vacant(folder: str | Path) -> None:
    """Raises ValueError unless `folder` is new or empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: allowed is a new or an empty folder")
