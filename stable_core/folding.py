"""Folding: a reparametrised model back to plain layers that hold W_hat, with the same outputs and no extra cost."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .sigma_reparam import JointMember, SigmaReparam, refuse_plain_weight
from .targets import QKV_NAMES

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
        for tensor, chain in module.parametrizations.items()
        if isinstance(chain[0], SigmaReparam | JointMember) or hasattr(chain, "original0")
    ]
    if not found:
        raise ValueError(f"{type(model).__name__}: nothing to fold, no layer of it is reparametrised")
    for name, module, tensor in found:
        if len(module.parametrizations[tensor]) > 1:
            raise ValueError(f"{name}: another parametrization lies on top of σReparam; remove that one first")
    # All before any is replaced: weights with a joint sigma need each other's originals.
    folded = [getattr(module, tensor).detach() for _, module, tensor in found]
    for (name, _, _), W_hat in zip(found, folded, strict=True):
        if not W_hat.isfinite().all():
            raise ValueError(f"{name}: its folded weight holds NaN or inf; fold an earlier checkpoint")
    for (_, module, tensor), W_hat in zip(found, folded, strict=True):
        _remove(module, tensor)
        getattr(module, tensor).copy_(W_hat)
    return model


def _remove(module: nn.Module, tensor: str) -> None:
    # A deep copy shares its parametrized class with the model it was copied from, and removing takes the property off the
    # class: without a class of its own, folding the copy would break the model.
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    weight_norm = hasattr(module.parametrizations[tensor], "original0")
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=weight_norm)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if hook.hook is refuse_plain_weight:
            del module._load_state_dict_pre_hooks[key]


def fold_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a reparametrised model -> that of the plain model with the same outputs.

    Raises:
        ValueError: nothing in it is reparametrised.
    """
    originals = {match["layer"] + match["tensor"]: match for key in state if (match := _ORIGINAL.fullmatch(key))}
    if not originals:
        raise ValueError("nothing to fold: the state dict holds no '...parametrizations.weight.original'")
    folded = {key: value for key, value in state.items() if "parametrizations." not in key}
    for name, match in originals.items():
        prefix = f"{match['layer']}parametrizations.{match['tensor']}."
        if match["weight_norm"]:
            g, W = state[f"{prefix}original0"], state[f"{prefix}original1"]
            folded[name] = g * W / W.norm(dim=[d for d in range(W.ndim) if g.shape[d] == 1], keepdim=True)
        elif f"{prefix}0.gamma" in state:
            folded.update(_fold_group(state, name, prefix, originals))
    return folded


def _fold_group(
    state: Mapping[str, Tensor], name: str, prefix: str, originals: Mapping[str, re.Match]
) -> dict[str, Tensor]:
    gamma, u, v = (state[f"{prefix}0.{part}"].float() for part in ("gamma", "u", "v"))
    names = [name]
    if u.numel() > max(state[_original_key(originals[name])].shape[:2]):  # one sigma over several layers
        names = _joint_names(name, u.numel(), state, originals)
    weights = [state[_original_key(originals[n])] for n in names]
    matrices = [W.float().flatten(1) for W in weights]
    # HF's Conv1D stores (in, out). A square one cannot be told by its shape, but u and v fit only one way around.
    stacked, flipped = torch.cat(matrices), torch.cat([W.T for W in matrices])
    transposed = stacked.shape != (u.numel(), v.shape[1]) or (
        stacked.shape[0] == stacked.shape[1] and _sigmas(flipped, u, v).sum() > _sigmas(stacked, u, v).sum()
    )
    stacked = flipped if transposed else stacked
    rows = torch.tensor(_rows(u.numel(), len(v)))
    W_hat = stacked * (gamma / _sigmas(stacked, u, v)).repeat_interleave(rows)[:, None]
    parts = W_hat.split([W.shape[1 if transposed else 0] for W in matrices])
    return {
        n: (part.T if transposed else part).reshape(W.shape).to(W.dtype)
        for n, part, W in zip(names, parts, weights, strict=True)
    }


def _rows(out_features: int, blocks: int) -> list[int]:
    third = out_features // 3
    return {1: [out_features], 2: [2 * third, third], 3: [third] * 3}[blocks]


def _sigmas(W: Tensor, u: Tensor, v: Tensor) -> Tensor:
    parts = zip(W.split(_rows(len(u), len(v))), u.split(_rows(len(u), len(v))), v, strict=True)
    return torch.stack([torch.dot(u_b, torch.mv(W_b, v_b)) for W_b, u_b, v_b in parts])


def _joint_names(name: str, rows: int, state: Mapping[str, Tensor], originals: Mapping[str, re.Match]) -> list[str]:
    """The weights over which the sigma kept at `name` was taken: its siblings in an attention module."""
    for group in QKV_NAMES:
        for leaf in group:
            if f".{leaf}." in f".{name}.":
                siblings = [f".{name}.".replace(f".{leaf}.", f".{other}.")[1:-1] for other in group]
                outs = [state[_original_key(originals[s])].shape[0] for s in siblings]
                return siblings if sum(outs) == rows else siblings[:2]
    raise ValueError(f"{name}: its u has {rows} entries, more than its weight has outputs")


def _original_key(match: re.Match) -> str:
    return f"{match['layer']}parametrizations.{match['tensor']}.original"
