"""The reparametrisations of linear layers, by name."""

from typing import Any

from torch import nn

from .registry import method, register_reparam
from .sigma_reparam import SigmaReparamConfig, sigma_reparam
from .targets import FilterFn, Model

KINDS = ("sigma", "spectral", "weight")


def reparametrise(model: Model, options: Any, filter_fn: FilterFn | None = None) -> Model:
    """Reparametrises the layers of `model` that filter_fn picks, in place, as options.reparam says; returns the model.

    Raises:
        WrongOption: there is no such reparametrisation.
        ValueError: as `sigma_reparam`.
    """
    method("reparam", options.reparam).build(model, options, filter_fn)
    return model


def sigma_settings(options: Any) -> SigmaReparamConfig | None:
    """The SigmaReparamConfig of `options`; None where `options.reparam` is no kind of `sigma_reparam`.

    Raises:
        ValueError: one of its settings is not allowed, in either case.
    """
    settings = {name: getattr(options, name) for name in ("gamma_init", "qkv", "n_power_iterations", "stop_gradient")}
    if options.reparam == "weight":
        settings.pop("gamma_init")  # its norms are those of the rows
    if options.reparam in KINDS:
        return SigmaReparamConfig(kind=options.reparam, **settings)
    SigmaReparamConfig(**settings)
    return None


@register_reparam("none", "plain weights")
def _none(model: nn.Module, options: Any, filter_fn: FilterFn | None) -> None:
    pass


def _sigma(model: nn.Module, options: Any, filter_fn: FilterFn | None) -> None:
    sigma_reparam(model, sigma_settings(options), filter_fn)


register_reparam("sigma", "σReparam, gamma / sigma(W) W [σ, Section 3.2]")(_sigma)
register_reparam("spectral", "W / sigma(W), without gamma [σ, Table 1]")(_sigma)
register_reparam("weight", "weight norm, g W / |W| by row [σ, Table 1]")(_sigma)
