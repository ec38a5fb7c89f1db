"""Folding: a reparametrised model back to plain layers that hold W_hat, with the same outputs and no extra cost."""

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .layout import KEY, Layout
from .recomputing import keep
from .scale_by_sigma import full_precision, scale_plainly, sound_u
from .sharding import is_sharded
from .sigma_reparam import refuse_plain_weight
from .targets import QKV_NAMES, Model, cut, join, matrix

_ORIGINAL = re.compile(r"(?P<layer>.*?)parametrizations\.(?P<tensor>[^.]+)\.original(?P<weight_norm>0?)")


@torch.no_grad()
def fold(model: Model) -> Model:
    """Replaces every weight that `sigma_reparam` reparametrised by its W_hat, in place, and returns the model.

    Raises:
        ValueError: nothing is reparametrised, another parametrization lies on top, or a W_hat is not finite. The model is
            then as it was.
    """
    found = [
        (f"{name}.{tensor}" if name else tensor, module, tensor)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for tensor in module.parametrizations
        if is_reparametrised(module)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__}: nothing to fold, no layer of it is reparametrised")
    inside = {id(module.parametrizations[tensor]) for _, module, tensor in found}
    for name, module, tensor in found:
        chain = module.parametrizations[tensor]
        if any(is_sharded(W) for W in chain.parameters()):
            raise ValueError(f"{name}: its weight is sharded; gather the state dict and fold that (fold_state_dict)")
        if len(chain) > 1:
            raise ValueError(f"{name}: another parametrization lies on top of σReparam; remove that one first")
        if hasattr(chain[0], "members") and any(id(m) not in inside for m in chain[0].members()):
            raise ValueError(
                f"{name}: it shares its sigma with a layer outside of what is folded; fold the whole attention"
            )
    # All before any is replaced: weights with a joint sigma need each other's originals.
    folded = _W_hats(found)
    for (name, _, _), W_hat in zip(found, folded, strict=True):
        if not W_hat.isfinite().all():
            raise ValueError(f"{name}: its folded weight holds NaN or inf; fold an earlier checkpoint")
    for (_, module, tensor), W_hat in zip(found, folded, strict=True):
        _remove(module, tensor)
        getattr(module, tensor).copy_(W_hat)
    keep(model)
    return model


def _W_hats(found: list[tuple[str, Any, str]]) -> list[Tensor]:
    """Each W_hat, in its layer's precision whatever autocast says, and as in evaluation, where an average has its own sigma."""
    keepers = [module.parametrizations[tensor][0] for _, module, tensor in found]
    keepers = [keeper.leader() if hasattr(keeper, "leader") else keeper for keeper in keepers]
    modes = [keeper.training for keeper in keepers]
    try:
        for keeper in keepers:
            keeper.eval()
        with full_precision(next(found[0][1].parametrizations.parameters())):
            return [getattr(module, tensor).detach() for _, module, tensor in found]
    finally:
        for keeper, mode in zip(keepers, modes, strict=True):
            keeper.train(mode)


def is_reparametrised(module: nn.Module) -> bool:
    """Whether `sigma_reparam` reparametrised a weight of this very layer, in whichever copy of this library."""
    return any(_is_our_hook(hook) for hook in module._load_state_dict_pre_hooks.values())


def _is_our_hook(hook: Any) -> bool:
    """By name: a model that brings its own copy of this library (Hugging Face's remote code) folds as well."""
    return getattr(hook.hook, "__name__", "") == refuse_plain_weight.__name__


def _came_with_ours(hook: Any) -> bool:
    """torch's weight norm leaves a hook for names of old checkpoints, a local function, which cannot be pickled."""
    return _is_our_hook(hook) or getattr(hook.hook, "__name__", "") == "_weight_norm_compat_hook"


def _remove(module: Any, tensor: str) -> None:
    # A deep copy shares its parametrized class with the model it was copied from, and removing takes the property off the
    # class: without a class of its own, folding the copy would break the model.
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    weight_norm = hasattr(module.parametrizations[tensor], "original0")
    with torch.enable_grad():  # else torch leaves a weight of several originals as a buffer
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=weight_norm)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if _came_with_ours(hook):
            del module._load_state_dict_pre_hooks[key]


