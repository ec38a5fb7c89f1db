"""Adapters (PEFT) that are merged into reparametrised layers.

PEFT merges by writing to `layer.weight.data`, which for a reparametrised layer is W_hat, computed anew at each look: the
adapter would be lost. So it merges into a plain weight that takes its place meanwhile; the layer is assigned what comes out.
"""

from contextlib import contextmanager
from functools import wraps

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from stable_core.folding import is_reparametrised

MERGES = ("merge", "unmerge")


def watch_adapters() -> None:
    """From now on every class of adapters that wraps a layer merges as `plain_weights` has it, if that is reparametrised."""
    register_module_module_registration_hook(_on_registration)


def watch_adapters_of(model: nn.Module) -> None:
    """The same of adapters that are there already."""
    for module in model.modules():
        for name, layer in module.named_children():
            _on_registration(module, name, layer)


def _on_registration(parent: nn.Module, name: str, layer: nn.Module | None) -> None:
    if name == "base_layer":
        for owner in type(parent).__mro__:
            for merge in MERGES:
                method = vars(owner).get(merge)
                if callable(method) and not hasattr(method, "into_plain_weights"):
                    setattr(owner, merge, _into_plain_weights(method))


def _into_plain_weights(merge):
    @wraps(merge)
    def merged(self, *args, **kwargs):
        layer = self.base_layer
        if not is_reparametrised(layer):
            return merge(self, *args, **kwargs)
        with plain_weights(layer):
            return merge(self, *args, **kwargs)

    merged.into_plain_weights = True
    return merged


@contextmanager
def plain_weights(layer: nn.Module):
    """A reparametrised layer is a plain one inside; afterwards its effective weights are what was made of the plain ones.

    Raises:
        ValueError: kind = "spectral", whose norm stays 1; or, at the end, weights that are sharded.
    """
    cls, chains = type(layer), dict(layer.parametrizations.items())
    for name, chain in chains.items():
        if hasattr(chain[0], "leader") and chain[0].leader().config.kind == "spectral":
            raise ValueError(
                f"{chain[0].leader().name}: kind = 'spectral' keeps the norm of its {name} at 1, whatever an adapter adds; "
                "merge into a model that was folded (hf_stable.fold)"
            )
    before = {name: getattr(layer, name).detach().clone() for name in chains}
    layer.__class__ = cls.__bases__[0]
    try:
        for name, weight in before.items():
            layer.register_parameter(name, nn.Parameter(weight.clone(), requires_grad=False))
        yield
    finally:
        after = {name: layer._parameters.pop(name).detach() for name in chains}
        layer.__class__ = cls
    for name, weight in after.items():
        if not torch.equal(weight, before[name]):
            setattr(layer, name, weight)
