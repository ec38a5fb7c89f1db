"""What a plain run saved, for its model with σReparam: `unfold_state_dict` is the way back from `fold_state_dict`.

With gamma_init = "spectral" the function of the checkpoint is kept, and so are the moments of an Adam, which belong to W.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import chain_of
from .layout import KEY
from .originals import Originals
from .scale_by_sigma import full_precision, is_unit, measure, top_u
from .sigma_layers import sigma_layers
from .targets import join, matrix

log = logging.getLogger(__name__)


def is_plain(state: Mapping[str, Any]) -> bool:
    """Whether nothing in a state dict is reparametrised."""
    return not any("parametrizations." in key for key in state)


def reparametrised_in(state: Mapping[str, Any]) -> list[str]:
    """The weights of a state dict that have a sigma, named as `sigma_layers` names them."""
    found = (re.fullmatch(r"(.*?)parametrizations\.(\w+)\.0\.u", key) for key in state)
    return [match[1].removesuffix(".") if match[2] == "weight" else match[1] + match[2] for match in found if match]


@torch.no_grad()
def unfold_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain model as the reparametrised `model` loads it; neither is changed.

    gamma is sigma(W) where the model's gamma_init is "spectral", which keeps the function, and 1 where it is "one", which
    does not, and is logged. Weights that are reparametrised in `state` already, or are not in it, are left to the loader.

    Raises:
        ValueError: a weight has another shape than the model's, or is not finite.
    """
    unfolded, kept = dict(state), True
    places = {id(module): name for name, module in model.named_modules() if isinstance(module, Originals)}
    for _, sigma in sigma_layers(model):
        prefixes = [places[id(member)] for member in sigma.members()]
        plain = [prefix.replace("parametrizations.", "") for prefix in prefixes]
        if not all(key in state for key in plain):
            continue
        weights = [state[key] for key in plain]
        for key, W, ours in zip(plain, weights, sigma.originals(), strict=True):
            if W.shape != ours.shape:
                raise ValueError(f"{key}: the state dict has shape {tuple(W.shape)}, the model {tuple(ours.shape)}")
            if not W.isfinite().all():
                raise ValueError(f"{key}: it holds NaN or inf; go back to a sound checkpoint")
        stacked = join([matrix(W, sigma.transposed) for W in weights])
        u = top_u(stacked, sigma.u.to(stacked.device), sigma.rows)
        gamma = torch.ones(len(sigma.rows), device=stacked.device)
        if sigma.config.keeps_function:
            with full_precision(stacked):
                gamma = measure(stacked, u, gamma, sigma.rows, is_unit(u, sigma.rows)).s.view(-1).clone()
        else:
            kept = False
        for index, (prefix, key, W) in enumerate(zip(prefixes, plain, weights, strict=True)):
            del unfolded[key]
            unfolded[f"{prefix}.original"] = W
            unfolded[f"{prefix}.0.{KEY}"] = model.get_submodule(f"{prefix}.0").get_extra_state()
            if index == sigma.index:
                unfolded |= {f"{prefix}.0.gamma": gamma.to(W.dtype), f"{prefix}.0.u": u}
    if not kept:
        log.warning(
            "gamma_init = 'one' on plain weights: each W_hat gets a spectral norm of 1, and the model another function; "
            "'spectral' keeps it"
        )
    return unfolded


def unfold_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """The `state_dict` of an optimizer of the plain model, as the optimizer of the reparametrised model loads it.

    Both optimizers must have been made by the same rule, such as one group or weight decay by ndim. Gammas start without
    moments, in the group where `optimizer` has them.

    Raises:
        ValueError: the groups, or the shapes of what is kept for a weight, are not those of the model.
    """
    order = {id(p): place for place, p in enumerate(plain_parameters(model))}
    groups, state, theirs = [], {}, list(saved["param_groups"])
    count = 0
    for group in optimizer.param_groups:
        indices = {id(p): count + place for place, p in enumerate(group["params"])}
        count += len(indices)
        there = sorted((p for p in group["params"] if id(p) in order), key=lambda p: order[id(p)])
        settings = {key: value for key, value in group.items() if key != "params"}
        if there:
            if not theirs or len(theirs[0]["params"]) != len(there):
                raise ValueError(
                    "the saved optimizer has other groups than the model's: make both optimizers by the same rule, or go on "
                    "without its state"
                )
            old = theirs.pop(0)
            settings = {key: value for key, value in old.items() if key not in ("params", "param_names")}
            for p, index in zip(there, old["params"], strict=True):
                moments = saved["state"].get(index, {})
                for name, x in moments.items():
                    if isinstance(x, Tensor) and x.ndim and x.shape != p.shape:
                        raise ValueError(
                            f"{name} of the saved optimizer has shape {tuple(x.shape)}, its weight {tuple(p.shape)}"
                        )
                if moments:
                    state[indices[id(p)]] = moments
        groups.append({**settings, "params": list(indices.values())})
    if theirs:
        raise ValueError(f"the saved optimizer has {len(theirs)} groups more than the model's")
    return {**saved, "state": state, "param_groups": groups}


def plain_parameters(model: nn.Module, names: Collection[str] | None = None) -> list[nn.Parameter]:
    """The model's parameters without gammas, in the order of the plain model's `parameters()`: weights come before biases.

    Args:
        names: which weights are taken to be plain, as `sigma_layers` names them; None: all of them.
    """
    return list(dict.fromkeys(_in_plain_order(model, names)))


def _in_plain_order(model: nn.Module, names: Collection[str] | None) -> Iterator[nn.Parameter]:
    inside: set[nn.Module] = set()  # modules of a weight that is taken to be plain
    for name, module in model.named_modules():
        for tensor in getattr(module._modules.get("parametrizations"), "_modules", ()):
            own = ".".join(part for part in (name, "" if tensor == "weight" else tensor) if part)
            if names is None or own in names:
                chain = chain_of(module, tensor)
                inside.update(chain.modules())
                yield getattr(chain, "original1" if hasattr(chain, "original1") else "original")
        if module not in inside:
            yield from (p for p in module._parameters.values() if p is not None)
