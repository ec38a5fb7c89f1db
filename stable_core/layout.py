"""The layout of a σReparam weight in the state dict: which rows each sigma is of, the orientation, which weights share a sigma.

Shapes cannot tell these: the blocks of [Wq; Wk; Wv] may be unequal, transformers' Conv1D keeps (in, out), and a sigma that
several weights share is stored with one of them. The layout is checked when a state dict is loaded.

It is stored as torch's extra state. A buffer would be broadcast by DDP, averaged with the weights, and garbage after
`to_empty`; any other key would be unexpected to torch's distributed checkpoints and to transformers. The text (JSON) is stored
as a tensor, because safetensors stores nothing else: one float for the code of each character. Floats stay readable where all
of a state dict is averaged or cast to half precision; integers would overflow or raise.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KEY = "_extra_state"  # torch's name for a module's extra state


@dataclass(frozen=True)
class Layout:
    """How one weight is cut into blocks, each with its own sigma.

    Attributes:
        rows: number of outputs of each block.
        transposed: whether the weight is (in, out).
        members: names (such as "q_proj") of the weights that share their sigmas, in the order in which they are stacked; empty
            for a weight by itself.
        index: the place of this weight among the members.
    """

    rows: tuple[int, ...]
    transposed: bool
    members: tuple[str, ...] = ()
    index: int = 0

    @classmethod
    def read(cls, state: Tensor, name: str) -> "Layout":
        """The layout that `write` stored as `state`; `name` is the weight's, for the error.

        Raises:
            ValueError: `state` does not hold a layout.
        """
        try:
            said = json.loads(bytes(round(code) for code in state.tolist()))
            return cls(tuple(said["rows"]), said["transposed"], tuple(said.get("members", ())), said.get("index", 0))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(
                f"{name}: its {KEY} in the state dict is damaged; take that key out to go by shapes"
            ) from None

    def write(self, device: torch.device) -> Tensor:
        """The layout as a float tensor (characters,), for `read`."""
        said = {"rows": self.rows, "transposed": self.transposed}
        if self.members:
            said |= {"members": self.members, "index": self.index}
        codes = torch.tensor(list(json.dumps(said).encode()), dtype=torch.float32, device="cpu")
        return codes.to(device, non_blocking=True)  # averages of a whole state dict call this at each update

    def fits(self, other: "Layout") -> bool:
        """Whether state saved with the layout `other` is valid with this one. Names may differ, as layers get renamed."""
        return self.rows == other.rows and self.transposed == other.transposed and self._place() == other._place()

    def _place(self) -> tuple[int, int]:
        return self.index, len(self.members)

    def __str__(self) -> str:
        shared = (
            f", shared by {', '.join(self.members)}, of which it is number {self.index + 1}" if self.members else ""
        )
        return f"sigmas of {', '.join(map(str, self.rows))} rows of {'(in, out)' if self.transposed else '(out, in)'}{shared}"


class HasLayout(nn.Module):
    """A parametrization that stores its layout in the state dict and compares it on loading.

    A subclass sets `name`, which its errors start with.
    """

    name: str

    def layout(self) -> Layout:
        """The layout of its weight."""
        raise NotImplementedError

    def leader(self) -> Any:
        """The parametrization that holds u and gamma: itself, or that of another weight which shares its sigma."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        # On the device of u: torch's distributed checkpoints want all of a state dict on one device.
        return self.layout().write(self.leader().u.device)

    def set_extra_state(self, state: Any) -> None:
        """Raises ValueError where the state dict has another layout than the model."""
        # No layout to compare: the state is a meta tensor, or what torch's distributed checkpoints put for a missing key.
        if not isinstance(state, Tensor) or state.is_meta:
            return
        theirs, ours = Layout.read(state, self.name), self.layout()
        if not (theirs.members or ours.members) and sum(theirs.rows) != sum(ours.rows):
            return  # a weight of another size: the loader refuses it, or skips it if told to
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
        if f"{prefix}{KEY}" in missing_keys:  # checkpoints of early versions have no layouts
            missing_keys.remove(f"{prefix}{KEY}")
