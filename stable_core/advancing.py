"""When u of σReparam advances: one power iteration after each step of an optimizer [σ, Algorithm 1].

Hooks on every torch optimizer do it for the weights that a step may have changed, so that u advances at least once for each
change of a weight; `advance` does it by hand. Where one step is made inside of another (SAM, Lookahead, ZeRO's optimizers, a
step that calls `super().step()`), only the end of the outermost counts, so that all ranks do the same. A weight that changes
without a step is noticed in the forward pass (watching.py).
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .kernels import advance as advance_in_kernels
from .kernels import plan as plan_of
from .originals import Owner, owner_of
from .power_iteration import power_iteration
from .watching import LAG

if TYPE_CHECKING:
    from .sigma_reparam import SigmaReparam


@functools.cache
def hook_optimizers() -> None:
    """From now on every torch optimizer's step advances what it changed."""
    register_optimizer_step_pre_hook(_before_optimizer_step)
    register_optimizer_step_post_hook(_after_optimizer_step)


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        followed = _followed(group["params"])
        if _rests(group):
            for parametrization in followed:
                parametrization.before_rest = _images(parametrization)
        else:
            for parametrization in followed:
                parametrization.watch.announce()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # All of an optimizer's weights count as changed, because nothing tells which ones did: some optimizers clear gradients, and
    # others (fairseq's Adam) write to `.data`, which version counters do not see.
    changed: dict[SigmaReparam, None] = {}
    around: set[int] = set()
    for outer in _steps_around():
        around.update(id(p) for group in outer.param_groups for p in group["params"])
    for group in optimizer.param_groups:
        for parametrization in _followed(p for p in group["params"] if id(p) not in around):
            if not _rests(group) or _changed_at_rest(parametrization):
                changed[parametrization] = None
    _advance(changed)


def _steps_around() -> Iterator[torch.optim.Optimizer]:
    """The optimizers in whose steps the step that ends now was made.

    They are read off the call stack. A list of the steps that have begun would also hold those that ended in an error.
    """
    frame: FrameType | None = sys._getframe(2)  # the step's own frame, after this function's and the hook's
    while frame and (frame := frame.f_back):
        if frame.f_code is _STEP:
            yield frame.f_locals["self"]


_STEP = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__  # what torch wraps around each step


def _followed(weights: Iterable[Tensor]) -> "Iterator[SigmaReparam]":
    """The parametrizations of the weights that learn; those of another copy of this source have hooks of their own."""
    for weight in weights:
        owner = owner_of(weight)
        if isinstance(owner, Owner) and weight.requires_grad:
            parametrization = owner.parametrization()
            if parametrization is not None:
                yield parametrization


def _rests(group: dict[str, Any]) -> bool:
    """Whether the group's learning rate is 0, so that its step may have changed nothing.

    That is so at points of a schedule; in a wrapper whose inner optimizer has the true rate; and in the step that torch makes
    to fill a new optimizer's state before it loads or saves it. The model may have been loaded by then, and u must stay as
    it was loaded.
    """
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return False  # reading a GPU's would wait for it
    return lr == 0


@torch.no_grad()
def _images(parametrization: "SigmaReparam") -> list[Tensor]:
    """W^T u of each block, from the parts of W on this process. It tells whether W changed."""
    return [iterate.Wt_u() for iterate in parametrization.iterates()[0]]


def _changed_at_rest(parametrization: "SigmaReparam") -> bool:
    before, parametrization.before_rest = parametrization.before_rest, None
    if before is None:
        return True
    changed = not all(torch.equal(old, new) for old, new in zip(before, _images(parametrization), strict=True))
    _, group = parametrization.iterates()
    if group is not None:  # of a sharded weight any part may have changed, and all processes must go the same way
        flag = torch.tensor(float(changed), device=parametrization.u.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        changed = bool(flag)
    return changed


def advance(parameters: Iterable[Tensor]) -> None:
    """Advances u of the σReparam weights among `parameters` by one step (Algorithm 1).

    torch optimizers that step the model's own parameters do this by themselves. Call it after each change of the weights
    by anything else: a loop without an optimizer, or one that steps a copy (fp32 masters) and copies the result back.
    """
    owners = [owner for owner in map(owner_of, parameters) if owner is not None]
    _advance(dict.fromkeys(found for owner in owners if (found := owner.parametrization()) is not None))


def _advance(parametrizations: "Iterable[SigmaReparam]") -> None:
    fused, together = defaultdict(list), defaultdict(list)
    # In the order of the parameters, which is the same on every rank, as sharded weights are summed over the ranks.
    for parametrization in parametrizations:
        parametrization.together.drop()
        n, W = parametrization.config.n_power_iterations, parametrization.lone_weight()
        if W is not None and parametrization.takes_kernels(W) and W.is_contiguous():
            fused[W.device, W.dtype, n].append((parametrization, W))
        else:
            iterates, group = parametrization.iterates()
            together[parametrization.u.device, n, group].append((parametrization, iterates))
    for (device, dtype, n), members in fused.items():
        plan = plan_of(tuple([parametrization.place(W)[0] for parametrization, W in members]), device, dtype)
        at_least = advance_in_kernels(plan, dtype, n).split(plan.blocks)
        torch.autograd.graph.increment_version([parametrization.u for parametrization, _ in members])
        for (parametrization, W), sigma in zip(members, at_least, strict=True):
            parametrization.watch.expect([W], sigma, slack=LAG)
    for (_, n, group), others in together.items():
        every = [iterate for _, iterates in others for iterate in iterates]
        _, at_least = power_iteration(every, n, group)
        sigmas = at_least.split([len(iterates) for _, iterates in others])
        for (parametrization, _), sigma in zip(others, sigmas, strict=True):
            parametrization.advanced(parametrization.originals(), sigma)