def fold_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a reparametrised model -> that of the plain model with the same outputs.

    Raises:
        ValueError: nothing in it is reparametrised, or only a part of the weights that share a sigma is in it.
    """
    originals = {match["layer"] + match["tensor"]: match for key in state if (match := _ORIGINAL.fullmatch(key))}
    if not originals:
        raise ValueError("nothing to fold: the state dict holds no '...parametrizations.weight.original'")
    layouts = {
        name: Layout.read(state[key], name)
        for name, match in originals.items()
        if (key := f"{_prefix(match)}0.{KEY}") in state
    }
    folded, left = dict(state), dict(layouts)
    for name, match in originals.items():
        if match["weight_norm"]:
            g, W = (state[f"{_prefix(match)}original{i}"] for i in (0, 1))
            summed = [d for d in range(W.ndim) if g.shape[d] == 1]
            plain = {name: W * (g / torch.linalg.vector_norm(W, dim=summed, keepdim=True))}
        elif f"{_prefix(match)}0.gamma" in state:
            layout, names = _layout(state, name, originals, layouts)
            plain = _fold_group(state, name, originals, layout, names)
        else:
            continue  # it shares the sigma of another weight, or is somebody else's parametrization
        for done in plain:
            left.pop(done, None)
            for key in ("original", "original0", "original1", "0.gamma", "0.u", "0.v", f"0.{KEY}"):
                folded.pop(_prefix(originals[done]) + key, None)
        folded.update(plain)
    if left:
        raise ValueError(f"{min(left)}: the state dict holds no weight with which the sigma that it shares is kept")
    return folded


def _fold_group(
    state: Mapping[str, Tensor], name: str, originals: Mapping[str, re.Match[str]], layout: Layout, names: list[str]
) -> dict[str, Tensor]:
    """The folded weights `names`, whose sigma is kept at `name`."""
    gamma, u = (state[f"{_prefix(originals[name])}0.{part}"] for part in ("gamma", "u"))
    weights = [state[f"{_prefix(originals[n])}original"] for n in names]
    rows, transposed = layout.rows, layout.transposed
    stacked = join([matrix(W, transposed) for W in weights])
    W_hat, _ = scale_plainly(stacked, gamma, sound_u(stacked, u.float(), rows), rows, stop_gradient=True)
    parts = cut(W_hat, [W.shape[transposed] for W in weights])
    return {
        n: (part.T if transposed else part).reshape(W.shape).to(W.dtype)
        for n, part, W in zip(names, parts, weights, strict=True)
    }


def _layout(
    state: Mapping[str, Tensor], name: str, originals: Mapping[str, re.Match[str]], layouts: Mapping[str, Layout]
) -> tuple[Layout, list[str]]:
    """Of the sigma that is kept at `name`, and the weights that share it."""
    if name not in layouts:
        return _guessed_layout(state, name, originals)
    mine = layouts[name]
    if not mine.members:
        return mine, [name]
    return mine, [_nearest(name, replace(mine, index=index), layouts) for index in range(len(mine.members))]


def _nearest(name: str, wanted: Layout, layouts: Mapping[str, Layout]) -> str:
    """Where the weight with the layout `wanted` is that shares its sigma with `name`.

    A model may hold copies of an attention, with equal layouts: it is the one on the shortest path through the modules.
    """
    found = [other for other, layout in layouts.items() if layout == wanted]
    steps = {other: len(set(_parents(name)) ^ set(_parents(other))) for other in found}
    near = [other for other in found if steps[other] == min(steps.values())]
    if len(near) != 1:
        raise ValueError(
            f"{name}: it shares its sigma with {wanted.members[wanted.index]}, of which the state dict holds "
            f"{' and '.join(near) or 'none'} near it; fold the whole attention"
        )
    return near[0]


def _parents(name: str) -> list[str]:
    """a, a.b, a.b.c of a.b.c."""
    return list(accumulate(name.split("."), "{}.{}".format))


def _guessed_layout(
    state: Mapping[str, Tensor], name: str, originals: Mapping[str, re.Match[str]]
) -> tuple[Layout, list[str]]:
    """As `_layout`, of checkpoints from before layouts: from the shapes, and from what attentions call their projections."""
    gamma, u = (state[f"{_prefix(originals[name])}0.{part}"] for part in ("gamma", "u"))
    W, names = state[f"{_prefix(originals[name])}original"], [name]
    for group in QKV_NAMES:
        leaf = next((leaf for leaf in group if f".{leaf}." in f".{name}."), None)
        if leaf is not None:
            siblings = [f".{name}.".replace(f".{leaf}.", f".{other}.")[1:-1] for other in group]
            shared = [s for s in siblings if s == name or (s in originals and _keeps_none(state, originals[s]))]
            if name != siblings[2] or len(shared) == 3:  # the other two may share without v
                names = shared
            break
    transposed = W.shape[0] != len(u)
    if W.ndim == 2 and W.shape[0] == W.shape[1] == len(u):  # u's image is the longest there is
        transposed = bool((W.float() @ u.float()).norm() > (W.float().T @ u.float()).norm())
    third = len(u) // 3
    rows = {1: (len(u),), 2: (2 * third, third), 3: (third,) * 3}[len(gamma)]
    return Layout(rows, transposed and len(names) == 1), names


def _keeps_none(state: Mapping[str, Tensor], match: re.Match[str]) -> bool:
    return not match["weight_norm"] and f"{_prefix(match)}0.gamma" not in state


def _prefix(match: re.Match[str]) -> str:
    return f"{match['layer']}parametrizations.{match['tensor']}."
