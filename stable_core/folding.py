"""Folding: turns a reparametrised model into plain layers that hold W_hat, with the same outputs and no extra cost."""

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
        ValueError: nothing is reparametrised; another parametrization lies on top; a weight is sharded, or shares its sigma
            with a layer outside of `model`; a W_hat is not finite. The model is then left as it was.
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
    # All W_hat are computed before any weight is replaced: weights that share a sigma need each other's originals.
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
    """Each W_hat in its layer's dtype, also under autocast, as evaluation has it: with the sigma of averaged weights."""
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
    """Whether a weight of this layer itself is reparametrised, by this or another loaded copy of this package."""
    return any(_is_our_hook(hook) for hook in module._load_state_dict_pre_hooks.values())


def _is_our_hook(hook: Any) -> bool:
    """By its name, so that a model with its own copy of this package (Hugging Face's remote code) can be folded, too."""
    return getattr(hook.hook, "__name__", "") == refuse_plain_weight.__name__


def _came_with_ours(hook: Any) -> bool:
    """Whether the hook is ours, or that of torch's weight norm for old checkpoints, a local function, which pickle refuses."""
    return _is_our_hook(hook) or getattr(hook.hook, "__name__", "") == "_weight_norm_compat_hook"


def _remove(module: Any, tensor: str) -> None:
    # torch removes the weight's property from the layer's class, which a deep copy shares with the layer that it was copied
    # from. The layer is given a class of its own, so that folding one does not break the other.
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    weight_norm = hasattr(module.parametrizations[tensor], "original0")
    with torch.enable_grad():  # without gradients torch would make a weight of several originals a buffer
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=weight_norm)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if _came_with_ours(hook):
            del module._load_state_dict_pre_hooks[key]


def fold_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain model with the same outputs, from that of a reparametrised model, which is not changed.

    Raises:
        ValueError: no weight in it is reparametrised; only some of the weights that share a sigma are in it; a layout is
            damaged.
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
            continue  # its sigma is kept with another weight, or the parametrization is not ours
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
    """{name: W_hat} of the weights `names`, whose u and gamma are kept with the weight `name`."""
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
    """The layout of the sigma that is kept with the weight `name`, and the names of all weights that share it, in order."""
    if name not in layouts:
        return _guessed_layout(state, name, originals)
    mine = layouts[name]
    if not mine.members:
        return mine, [name]
    return mine, [_nearest(name, replace(mine, index=index), layouts) for index in range(len(mine.members))]


def _nearest(name: str, wanted: Layout, layouts: Mapping[str, Layout]) -> str:
    """The name of the weight with the layout `wanted` that shares its sigma with the weight `name`.

    Each attention of a model may have a weight of this layout: it is the one fewest steps away in the tree of modules.

    Raises:
        ValueError: there is none, or there are several as near.
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
    """Of "a.b.c": ["a", "a.b", "a.b.c"]."""
    return list(accumulate(name.split("."), "{}.{}".format))


def _guessed_layout(
    state: Mapping[str, Tensor], name: str, originals: Mapping[str, re.Match[str]]
) -> tuple[Layout, list[str]]:
    """`_layout` for checkpoints of early versions, which have none: guessed from shapes and names of projections."""
    gamma, u = (state[f"{_prefix(originals[name])}0.{part}"] for part in ("gamma", "u"))
    W, names = state[f"{_prefix(originals[name])}original"], [name]
    for group in QKV_NAMES:
        leaf = next((leaf for leaf in group if f".{leaf}." in f".{name}."), None)
        if leaf is not None:
            siblings = [f".{name}.".replace(f".{leaf}.", f".{other}.")[1:-1] for other in group]
            shared = [s for s in siblings if s == name or (s in originals and _keeps_none(state, originals[s]))]
            if name != siblings[2] or len(shared) == 3:  # q and k may share a sigma without v
                names = shared
            break
    transposed = W.shape[0] != len(u)
    if W.ndim == 2 and W.shape[0] == W.shape[1] == len(u):  # u is the top left one: |W^T u| > |W u|
        transposed = bool((W.float() @ u.float()).norm() > (W.float().T @ u.float()).norm())
    third = len(u) // 3
    rows = {1: (len(u),), 2: (2 * third, third), 3: (third,) * 3}[len(gamma)]
    return Layout(rows, transposed and len(names) == 1), names


def _keeps_none(state: Mapping[str, Tensor], match: re.Match[str]) -> bool:
    """Whether no gamma is kept with this weight, so that it may share another's."""
    return not match["weight_norm"] and f"{_prefix(match)}0.gamma" not in state


def _prefix(match: re.Match[str]) -> str:
    return f"{match['layer']}parametrizations.{match['tensor']}."
