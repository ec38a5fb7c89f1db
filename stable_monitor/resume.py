"""What the checkpoint of a rescued run says of its gammas, and how a run that is built as ever takes it.

The saved optimizer names them: a group that a rescue added gammas to has their layers' names under "rescued", in their order.
They are those of the model that is not compiled, where blocks are.
"""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stable_core.bounding import in_place
from stable_core.sigma_layers import sigma_layers
from stable_core.sigma_reparam import SigmaReparamConfig, sigma_reparam
from stable_core.targets import layers
from stable_core.unfolding import plain_parameters

from .compiled import unwrap
from .interception import without_wrappers
from .optimizers import BESIDE, Optimizers, add_group, extend_group, listed, tell_scheduler

NOTE = "rescued"


def gamma_name(layer: str) -> str:
    """What an optimizer that keeps names of parameters calls a layer's gamma."""
    return f"{layer}.gamma"


def note_gammas(optimizers: list[Any], gammas: dict[str, Any]) -> None:
    """Writes the names of gammas, by layer, into the groups that hold them."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        held = {id(p) for p in group["params"]}
        if names := [name for name, gamma in gammas.items() if id(gamma) in held]:
            group[NOTE] = [*group.get(NOTE, []), *names]


def prepare_to_resume(model: nn.Module, optimizer: Optimizers, saved: Any, scheduler: Any = None) -> list[str]:
    """Brings a model and its optimizer, which were built as ever, into the shape in which a rescued run saved them, in place.

        prepare_to_resume(model, optimizer, checkpoint["optimizer"])  # does nothing where there was no rescue
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    Args:
        model: plain, compiled, or in DistributedDataParallel.
        optimizer: one or several, as they were given to `rescue`.
        saved: what its `state_dict()` was; of several a list, tuple or dict.
        scheduler: as for `rescue`.

    Returns:
        The names of the layers that were rescued.

    Raises:
        ValueError: the model has no such layer.
    """
    optimizers, inner = listed(optimizer), unwrap(model)
    several = [saved] if isinstance(saved, Mapping) and "param_groups" in saved else _values(saved)
    noted = [
        (trained_by, index, group)
        for trained_by, state in zip(optimizers, several, strict=True)
        for index, group in enumerate(state["param_groups"])
        if group.get(NOTE)
    ]
    names = [name for _, _, group in noted for name in group[NOTE]]
    new = reparametrise_named(inner, names)
    found = {name: sigma.gamma for name, sigma in sigma_layers(inner) if without_wrappers(name) in names}
    for trained_by in optimizers if noted else ():
        _forget_gammas(inner, trained_by, found)
    gammas: dict[str, Any] = {without_wrappers(name): gamma for name, gamma in found.items()}
    for trained_by, index, group in noted:
        added = {gamma_name(name): gammas[name] for name in group[NOTE]}
        if index < len(trained_by.param_groups):
            extend_group(trained_by.param_groups[index], added)
        else:
            add_group(trained_by, group, added)
            tell_scheduler(scheduler, group.get(BESIDE, 0))
    average_gradients(model, [gammas[name] for name in new])
    return names


def _forget_gammas(model: nn.Module, optimizer: Any, gammas: Mapping[str, Any]) -> None:
    """Gives an optimizer that was built after the model was reparametrised the parameters, in their order, that it has without.

    In a reparametrised layer the weight comes after the bias, else before it.
    """
    moved = {id(gamma) for gamma in gammas.values()}
    now = {id(p): place for place, p in enumerate(model.parameters())}
    before = {id(p): place for place, p in enumerate(plain_parameters(model, gammas))}
    for group in optimizer.param_groups:
        names = group.get("param_names", group["params"])
        kept = [(p, name) for p, name in zip(group["params"], names, strict=True) if id(p) not in moved]
        places = [now.get(id(p), -1) for p, _ in kept]
        if places == sorted(places):  # so it was built after
            kept.sort(key=lambda pair: before.get(id(pair[0]), -1))
        if "param_names" in group:
            group["param_names"][:] = [name for _, name in kept]
        group["params"][:] = [p for p, _ in kept]


def reparametrise_named(model: nn.Module, names: list[str]) -> list[str]:
    """Gives σReparam, as a rescue does, to those of the named layers that are plain, and returns their names.

    Raises:
        ValueError: the model has no such layer.
    """
    there = {without_wrappers(name) for name, _ in sigma_layers(model)}
    missing = [name for name in dict.fromkeys(names) if name not in there]
    if not missing:
        return []
    known = {without_wrappers(target.name): target.module for target in layers(model)}
    if unknown := [name for name in missing if name not in known]:
        raise ValueError(f"{unknown[0]}: the checkpoint of a rescued run has it, and the model has no such layer")
    picked = {id(known[name]) for name in missing}
    with in_place(model):
        sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"), lambda module, name: id(module) in picked)
    return missing


def _values(saved: Any) -> list[Any]:
    return list(saved.values()) if isinstance(saved, Mapping) else list(saved)


def average_gradients(model: nn.Module, gammas: list[Any]) -> None:
    """DistributedDataParallel knows the parameters that were there when it was made. A gamma's gradient, accumulated or not,
    becomes the mean over processes as theirs do."""
    for group in (module.process_group for module in model.modules() if isinstance(module, DistributedDataParallel)):

        def average(p: Any, group: Any = group) -> None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)

        for gamma in gammas:
            gamma.register_post_accumulate_grad_hook(average)
