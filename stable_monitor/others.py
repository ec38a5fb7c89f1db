"""After a rescue, σReparam for the layers that it did not bound: with gamma = sigma they compute what they did, and it is one
number a layer that the optimizer makes them grow by from then on."""

import logging
from typing import Any

from torch import nn

from stable_core.bounding import in_place
from stable_core.sharding import is_sharded
from stable_core.sigma_layers import sigma_layers
from stable_core.sigma_reparam import SigmaReparamConfig, sigma_reparam
from stable_core.targets import layers, those_left

from .compiled import unwrap
from .interception import without_wrappers
from .optimizers import place_without_decay
from .resume import average_gradients, gamma_name, note_gammas

log = logging.getLogger("stable_monitor")


def hold_others(model: nn.Module, optimizers: list[Any], scheduler: Any = None) -> None:
    """Gives σReparam to all plain layers that the optimizers train, in place; weights and their moments stay what they are.

    Where a layer cannot have it, no layer gets it, with a warning: a rescue does not fail for it.
    """
    inner = unwrap(model)
    known, left = {id(p) for p in inner.parameters()}, those_left(inner)
    plain = [t for t in layers(inner) if left(t.module, t.name) and not is_sharded(t.weight)]
    places, picked = [], set[int]()
    try:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            held = {id(p) for p in group["params"]}
            if own := [target for target in plain if id(target.weight) in held]:
                weights: list[Any] = [target.weight for target in own]
                places.append((held, place_without_decay(optimizers, weights, scheduler)))
                picked.update(id(target.module) for target in own)
        if not picked:
            return
        with in_place(inner):
            sigma_reparam(inner, SigmaReparamConfig(gamma_init="spectral"), lambda module, name: id(module) in picked)
    except ValueError as error:
        log.warning("the other layers stay as they are: %s", error)
        return
    new = {without_wrappers(name): sigma for name, sigma in sigma_layers(inner) if id(sigma.gamma) not in known}
    gammas: dict[str, Any] = {name: sigma.gamma for name, sigma in new.items()}
    for held, add in places:
        add({gamma_name(name): gammas[name] for name, sigma in new.items() if id(sigma.originals()[0]) in held})
    note_gammas(optimizers, gammas)
    average_gradients(model, list(gammas.values()))
    log.warning("σReparam of %d other layers too, which keeps what they compute", len(new))
