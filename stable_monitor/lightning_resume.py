"""Lightning's checkpoint of a rescued run, loaded into a module and optimizers that are built as ever.

Lightning loads the module's state before it builds the optimizers. A run that goes on must build them of plain layers, as the
rescued run did, or their groups and order may differ: so the module's state waits until they are there.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

from stable_core.targets import layers
from stable_core.unfolding import reparametrised_in, unfold_state_dict

from .interception import without_wrappers
from .resume import NOTE, prepare_to_resume, reparametrise_named


class Resuming:
    """What a module's `on_load_checkpoint` does besides, from now until `close`.

    Args:
        module: the LightningModule.
        stage: "fit", where optimizers follow, for which `finish` is to be called; or "validate", "test", "predict".
    """

    def __init__(self, module: Any, stage: str) -> None:
        self._module, self._stage = module, stage
        self._state: dict[str, Any] | None = None  # the module's, while it waits for the optimizers
        self._saved: list[dict[str, Any]] = []  # those of the optimizers
        own = module.on_load_checkpoint

        def load(checkpoint: dict[str, Any]) -> None:
            own(checkpoint)
            self._load(checkpoint)

        self.close = replace(module, "on_load_checkpoint", load)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        if self._stage != "fit":
            _reparametrise_as_in(self._module, checkpoint["state_dict"])
            # the best checkpoint may be from before the rescue
            checkpoint["state_dict"] = unfold_state_dict(self._module, checkpoint["state_dict"])
            return
        saved = checkpoint.get("optimizer_states", [])
        if any(group.get(NOTE) for one in saved for group in one["param_groups"]):
            self._saved = saved
            self._state, checkpoint["state_dict"] = checkpoint["state_dict"], self._module.state_dict()

    def finish(self, model: nn.Module, optimizers: list[Any], schedulers: list[Any]) -> None:
        """Before the optimizers load their state: brings them and the module into the shape that was saved.

        Args:
            model: what the strategy calls: the module, or that in DistributedDataParallel.
            optimizers, schedulers: all that the Trainer has.
        """
        if self._state is None:
            return
        prepare_to_resume(model, optimizers, self._saved, together(schedulers))
        self._module.load_state_dict(self._state, strict=self._module.strict_loading)
        self._state, self._saved = None, []


def _reparametrise_as_in(module: nn.Module, state: dict[str, Any]) -> None:
    """Gives σReparam to the plain layers that have it in a state dict, where a compiled part may be there twice."""
    known = {without_wrappers(target.name) for target in layers(module)}
    reparametrise_named(module, [name for name in map(without_wrappers, reparametrised_in(state)) if name in known])


def together(schedulers: list[Any]) -> Any:
    """The schedulers as one, made of parts, as torch's SequentialLR is; None where there are none."""
    return SimpleNamespace(_schedulers=schedulers) if schedulers else None


def replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Gives an object an attribute of its own in the place of what it has by that name; returns what undoes it."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    vars(owner)[name] = value

    def undo() -> None:
        vars(owner).pop(name, None)
        vars(owner).update(before)

    return undo
