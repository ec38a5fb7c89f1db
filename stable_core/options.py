"""The options by which a user chooses methods. Stacks make their keywords, flags and configuration fields from `Options`."""

import argparse
from dataclasses import Field, dataclass, field, fields
from typing import Any

# Imported because these modules register the methods that can be chosen.
from .attentions import build_attention  # noqa: F401
from .inits import init_  # noqa: F401
from .norms import build_norm  # noqa: F401
from .registry import SLOTS, WrongOption, method, names
from .reparams import sigma_settings
from .residuals import build_residuals  # noqa: F401


def _option(default: Any, summary: str) -> Any:
    return field(default=default, metadata={"summary": summary})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The methods of a model, by name, and their settings. The defaults are a plain pre-LN model; a stack may have others.

    Attributes:
        norm: the norm of the blocks: "layernorm" (the stack's own), "rmsnorm", "stable" (StableNorm), or "none", meant for
            use with σReparam.
        alpha: exponent of StableNorm, in the blocks and inside StableAtten, from 0 to 1/2.
        attention: how logits are made of q and k: "dot" (the stack's own), "qknorm", "stable" (StableAtten), "l2" or
            "l2_tied" (L2 attention; tied: one weight for q and k).
        tau_scale: factor by which StableAtten's tau is multiplied, above 0.
        init: first weights of Linear and Conv layers: "stock" (the stack's own), "stable" (StableInit) or "xavier" (Xavier
            normal).
        residual: residual connection and place of the norm: "pre-ln", "post-ln" or "deepnorm".
        reparam: "none", "sigma" (σReparam), or its baselines "spectral" (spectral norm: gamma = 1, not learned) and "weight"
            (weight norm).
        gamma_init, qkv, n_power_iterations, stop_gradient: settings of σReparam, as for `SigmaReparamConfig`.

    Raises:
        WrongOption: a ValueError that names the option, its value and what is allowed.
    """

    norm: str = _option("layernorm", "norm of the blocks")
    alpha: float = _option(0.475, "of StableNorm and StableAtten, from 0 to 0.5")
    attention: str = _option("dot", "what softmax sees")
    tau_scale: float = _option(1.0, "multiple of StableAtten's tau")
    init: str = _option("stock", "first weights")
    residual: str = _option("pre-ln", "residual connection and place of the norm")
    reparam: str = _option("none", "reparametrisation of the linear layers")
    gamma_init: str = _option("spectral", "first gamma: spectral for the norm of the weight, or one")
    qkv: str = _option("separate", "which of q, k, v share a sigma: separate, joint or qk_joint")
    n_power_iterations: int = _option(1, "power iterations per update")
    stop_gradient: bool = _option(False, "no gradient through sigma")

    def __post_init__(self) -> None:
        check(self)


OPTIONS: tuple[Field[Any], ...] = fields(Options)
NAMES = tuple(option.name for option in OPTIONS)


def check(options: Any) -> None:
    """Raises `WrongOption` for the first value that is not allowed in `options`, an Options or an object with its fields."""
    for slot in SLOTS:
        method(slot, getattr(options, slot))
    if not 0 <= options.alpha <= 0.5:
        raise WrongOption("alpha", options.alpha, "allowed are numbers from 0 to 0.5")
    if not options.tau_scale > 0:
        raise WrongOption("tau_scale", options.tau_scale, "allowed are positive numbers")
    if options.norm == "none" and options.residual != "pre-ln":
        raise WrongOption(
            "residual", options.residual, "it says where the norm is, and norm is none: allowed is pre-ln"
        )
    sigma_settings(options)


def of(settings: Any) -> Options:
    """The Options of an object that has their fields among others, such as a configuration."""
    return Options(**{name: getattr(settings, name) for name in NAMES})


def take(settings: dict[str, Any], **defaults: Any) -> Options:
    """Removes the options from the keywords `settings` and returns them; `defaults` are those of the stack."""
    return Options(**{**defaults, **{name: settings.pop(name) for name in NAMES if name in settings}})


def add_flags(parser: argparse.ArgumentParser, **summaries: str) -> None:
    """Adds a flag for every option; `summaries` replace the help texts of some.

    The default of each flag is None, for which the stack puts its own. argparse does not check names of methods: modules that
    register more of them may be imported only later.
    """
    for option in OPTIONS:
        flag = f"--{option.name.replace('_', '-')}"
        text = summaries.get(option.name, option.metadata["summary"])
        if option.type is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
            continue
        if option.name in SLOTS:
            text += f": {', '.join(names(option.name))}, or a registered one"
        parser.add_argument(flag, type=option.type, metavar=option.name.rpartition("_")[2].upper(), help=text)


def renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy of `settings` in which values that earlier versions saved have their present names."""
    settings = dict(settings)
    if settings.get("init") in ("timm", "normal", "gpt2"):
        settings["init"] = "stock"
    if settings.get("residual") == "none":
        settings.update(residual="pre-ln", norm="none")
    return settings
