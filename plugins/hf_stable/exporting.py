"""A folder that loads where this library is not, written whole or not at all."""

import copy
import tempfile
from pathlib import Path

from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from .modeling_stable import StablePreTrainedModel
from .reparametrised import fold


def export(model: PreTrainedModel, folder: str | Path, *, folded: bool = False, processors: tuple = ()) -> Path:
    """Writes weights, configuration, source and `processors` (tokenizers, image processors) to `folder`, all or nothing.

    Args:
        model: one of this plugin's; or any other, folded if it is reparametrised.
        folder: new or empty.
        folded: fold σReparam into plain weights, which cost nothing to serve; `model` itself is not changed.

    Raises:
        ValueError: `folder` is a file or not empty; nothing to fold; a reparametrised model of another library is not folded.
    """
    folder = Path(folder)
    check_vacant(folder)
    if folded:
        model = fold(copy.deepcopy(model))
    elif not isinstance(model, StablePreTrainedModel) and any(parametrize.is_parametrized(m) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__}: only folded does it load without this library; allowed is folded=True"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        whole = Path(scratch, folder.name)
        for part in (model, *processors):
            part.save_pretrained(whole)
        whole.replace(folder)
    return folder


def check_vacant(folder: str | Path) -> None:
    """Raises ValueError unless `folder` is new or empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: allowed is a new or an empty folder")
