"""Folding: a reparametrised model back to plain layers that hold W_hat, with the same outputs and no extra cost."""

import re
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .sharding import is_sharded
from .sigma_reparam import SigmaReparam, SigmaReparamConfig, full_precision, refuse_plain_weight
from .targets import QKV_NAMES, Group, Target

_ORIGINAL = re.compile(r"(?P<layer>.*?)parametrizations\.(?P<tensor>[^.]+)\.original(?P<weight_norm>0?)")


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
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
        if _is_ours(module)
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
    folded = [_W_hat(module, tensor) for _, module, tensor in found]
    for (name, _, _), W_hat in zip(found, folded, strict=True):
        if not W_hat.isfinite().all():
            raise ValueError(f"{name}: its folded weight holds NaN or inf; fold an earlier checkpoint")
    for (_, module, tensor), W_hat in zip(found, folded, strict=True):
        _remove(module, tensor)
        getattr(module, tensor).copy_(W_hat)
    return model


def _W_hat(module: nn.Module, tensor: str) -> Tensor:
    """In the precision that the layer keeps, also inside of autocast."""
    with full_precision(next(module.parametrizations[tensor].parameters())):
        return getattr(module, tensor).detach()


def _is_ours(module: nn.Module) -> bool:
    return any(_is_our_hook(hook) for hook in module._load_state_dict_pre_hooks.values())


def _is_our_hook(hook) -> bool:
    """By name: a model that brings its own copy of this library (Hugging Face's remote code) folds as well."""
    return getattr(hook.hook, "__name__", "") == refuse_plain_weight.__name__


def _remove(module: nn.Module, tensor: str) -> None:
    # A deep copy shares its parametrized class with the model it was copied from, and removing takes the property off the
    # class: without a class of its own, folding the copy would break the model.
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    weight_norm = hasattr(module.parametrizations[tensor], "original0")
    with torch.enable_grad():  # else torch leaves a weight of several originals as a buffer
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=weight_norm)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if _is_our_hook(hook):
            del module._load_state_dict_pre_hooks[key]


def fold_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a reparametrised model -> that of the plain model with the same outputs.

    Raises:
        ValueError: nothing in it is reparametrised.
    """
    originals = {match["layer"] + match["tensor"]: match for key in state if (match := _ORIGINAL.fullmatch(key))}
    if not originals:
        raise ValueError("nothing to fold: the state dict holds no '...parametrizations.weight.original'")
    folded = dict(state)
    for name, match in originals.items():
        if match["weight_norm"]:
            g, W = (state[f"{_prefix(match)}original{i}"] for i in (0, 1))
            summed = [d for d in range(W.ndim) if g.shape[d] == 1]
            plain = {name: W * (g / torch.linalg.vector_norm(W, dim=summed, keepdim=True))}
        elif f"{_prefix(match)}0.gamma" in state:
            plain = _fold_group(state, name, originals)
        else:
            continue  # it shares the sigma of another weight, or is somebody else's parametrization
        for done in plain:
            for key in ("original", "original0", "original1", "0.gamma", "0.u", "0.v"):
                folded.pop(_prefix(originals[done]) + key, None)
        folded.update(plain)
    return folded


def _fold_group(state: Mapping[str, Tensor], name: str, originals: Mapping[str, re.Match]) -> dict[str, Tensor]:
    """The folded weights of the sigma that is kept at `name`, by way of the module that trained them."""
    kept = {part: state[f"{_prefix(originals[name])}0.{part}"] for part in ("gamma", "u", "v")}
    names = [name]
    if len(kept["u"]) * kept["v"].shape[1] > state[f"{_prefix(originals[name])}original"].numel():
        names = _joint_names(name, len(kept["u"]), state, originals)
    members = [SimpleNamespace(original=state[f"{_prefix(originals[n])}original"]) for n in names]
    transposed = _is_transposed(members[0].original, kept["u"].float(), kept["v"].float())
    third = len(kept["u"]) // 3
    rows = {1: [len(kept["u"])], 2: [2 * third, third], 3: [third] * 3}[len(kept["gamma"])]
    targets = [Target(member, n, "original", transposed) for member, n in zip(members, names, strict=True)]
    parametrization = SigmaReparam(Group(targets, rows), SigmaReparamConfig())
    parametrization.attach(members)
    parametrization.load_state_dict(kept)
    weights = parametrization.scaled_weights(parametrization.originals())
    return {n: W_hat.detach() for n, W_hat in zip(names, weights, strict=True)}


def _is_transposed(W: Tensor, u: Tensor, v: Tensor) -> bool:
    """Whether W is (in, out), as HF's Conv1D has it. u and v fit a square one only one way around."""
    if len(v) == 1 and W.ndim == 2 and W.shape[0] == W.shape[1] == len(u):
        return bool((u @ W.float().T @ v[0]).abs() > (u @ W.float() @ v[0]).abs())
    return W.flatten(1).shape[1] != v.shape[1]


def _joint_names(name: str, rows: int, state: Mapping[str, Tensor], originals: Mapping[str, re.Match]) -> list[str]:
    """The weights over which the sigma kept at `name` was taken: q, k and v of its attention, or q and k."""
    for group in QKV_NAMES:
        for leaf in group:
            if f".{leaf}." in f".{name}.":
                siblings = [f".{name}.".replace(f".{leaf}.", f".{other}.")[1:-1] for other in group]
                outputs = sum(len(state[f"{_prefix(originals[sibling])}original"]) for sibling in siblings)
                return siblings if outputs == rows else siblings[:2]
    raise ValueError(f"{name}: its u has {rows} entries, more than its weight has outputs")


def _prefix(match: re.Match) -> str:
    return f"{match['layer']}parametrizations.{match['tensor']}."
