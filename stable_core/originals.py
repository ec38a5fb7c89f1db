"""Links each reparametrised parameter W to its parametrization.

After an optimizer's step the u of each changed weight must advance, but an optimizer knows parameters only. So each parameter
has an attribute that leads to its parametrization. Where another parameter takes its place (FSDP2, `to`,
`load_state_dict(assign=True)`, a deep copy), that one is given the attribute.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

if TYPE_CHECKING:
    from .sigma_reparam import SigmaReparam

_ATTRIBUTE = "_sigma_reparam"  # the same in all loaded copies of this package, so that `advance` reaches each


class Owner:
    """A parameter's weak reference to the Originals that holds it; weak, so that it keeps no folded or deleted model alive."""

    __slots__ = ("_originals",)

    def __init__(self, originals: "Originals") -> None:
        self._originals = weakref.ref(originals)

    def parametrization(self) -> "SigmaReparam | None":
        """The SigmaReparam with the weight's u, or None where the weight was folded."""
        originals = self._originals()
        return None if originals is None else originals.first().leader()

    def __reduce__(self) -> tuple[Any, ...]:
        # A parameter is pickled with its attributes. torch.load(weights_only=True) refuses this class but allows OrderedDict.
        return OrderedDict, ()


def owner_of(weight: Tensor) -> Owner | None:
    """The Owner of a weight under σReparam, also where another loaded copy of this package made it; else None."""
    owner = getattr(weight, _ATTRIBUTE, None)
    return owner if owner is not None and hasattr(owner, "parametrization") else None


class Originals(ParametrizationList):
    """torch's ParametrizationList of one weight, whose parameters have an Owner that leads back to it."""

    @classmethod
    def take_over(cls, originals: ParametrizationList) -> "Originals":
        """Turns torch's list into an Originals, in place, by changing its class."""
        taken: Any = originals
        taken.__class__ = cls
        taken._settle()
        return taken

    def first(self) -> Any:
        """The parametrization that makes W_hat: a SigmaReparam, or a JointMember."""
        return self._modules["0"]

    def forward(self) -> Tensor:
        if len(self._modules) == 1 and self.is_tensor:  # as torch's, less its search for a second parametrization
            return self.first()(self.original)
        return super().forward()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None:
            self._settle()

    def __setattr__(self, name: str, value: Any) -> None:
        # A class with its own __setattr__ makes FSDP2 set parameters by it, and so by `register_parameter`.
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Originals":
        super()._apply(fn, recurse)  # it may replace the parameters
        self._settle()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settle()

    def _settle(self) -> None:
        """Gives its parameters their Owner, and the parametrization a link to this list."""
        for name, parameter in self._parameters.items():
            if name.startswith("original"):
                setattr(parameter, _ATTRIBUTE, Owner(self))
        self.first().attach(self)
