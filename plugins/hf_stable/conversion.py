"""What the converters share: the proof that a converted model is the model it was converted from."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

TOLERANCE = 1e-4


def from_pretrained_whole(
    cls: type[PreTrainedModel], source: str | Path | None, *, name: str = "", **arguments
) -> PreTrainedModel:
    """`cls.from_pretrained`, of weights that are every tensor of the model and no more; `name` is where they come from.

    Raises:
        ValueError: a tensor is missing, too much, or of another shape, or the file is damaged; transformers warns at most.
    """
    name, arguments = name or str(source), {"ignore_mismatched_sizes": True, "output_loading_info": True, **arguments}
    try:
        model, report = cls.from_pretrained(source, **arguments)
    except SafetensorError as error:
        raise ValueError(f"{name}: a file of weights is damaged: {error}") from error
    for kind, what in (("missing", "lacks"), ("mismatched", "has in another shape"), ("unexpected", "has too much")):
        if keys := sorted(key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"]):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{name} {what} {keys[0]}{more}: these are not the weights of a {cls.__name__}")
    return model


def load_whole(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Every tensor of `model` from `state`, and every tensor of `state`.

    Raises:
        ValueError: one is missing, too much, or of another shape: `source` has an option that `model` has not.
    """
    own = model.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        where = "has" if name in state else "lacks"
        raise ValueError(f"{source} {where} {name}: an option that {type(model).__name__} does not know")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{source}: {name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    model.load_state_dict(state)


def check_equal(ours: Tensor, theirs: Tensor, source: str) -> float:
    """The largest difference of two outputs; raises ValueError above 1e-4."""
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{source}: the converted model's outputs differ by {difference:.2g}, allowed is {TOLERANCE:g}"
        )
    return difference


def tokens_like(vocab_size: int, length: int) -> Tensor:
    """Token ids (2, length) to compare language models on."""
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
