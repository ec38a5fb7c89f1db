"""One optimizer, or several in a list, tuple or dict."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

log = logging.getLogger("stable_monitor")
Optimizers = torch.optim.Optimizer | list[Any] | tuple[Any, ...] | dict[Any, Any]


def listed(optimizers: Optimizers) -> list[Any]:
    """The optimizers as a list; any object with param_groups counts as one, such as a wrapper.

    Raises:
        ValueError: there is no optimizer, or one of them is something else.
    """
    found = list(optimizers.values()) if isinstance(optimizers, dict) else optimizers
    found = list(found) if isinstance(found, list | tuple) else [found]
    if not found or not all(isinstance(getattr(x, "param_groups", None), Iterable) for x in found):
        raise ValueError(
            f"optimizer = {short(optimizers)}: allowed are an optimizer, or several in a list, tuple or dict"
        )
    return found


def after_steps(
    optimizers: list[Any], call: Callable[[], Any], register: Callable[[Any, Callable[..., None]], RemovableHandle]
) -> list[RemovableHandle]:
    """Has `call` called when each of the optimizers has made a step, those in wrappers such as Accelerate's too.

    `register(optimizer, hook)` has a hook called after a step: `Optimizer.register_step_post_hook` before u of σReparam
    advances, `after_advance` when it has.

    Raises:
        ValueError: one of them takes no hook.
    """
    inside = [_with_hooks(optimizer) for optimizer in optimizers]
    waiting = set(range(len(optimizers)))

    def after(number: int, *_: Any) -> None:
        waiting.discard(number)
        if not waiting:
            waiting.update(range(len(optimizers)))
            call()

    return [register(inner, functools.partial(after, number)) for number, inner in enumerate(inside)]


def _with_hooks(optimizer: Any) -> Any:
    """The optimizer, or the one in its wrappers, that torch calls hooks of."""
    inner = optimizer
    while "_optimizer_step_post_hooks" not in vars(inner):
        if not hasattr(inner, "optimizer"):
            raise ValueError(
                f"optimizer = {short(optimizer)}: it takes no hook; give the one inside it, or call step yourself"
            )
        inner = inner.optimizer
    return inner


BESIDE = "beside"  # in a group that was made for new vectors: the number of the group whose learning rate it has


def place_without_decay(
    optimizers: list[Any], beside: list[nn.Parameter], scheduler: Any
) -> Callable[[dict[str, nn.Parameter]], None]:
    """Finds where new vectors belong that are trained with `beside`, at the same learning rate but without weight decay.

    That is a group which is so already; or else a new one, of which a scheduler must be told, as it keeps a number for each.
    Where one is at work and is not given, they join the group of `beside`, and decay as that does, with a warning. Beside Muon,
    which takes matrices alone, it is one of the other optimizer, at that one's learning rate.

    Returns:
        What adds parameters, by name, there. Nothing is changed before it is called.

    Raises:
        ValueError: no optimizer has `beside`, or Muon alone.
    """
    wanted = {id(p) for p in beside}
    found = [(o, g) for o in optimizers for g in o.param_groups if any(id(p) in wanted for p in g["params"])]
    if not found:
        name = short(optimizers[0] if len(optimizers) == 1 else optimizers)
        raise ValueError(f"optimizer = {name}: it does not train the layers' queries and keys; give the one that does")
    optimizer, own = found[0]
    if _takes_matrices_only(optimizer):
        others = [other for other in optimizers if not _takes_matrices_only(other)]
        if not others:
            raise ValueError(
                f"optimizer = {type(optimizer).__name__}: it takes no gammas, which are vectors; give the one beside it too"
            )
        optimizer, own = others[0], others[0].param_groups[0]
    for group in (own, *optimizer.param_groups):
        if not group.get("weight_decay") and group.get("lr") == own.get("lr"):
            return functools.partial(extend_group, group)
    index = next(i for i, group in enumerate(optimizer.param_groups) if group is own)

    def add(parameters: dict[str, nn.Parameter]) -> None:
        if parameters and "initial_lr" in own and scheduler is None:
            log.warning(
                "scheduler = None: a new group of the optimizer would be unknown to its scheduler, so that gammas are in one "
                "with a weight decay of %g; give rescue, or Rescue, the scheduler and they have none",
                own["weight_decay"],
            )
            extend_group(own, parameters)
        elif parameters:
            add_group(optimizer, {**own, "weight_decay": 0.0, BESIDE: index}, parameters)
            tell_scheduler(scheduler, index)

    return add


def extend_group(group: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Adds parameters, by name, to a group of an optimizer."""
    group["params"].extend(parameters.values())
    if "param_names" in group:  # the optimizer was given model.named_parameters()
        group["param_names"].extend(parameters)


def add_group(optimizer: Any, settings: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Adds a group of parameters, by name, to an optimizer. In `settings` "params" and "param_names" count for nothing."""
    named = any("param_names" in group for group in optimizer.param_groups)
    own = {key: value for key, value in settings.items() if key not in ("params", "param_names")}
    optimizer.add_param_group({**own, "params": list(parameters.items() if named else parameters.values())})


def _takes_matrices_only(optimizer: Any) -> bool:
    return "muon" in type(optimizer).__name__.lower()


# What torch's schedulers keep for each group.
PER_GROUP = ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def tell_scheduler(scheduler: Any, index: int) -> None:
    """Has a scheduler treat the optimizer's last group, which is new, as it treats group `index`."""
    for part in with_parts(scheduler):
        for name in PER_GROUP:
            if isinstance(numbers := getattr(part, name, None), list):
                numbers.append(numbers[index])


def with_parts(scheduler: Any) -> list[Any]:
    """A scheduler and, where it is made of others, those."""
    parts = [part for inner in getattr(scheduler, "_schedulers", ()) for part in with_parts(inner)]
    return parts if scheduler is None else [scheduler, *parts]


def short(x: Any) -> str:
    """repr(x) for an error of one line; the name of its type where that is too long."""
    text = repr(x)
    return text if len(text) <= 60 and "\n" not in text else type(x).__name__
