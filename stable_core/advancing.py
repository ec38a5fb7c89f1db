"""u and v of σReparam advance after each step (Algorithm 1): by hooks of every torch optimizer, and by hand."""

import functools
import weakref
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .power_iteration import power_iteration

_instances: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # SigmaReparam, all of them
_stepping: list[torch.optim.Optimizer] = []  # the outermost optimizer in its step first, then those it wraps


def track(instance: nn.Module) -> None:
    """From now on `instance`, a SigmaReparam, advances with the optimizers of its weights."""
    _hook_optimizers()
    _instances.add(instance)


@functools.cache
def _hook_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_optimizer_step)
    register_optimizer_step_post_hook(_after_optimizer_step)


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    if optimizer in _stepping:  # its last step ended in an exception
        del _stepping[_stepping.index(optimizer) :]
    _stepping.append(optimizer)


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    _stepping.remove(optimizer)
    if _stepping:  # SAM, Lookahead and ZeRO's optimizer step another one inside, and may change the weights after it
        return
    # A version counter cannot tell that a weight changed: some optimizers, fairseq's Adam among them, write to `.data`.
    advance(p for group in optimizer.param_groups if not _rests(group) for p in group["params"] if p.grad is not None)


def _rests(group: dict) -> bool:
    """Whether its learning rate is 0: in a schedule, or where torch fills a new optimizer's state to load or save it."""
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return False  # reading a GPU's would wait for it
    return lr == 0


def advance(parameters: Iterable[Tensor]) -> None:
    """Advances u and v of the σReparam weights among `parameters` by one step (Algorithm 1).

    torch optimizers that step the model's own parameters do this by themselves. Call it after each change of the weights
    by anything else: a loop without an optimizer, or one that steps a copy (fp32 masters) and copies the result back.
    """
    owner = {id(W): instance for instance in _instances for W in instance.originals()}
    together = defaultdict(list)
    # In the order of the parameters, which is the same on every rank: sharded weights need collectives.
    for instance in dict.fromkeys(owner[id(p)] for p in parameters if id(p) in owner):
        iterates, group = instance.iterates()
        together[instance.u.device, instance.config.n_power_iterations, group] += iterates
    for (_, n_power_iterations, group), iterates in together.items():
        power_iteration(iterates, n_power_iterations, group)
