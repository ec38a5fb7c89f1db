"""What a sigma is of, said in the state dict: rows, orientation, and the weights that share it.

Shapes do not tell: [Wq; Wk; Wv] may be unequal, transformers' Conv1D keeps (in, out), a shared sigma is kept with one weight
of several. It is torch's extra state, which is no buffer: a buffer would be broadcast by DDP, averaged with the weights, and
garbage after `to_empty`. A key of our own that is no buffer would be unexpected to torch's distributed checkpoints and to
transformers, which both know extra state. It is a tensor, as safetensors takes nothing else, with the code of one character
of text in each number; of floats, since whoever adds, averages or halves all of a state dict leaves those readable, where
integers overflow or refuse. It costs nothing between saving and loading.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KEY = "_extra_state"  # torch's name for it


@dataclass(frozen=True)
class Layout:
    """What the sigma of one weight is of.

    Attributes:
        rows: outputs of each block, which has a sigma of its own.
        transposed: the weight is (in, out).
        members: where several weights share their sigmas, how they are called beside each other, as they are stacked.
        index: which of the members this weight is.
    """

    rows: tuple[int, ...]
    transposed: bool
    members: tuple[str, ...] = ()
    index: int = 0

    @classmethod
    def read(cls, state: Tensor, name: str) -> "Layout":
        """Of the weight `name`.

        Raises:
            ValueError: it is none.
        """
        try:
            said = json.loads(bytes(round(code) for code in state.tolist()))
            return cls(tuple(said["rows"]), said["transposed"], tuple(said.get("members", ())), said.get("index", 0))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(
                f"{name}: its {KEY} in the state dict is damaged; take that key out to go by shapes"
            ) from None

    def write(self, device: torch.device) -> Tensor:
        """What `read` reads, (characters,)."""
        said = {"rows": self.rows, "transposed": self.transposed}
        if self.members:
            said |= {"members": self.members, "index": self.index}
        codes = torch.tensor(list(json.dumps(said).encode()), dtype=torch.float32, device="cpu")
        return codes.to(device, non_blocking=True)  # an average of all of a state dict asks at each update

    def fits(self, other: "Layout") -> bool:
        """Whether the other's state means the same here; layers may have been renamed."""
        return self.rows == other.rows and self.transposed == other.transposed and self._place() == other._place()

    def _place(self) -> tuple[int, int]:
        return self.index, len(self.members)

    def __str__(self) -> str:
        shared = (
            f", shared by {', '.join(self.members)}, of which it is number {self.index + 1}" if self.members else ""
        )
        return f"sigmas of {', '.join(map(str, self.rows))} rows of {'(in, out)' if self.transposed else '(out, in)'}{shared}"


class HasLayout(nn.Module):
    """A parametrization that writes its layout into the state dict, and compares on loading.

    A subclass has a `name`, for its errors.
    """

    name: str

    def layout(self) -> Layout:
        """What its sigma is of."""
        raise NotImplementedError

    def leader(self) -> Any:
        """The parametrization that keeps the state."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        # torch's distributed checkpoints want all of a state dict on one device.
        return self.layout().write(self.leader().u.device)

    def set_extra_state(self, state: Any) -> None:
        """Raises ValueError where the state dict's is another."""
        # Of a model on the meta device; or torch's distributed checkpoints found none, and left a mark of their own.
        if not isinstance(state, Tensor) or state.is_meta:
            return
        theirs, ours = Layout.read(state, self.name), self.layout()
        if not (theirs.members or ours.members) and sum(theirs.rows) != sum(ours.rows):
            return  # a weight of another size, which the loader itself refuses, or leaves out where it was told to
        if not theirs.fits(ours):
            raise ValueError(
                f"{self.name}: the state dict has {theirs}, the model {ours}; build the model as it was when it was saved"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        if f"{prefix}{KEY}" in missing_keys:  # of a checkpoint from before there were layouts
            missing_keys.remove(f"{prefix}{KEY}")
