"""One optimizer, or several in a list, tuple or dict."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

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


def after_steps(optimizers: list[Any], call: Callable[[], Any]) -> list[RemovableHandle]:
    """Has `call` called when each of the optimizers has made a step, those in wrappers such as Accelerate's too.

    Raises:
        ValueError: one of them takes no hook.
    """
    waiting = set(range(len(optimizers)))
    handles: list[RemovableHandle] = []

    def after(number: int, *_: Any) -> None:
        waiting.discard(number)
        if not waiting:
            waiting.update(range(len(optimizers)))
            call()

    for number, optimizer in enumerate(optimizers):
        inner = optimizer
        while "_optimizer_step_post_hooks" not in vars(inner) and hasattr(inner, "optimizer"):
            inner = inner.optimizer
        try:
            handles.append(inner.register_step_post_hook(functools.partial(after, number)))
        except AttributeError as error:
            for handle in handles:
                handle.remove()
            raise ValueError(
                f"optimizer = {short(optimizer)}: it takes no hook ({error}); give the one inside it, or call step yourself"
            ) from None
    return handles


def place_without_decay(
    optimizers: list[Any], beside: list[nn.Parameter], scheduler: Any
) -> Callable[[list[nn.Parameter]], None]:
    """Finds where new vectors belong that are trained with `beside`, at the same learning rate but without weight decay.

    That is a group which is so already; or else a new one, of which a scheduler must be told, as it keeps a number for each.
    Beside Muon, which takes matrices alone, it is one of the other optimizer, at that one's learning rate.

    Returns:
        What adds parameters there. Nothing is changed before it is called.

    Raises:
        ValueError: no optimizer has `beside`, or Muon alone; a new group is needed, a scheduler is at work, and was not given.
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
            return group["params"].extend
    if "initial_lr" in own and scheduler is None:
        raise ValueError(
            "scheduler = None: every group of the optimizer has weight decay, which gammas must not have, and its scheduler "
            "must learn of a new group"
        )
    index = next(i for i, group in enumerate(optimizer.param_groups) if group is own)

    def add(parameters: list[nn.Parameter]) -> None:
        if parameters:
            optimizer.add_param_group({**own, "params": parameters, "weight_decay": 0.0})
            tell_scheduler(scheduler, index)

    return add


def _takes_matrices_only(optimizer: Any) -> bool:
    return "muon" in type(optimizer).__name__.lower()


def tell_scheduler(scheduler: Any, index: int) -> None:
    """Has a scheduler treat the optimizer's last group, which is new, as it treats group `index`."""
    for part in with_parts(scheduler):
        for name in ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs"):
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
