"""After a rescue, σReparam for the layers that it did not bound: with gamma = sigma they compute what they did, and it is one
number a layer that the optimizer makes them grow by from then on."""

import logging
from typing import Any

from torch import nn

from stable_core.bounding import in_place
from stable_core.sigma_layers import sigma_layers
from stable_core.sigma_reparam import SigmaReparamConfig, sigma_reparam
from stable_core.targets import FilterFn, layers, those_left

from .compiled import unwrap
from .interception import without_wrappers
from .optimizers import place_without_decay
from .resume import average_gradients, gamma_name, note_gammas

log = logging.getLogger("stable_monitor")


def reparametrise_others(model: nn.Module, optimizers: list[Any], scheduler: Any = None) -> None:
    """`reparametrise` of all plain layers that the optimizers train; where one cannot have it none gets it, with a warning."""
    inner = unwrap(model)
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    left = those_left(inner)
    picked = {t.module for t in layers(inner) if left(t.module, t.name) and id(t.weight) in trained}
    if not picked:
        return
    try:
        names = reparametrise(model, optimizers, lambda module, name: module in picked, scheduler)
    except ValueError as error:  # a rescue does not fail for it
        log.warning("the other layers stay as they are: %s", error)
        return
    log.warning("σReparam of %d other layers too, which keeps what they compute", len(names))


def reparametrise(model: nn.Module, optimizers: list[Any], filter_fn: FilterFn, scheduler: Any = None) -> list[str]:
    """Gives σReparam with gamma = sigma to the layers that filter_fn picks, in place, and returns their names.

    Weights and their moments stay what they are. Each gamma is trained beside its weight, where that is trained.

    Raises:
        ValueError: as `sigma_reparam` and `place_without_decay`. Nothing has changed then.
    """
    inner = unwrap(model)
    known, places = {id(p) for p in inner.parameters()}, []
    weights: list[Any] = [target.weight for target in layers(inner) if filter_fn(target.module, target.name)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        held = {id(p) for p in group["params"]}
        if own := [W for W in weights if id(W) in held]:
            places.append((held, place_without_decay(optimizers, own, scheduler)))
    with in_place(inner):
        sigma_reparam(inner, SigmaReparamConfig(gamma_init="spectral"), filter_fn)
    new = {without_wrappers(name): sigma for name, sigma in sigma_layers(inner) if id(sigma.gamma) not in known}
    gammas: dict[str, Any] = {name: sigma.gamma for name, sigma in new.items()}
    for held, add in places:
        add({gamma_name(name): gammas[name] for name, sigma in new.items() if id(sigma.originals()[0]) in held})
    note_gammas(optimizers, gammas)
    average_gradients(model, list(gammas.values()))
    return list(new)
