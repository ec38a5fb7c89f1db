"""Advances u of σReparam by power iteration after each step of an optimizer [σ, Algorithm 1].

Hooks on every torch optimizer do this for the weights that the step may have changed; `advance` does it by hand. Where one
optimizer's step runs inside another's (SAM, Lookahead, ZeRO, a step that calls `super().step()`), u advances at the end of the
outermost step only, so that all ranks do the same. A weight that changes without a step is noticed in the forward pass
(watching.py).
"""

import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .kernels import advance as advance_in_kernels
from .kernels import plan as plan_of
from .originals import Owner, owner_of
from .power_iteration import power_iteration
from .watching import AWAITS, LAG

if TYPE_CHECKING:
    from .sigma_reparam import SigmaReparam


@functools.cache
def hook_optimizers() -> None:
    """Registers the two hooks, once per process, on the steps of all torch optimizers."""
    register_optimizer_step_pre_hook(_before_optimizer_step)
    register_optimizer_step_post_hook(_after_optimizer_step)
    register_optimizer_step_post_hook(_after_advance)


def after_advance(optimizer: torch.optim.Optimizer, hook: Callable[..., None]) -> RemovableHandle:
    """Registers hook(optimizer, args, kwargs) to be called after each step of an optimizer, when u has advanced.

    torch calls a hook that is registered with the optimizer itself before that: what it runs the model for would see a u that
    is one step behind the weights.
    """
    hook_optimizers()
    hooks = vars(optimizer).setdefault(AFTER, OrderedDict())  # with the optimizer, so that they end with it
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


AFTER = "_after_advance_of_sigma_reparam"


def _after_advance(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for hook in list(vars(optimizer).get(AFTER, {}).values()):
        hook(optimizer, args, kwargs)


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    begins: list[SigmaReparam] = []  # whose weights the step may change
    for group in optimizer.param_groups:
        followed = _followed(group["params"])
        if _rests(group):
            for parametrization in followed:
                parametrization.before_rest = _images(parametrization)
        else:
            begins += followed
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not begins or not callable(closure):
        _announce(begins)
        return None
    for parametrization in begins:
        parametrization.watch.is_stepped = True

    @functools.wraps(closure)
    def evaluated(*given: Any, **settings: Any) -> Any:
        # Lightning runs the model in here. The weights are what the last step left, and u must not advance for them again.
        value = closure(*given, **settings)
        _announce(begins)
        return value

    args = tuple(evaluated if value is closure else value for value in args)
    return args, {name: evaluated if value is closure else value for name, value in kwargs.items()}


def _announce(begins: "list[SigmaReparam]") -> None:
    for parametrization in begins:
        parametrization.watch.announce()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # All of an optimizer's weights count as changed, because nothing tells which ones did: some optimizers clear gradients, and
    # others (fairseq's Adam) write to `.data`, which version counters do not see.
    around: set[int] = set()
    for outer in _steps_around():
        around.update(id(p) for group in outer.param_groups for p in group["params"])
    rest: dict[SigmaReparam, bool] = {}  # whether all groups that hold a weight of it do; weights may share a sigma
    for group in optimizer.param_groups:
        for parametrization in _followed(p for p in group["params"] if id(p) not in around):
            rest[parametrization] = rest.get(parametrization, True) and _rests(group)
            parametrization.watch.is_stepped = False  # also where the closure was never called
    if unproven := [found for found, rests in rest.items() if found.unproven and not rests]:
        _prove_gammas(optimizer, unproven)
    _advance([found for found, rests in rest.items() if not rests or _changed_at_rest(found)])


@torch._disable_dynamo
def _prove_gammas(optimizer: torch.optim.Optimizer, unproven: "list[SigmaReparam]") -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parametrization in unproven:
        parametrization.prove_gamma(id(parametrization.gamma) in held)


def _steps_around() -> Iterator[torch.optim.Optimizer]:
    """The optimizers whose `step` is still running and called, directly or not, the step that ends now.

    They are read off the call stack: a list kept by the hooks would also hold steps that ended in an error.
    """
    frame: FrameType | None = sys._getframe(2)  # the step's own frame, after this function's and the hook's
    while frame and (frame := frame.f_back):
        if frame.f_code is _STEP:
            yield frame.f_locals["self"]


_STEP = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__  # what torch wraps around each step


def _followed(weights: Iterable[Tensor]) -> "Iterator[SigmaReparam]":
    """The parametrizations of those `weights` that learn; other loaded copies of this package have hooks for theirs."""
    for weight in weights:
        owner = owner_of(weight)
        if isinstance(owner, Owner) and weight.requires_grad:
            parametrization = owner.parametrization()
            if parametrization is not None:
                yield parametrization
        elif AWAITS in vars(weight):  # a gamma, which this optimizer holds
            delattr(weight, AWAITS)


def _rests(group: dict[str, Any]) -> bool:
    """Whether the group's learning rate is 0, so that its step may have changed nothing.

    A learning rate is 0 at some points of a schedule, in a wrapper whose inner optimizer has the real one, and in the step
    with which torch creates a new optimizer's state before it loads or saves that. The model may have been loaded before, and
    its u must not advance then.
    """
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return False  # to read a learning rate on a GPU would wait for the GPU
    return lr == 0


@torch.no_grad()
def _images(parametrization: "SigmaReparam") -> list[Tensor]:
    """W^T u (in,) of each block, from the parts of W on this process; whether it changes shows whether W did."""
    return [iterate.Wt_u() for iterate in parametrization.iterates()[0]]


def _changed_at_rest(parametrization: "SigmaReparam") -> bool:
    """Whether W changed in a step at a learning rate of 0; True where nothing was recorded before the step."""
    before, parametrization.before_rest = parametrization.before_rest, None
    if before is None:
        return True
    changed = not all(torch.equal(old, new) for old, new in zip(before, _images(parametrization), strict=True))
    _, group = parametrization.iterates()
    if group is not None:  # parts on other processes may have changed, and all processes must decide alike
        flag = torch.tensor(float(changed), device=parametrization.u.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        changed = bool(flag)
    return changed


def advance(parameters: Iterable[Tensor]) -> None:
    """Advances u of the σReparam weights among `parameters` by `n_power_iterations` [σ, Algorithm 1].

    This runs by itself after the step of a torch optimizer that holds the model's own parameters. Call it after weights changed
    in another way: in a loop without an optimizer, or with an optimizer of fp32 copies, which are then copied back.

    Args:
        parameters: such as `model.parameters()`; parameters without σReparam are skipped.
    """
    owners = [owner for owner in map(owner_of, parameters) if owner is not None]
    _advance(dict.fromkeys(found for owner in owners if (found := owner.parametrization()) is not None))


@torch._disable_dynamo  # in a compiled `optimizer.step`; unlike torch.compiler.disable it imports dynamo only when it is called
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
