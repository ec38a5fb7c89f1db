"""Rescue: a run whose attention entropy has collapsed goes on, with its queries and keys bounded.

What broke in a collapse is the size of W_q and W_k; all else that was learned is kept. `stable_core.bounding` says what is done
to a layer, and recipes/rescue what it is worth beside other remedies.
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from stable_core.bounding import (
    LIMIT,
    Bounded,
    bound_queries_and_keys,
    check_bounding,
    parameters_of_queries_and_keys,
)
from stable_core.qk_clip import weights_to_clip
from stable_core.sharding import is_sharded
from stable_core.sigma_layers import sigma_layers

from .alarm import Alarm
from .calls import Call
from .compiled import unnoticed, unwrap
from .interception import UNSEEN, Interception, without_wrappers
from .optimizers import Optimizers, listed, place_without_decay, short
from .others import reparametrise_others
from .resume import average_gradients, gamma_name, note_gammas
from .row_order import RowOrder
from .summary import by_head
from .verdicts import LARGE, LOW, median_head

HALVINGS = 6  # at the most, of the limit
log = logging.getLogger("stable_monitor")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Rescued:
    """What was done to one layer.

    Attributes:
        layer: the attention module's name.
        entropy: of its median head, before and now, nats.
        uniform: log(keys), which is the entropy of attending to all keys alike.
        queries, keys: spectral norms of W_q and of W_k, before and now.
    """

    layer: str
    entropy: tuple[float, float]
    uniform: float
    queries: tuple[float, float]
    keys: tuple[float, float]

    def __str__(self) -> str:
        entropy, queries, keys = ("{:.3g} -> {:.3g}".format(*pair) for pair in (self.entropy, self.queries, self.keys))
        return f"rescued {self.layer}: entropy {entropy} of {self.uniform:.3g} nats; |W_q| {queries}, |W_k| {keys}, by σReparam"


def rescue(
    model: nn.Module,
    optimizer: Optimizers,
    forward: Callable[[], Any],
    *,
    layers: Iterable[str] = (),
    fraction: float = LOW,
    logit: float = 100.0,
    limit: float = LIMIT,
    others: bool = False,
    scheduler: Any = None,
) -> list[Rescued]:
    """Bounds the queries and keys of the layers whose attention entropy has collapsed, in place, and returns what it did.

    Between two updates of a run that goes on afterwards, with the same model and optimizer. Each layer's W_q and W_k get
    σReparam and a spectral norm of at most `limit`, which is halved while their entropy stays low. The optimizer gets their
    gammas, without weight decay, and forgets the moments of these weights and their biases. Everything else, moments too, stays
    what it is bit for bit. Call it on every process: rank 0 decides which layers.

    Args:
        model: what the training loop calls: plain, compiled, or in DistributedDataParallel.
        optimizer: what trains it, one or several.
        forward: runs the model on a batch, in training mode; what it returns does not matter. It is called without
            gradient, twice or more, and random numbers and buffers are afterwards what they were.
        layers: attention modules by name, to be rescued whatever their entropy.
        fraction: a layer has collapsed where the entropy of its median head is below this part of log(keys), and its largest
            logit above 50.
        logit: where one has collapsed, those with a larger attention logit than this are taken to be on the way there. The
            default is the threshold of MuonClip's QK-clip.
        limit: the largest spectral norm that W_q and W_k are left with.
        others: whether all other layers that the optimizer trains get σReparam with gamma = sigma, which keeps what they
            compute and, to rounding, the model's output; it costs time in every update. recipes/rescue has what it gains.
        scheduler: of the optimizer's learning rates. Where every group of the optimizer has weight decay, gammas need a new
            one, of which it must be told; without it they decay.

    Raises:
        ValueError: no attention was seen; a layer that is not there; entropy that is not a number; weights that are cut up
            over processes; no collapsed layer is one that can be bounded, and that the optimizer trains. Where some can, the
            others are a warning.
    """
    inner, optimizers, named = unwrap(model), listed(optimizer), [layers] if isinstance(layers, str) else list(layers)
    before = _look(inner, forward)
    _raise_together(_what_is_wrong(before, named))
    low = {
        name
        for name, seen in before.items()
        if name in named or (seen.entropy < fraction * seen.uniform and seen.largest_logit > LARGE)
    }
    large = {name for name, seen in before.items() if seen.largest_logit > logit} if low else set()
    picked = _decided_by_rank_0([name for name in before if name in low | large])
    if not picked:
        log.warning("nothing to rescue: no layer's entropy is below %g of log(keys)", fraction)
        return []
    picked = _possible(picked, before, optimizers)
    bounded = bound_and_train(model, optimizers, {name: before[name].module for name in picked}, limit, scheduler)
    last, after = before, _look(inner, forward)
    for halved in (limit / 2**n for n in range(1, HALVINGS + 1)):
        # Low entropy that a smaller norm does not raise has another cause, such as a bias of position.
        helped = [name for name in picked if after[name].entropy > 1.1 * last[name].entropy]
        still = _decided_by_rank_0([name for name in helped if after[name].entropy < LOW * after[name].uniform])
        if not still:
            break
        again = bound_and_train(model, optimizers, {name: before[name].module for name in still}, halved)
        bounded |= {name: _both(bounded[name], again[name]) for name in still}
        last, after = after, _look(inner, forward)
    if others:
        reparametrise_others(model, optimizers, scheduler)
    for name in picked:
        if after[name].entropy < LOW * after[name].uniform:
            log.warning("%s: its entropy stays low, and not for the size of its queries and keys", name)
    done = []
    for name in picked:
        entropy = before[name].entropy, after[name].entropy
        done.append(Rescued(name, entropy, before[name].uniform, bounded[name].queries, bounded[name].keys))
        log.warning("%s", done[-1])
    return done


def _possible(picked: list[str], seen: "dict[str, _Seen]", optimizers: list[Any]) -> list[str]:
    """Those that can be rescued, with a warning for each other one; raises ValueError where there is none."""
    errors: dict[str, str] = {}
    for name in picked:
        try:
            check_bounding(name, seen[name].module)
            _check_trained(name, seen[name].module, optimizers)
            if seen[name].order:
                raise ValueError(f"{name}: {seen[name].order}")
        except ValueError as error:
            errors[name] = str(error)
    errors = _decided_by_rank_0(errors)  # a batch of its own may tell another process another order of rows
    if len(errors) == len(picked):
        raise ValueError(errors[picked[0]])
    for why in errors.values():
        log.warning("not rescued: %s", why)
    return [name for name in picked if name not in errors]


def _check_trained(name: str, attention: nn.Module, optimizers: list[Any]) -> None:
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if not all(id(W) in trained for W in weights_to_clip(attention)):
        given = short(optimizers[0] if len(optimizers) == 1 else optimizers)
        raise ValueError(
            f"optimizer = {given}: it does not train the layers' queries and keys, those of {name}; give the one that does"
        )


def _both(first: Bounded, second: Bounded) -> Bounded:
    """Two changes, one after the other, as one."""
    return Bounded((first.queries[0], second.queries[1]), (first.keys[0], second.keys[1]))


def bound_and_train(
    model: nn.Module, optimizers: list[Any], attentions: dict[str, nn.Module], limit: float, scheduler: Any = None
) -> dict[str, Bounded]:
    """`bound_queries_and_keys`, after which the optimizers, if there are any, train what is new and forget what changed."""
    inner = unwrap(model)
    if sharded := [name for name, attention in attentions.items() if any(map(is_sharded, weights_to_clip(attention)))]:
        raise ValueError(
            f"{sharded[0]}: its weights are cut up over processes, and cannot be rescued in place; save a checkpoint, rescue "
            "that (python -m stable_monitor.rescue_checkpoint), and resume from it"
        )
    known = {id(p) for p in inner.parameters()}
    changed = {name: parameters_of_queries_and_keys(attention) for name, attention in attentions.items()}
    for parameters in changed.values() if optimizers else ():
        place_without_decay(optimizers, parameters, scheduler)  # an error comes before any change
    bounded = bound_queries_and_keys(inner, attentions, limit)
    new: dict[str, Any] = {
        without_wrappers(name): sigma.gamma for name, sigma in sigma_layers(inner) if id(sigma.gamma) not in known
    }
    for name, parameters in changed.items() if optimizers else ():
        own = {id(p) for p in parameters_of_queries_and_keys(attentions[name])}
        gammas = {gamma_name(layer): gamma for layer, gamma in new.items() if id(gamma) in own}
        place_without_decay(optimizers, parameters, scheduler)(gammas)
        for p in parameters:
            for trained_by in optimizers:
                trained_by.state.pop(p, None)
    note_gammas(optimizers, new)
    average_gradients(model, list(new.values()))
    return bounded


class Rescue:
    """An `on_alarm` that calls `rescue` with its arguments, and rescues the layers that raised alarms whatever their entropy.

        monitor = Monitor(model, every=10, optimizer=optimizer, on_alarm=Rescue(model, optimizer, lambda: model(batch)))

    The monitor writes down what was done. After a blow-up nothing is done but a warning: it is not the
    queries and keys that broke.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers, forward: Callable[[], Any], **settings: Any) -> None:
        # What is wrong is told now, not at the alarm.
        inspect.signature(rescue).bind(model, optimizer, forward, **settings)
        if not callable(forward):
            raise ValueError(f"forward = {short(forward)}: allowed are functions, such as lambda: model(batch)")
        self._rescue = functools.partial(rescue, model, optimizer, forward, **settings)
        self._done: tuple[int, set[str]] = (-1, set())  # an update with alarms, and the layers rescued in it

    def __call__(self, alarm: Alarm) -> list[Rescued]:
        if alarm.blowup:
            log.warning(
                "%s is not rescued, as the loss blew up before: lower the learning rate, or go back to a sound checkpoint",
                alarm.layer,
            )
            return []
        step, layers = self._done
        if step != alarm.step:
            layers = set()
        if alarm.layer in layers:
            return []
        found = self._rescue(layers=[alarm.layer])
        self._done = alarm.step, layers | {rescued.layer for rescued in found}
        return found


