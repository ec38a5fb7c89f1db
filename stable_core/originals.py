"""Where a reparametrised weight W lives, and how W tells which parametrization it belongs to.

After an optimizer's step, which knows parameters and nothing else, the u of each weight must advance. So the parameter has an
attribute that leads to its parametrization; a search would take longer the more models there are. Where another parameter
takes its place (FSDP2, `to`, `load_state_dict(assign=True)`, a deep copy), that one gets the attribute.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

if TYPE_CHECKING:
    from .sigma_reparam import SigmaReparam

_ATTRIBUTE = "_sigma_reparam"  # the same in every copy of this source, so that `advance` reaches all of them


class Owner:
    """A weight's weak link to the list that holds it: a model that was folded or deleted leaves nothing behind."""

    __slots__ = ("_originals",)

    def __init__(self, originals: "Originals") -> None:
        self._originals = weakref.ref(originals)

    def parametrization(self) -> "SigmaReparam | None":
        """The SigmaReparam that follows the weight, or None where it was folded."""
        originals = self._originals()
        return None if originals is None else originals.first().leader()

    def __reduce__(self) -> tuple[Any, ...]:
        # A saved parameter takes its attributes along, and torch.load(weights_only=True) takes this class and no other.
        return OrderedDict, ()


def owner_of(weight: Tensor) -> Owner | None:
    """The link of a weight that `sigma_reparam` reparametrised, also of one that has its own copy of this source."""
    owner = getattr(weight, _ATTRIBUTE, None)
    return owner if owner is not None and hasattr(owner, "parametrization") else None


class Originals(ParametrizationList):
    """torch's list of the parametrizations of one weight; its parameters lead back to it."""

    @classmethod
    def take_over(cls, originals: ParametrizationList) -> "Originals":
        """Makes of torch's list one of these, in place."""
        taken: Any = originals
        taken.__class__ = cls
        taken._settle()
        return taken

    def first(self) -> Any:
        """The parametrization that makes W_hat: a SigmaReparam, or a JointMember."""
        return self._modules["0"]

    def forward(self) -> Tensor:
        if len(self._modules) == 1 and self.is_tensor:  # as torch does it, without asking for a second parametrization
            return self.first()(self.original)
        return super().forward()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None:
            self._settle()

    def __setattr__(self, name: str, value: Any) -> None:
        # It does nothing of its own. But without it FSDP2 would write parameters past `register_parameter`.
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Originals":
        super()._apply(fn, recurse)  # it may put new parameters in place of the old
        self._settle()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settle()

    def _settle(self) -> None:
        """Has its parameters lead to it, and tells its parametrization where they are."""
        for name, parameter in self._parameters.items():
            if name.startswith("original"):
                setattr(parameter, _ATTRIBUTE, Owner(self))
        self.first().attach(self)
