"""What the converters share: the proof that a converted model is the model it was converted from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4


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