@dataclass(frozen=True)
class _Seen:
    module: nn.Module
    entropy: float  # of its median head
    uniform: float
    largest_logit: float
    order: str  # what is wrong with the order that its packed rows are taken to have


def _look(model: nn.Module, forward: Callable[[], Any]) -> dict[str, _Seen]:
    """Every attention of one forward pass, by name."""
    found: dict[str, _Seen] = {}
    rows = RowOrder(model.modules())

    def see(call: Call) -> Call:
        if call.site.name not in found:
            entropy, _, logits, _, log_keys = by_head(call)[1].tolist()
            seen = _Seen(call.site.module, median_head(entropy), fmean(log_keys), max(logits), rows.error(call))
            found[call.site.name] = seen
        return call

    interception = Interception(model, see, alone=True)  # a QK-clip would take its logits for those of training
    interception.start()
    try:
        with unnoticed(model):
            forward()
    finally:
        interception.stop()
        rows.close()
    return found


def _what_is_wrong(seen: dict[str, _Seen], named: list[str]) -> str:
    if not seen:
        return f"{UNSEEN}. forward must call the model"
    for name in named:
        if name not in seen:
            return f"layers = {name!r}: no such attention was seen; there are {', '.join(seen)}"
    for name, one in seen.items():
        if math.isnan(one.entropy):
            return f"{name}: its entropy is not a number, and cannot be rescued: go back to a sound checkpoint"
    return ""


def _raise_together(error: str) -> None:
    """Raises ValueError on every process where there is an error on one: others would wait for it."""
    errors = [error]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        errors = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for found in errors:
        if found:
            raise ValueError(found)


def _decided_by_rank_0(found: Found) -> Found:
    """Processes see different batches."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return found
    told = [found]
    dist.broadcast_object_list(told)
    return told[0]
