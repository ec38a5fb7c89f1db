"""The methods that a user chooses by name: ours are registered here like those of a user's own, and every stack looks here.

    from stable_core.registry import register_norm

    @register_norm("half", "x / 2")
    def build(dim, options, **made):
        return Half()

after which `norm="half"` is a keyword of timm, a field of Hugging Face's and nanoGPT's configurations and a flag of fairseq.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

SLOTS = ("norm", "attention", "residual", "init", "reparam")


class WrongOption(ValueError):
    """A setting with a value that is not allowed. A command line says it in its own way, from the three attributes."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} = {value!r}: {allowed}")
        self.name, self.value, self.allowed = name, value, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.value, self.allowed)  # else it could not leave the process that raised it

    def as_flag(self) -> str:
        """The same of a command line's flag."""
        return f"--{self.name.replace('_', '-')} {self.value}: {self.allowed}"


@dataclass(frozen=True)
class Method:
    """What is registered under a name: what builds it, a line about it, and the module it comes from."""

    build: Callable[..., Any]
    summary: str
    module: str


_METHODS: dict[str, dict[str, Method]] = {slot: {} for slot in SLOTS}


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _register(slot: str, name: str, summary: str) -> Decorator:
    def add(build: Callable[..., Any]) -> Callable[..., Any]:
        there = _METHODS[slot].get(name)
        if there is not None and there.module != build.__module__:
            raise ValueError(f"{slot} {name!r}: {there.module} has registered one; take another name")
        _METHODS[slot][name] = Method(build, summary, build.__module__)
        return build

    return add


def register_norm(name: str, summary: str = "") -> Decorator:
    """Decorates `build(dim, options, *, eps, bias, device, dtype) -> Module`, of (..., dim) to the same.

    A module with parameters needs a `reset_parameters()`, by which models on the meta device get their first values.
    """
    return _register("norm", name, summary)


def register_attention(name: str, summary: str = "") -> Decorator:
    """Decorates `build(head_dim, options, *, sequence_length, eps, device, dtype) -> stable_core.attentions.QueryKey`."""
    return _register("attention", name, summary)


def register_residual(name: str, summary: str = "") -> Decorator:
    """Decorates `build(encoder_layers, decoder_layers) -> (Residual, Residual)`, the encoder's and the decoder's."""
    return _register("residual", name, summary)


def register_init(name: str, summary: str = "") -> Decorator:
    """Decorates `draw_(weight)`, which fills the weight (out, in) of a layer in place."""
    return _register("init", name, summary)


def register_reparam(name: str, summary: str = "") -> Decorator:
    """Decorates `apply(model, options, filter_fn) -> None`, which changes the layers of `model` that filter_fn picks."""
    return _register("reparam", name, summary)


def names(slot: str) -> tuple[str, ...]:
    """What can be chosen, in the order in which it was registered."""
    return tuple(_METHODS[slot])


def method(slot: str, name: str) -> Method:
    """What is registered under a name.

    Raises:
        WrongOption: nothing is.
    """
    found = _METHODS[slot].get(name) if isinstance(name, str) else None
    if found is None:
        raise WrongOption(slot, name, f"allowed are {', '.join(map(repr, names(slot)))}")
    return found


def import_methods(modules: str) -> None:
    """Imports modules that register methods, a comma between their names; from the current directory, too.

    Raises:
        WrongOption: there is no such module.
    """
    for name in filter(None, (part.strip() for part in modules.split(","))):
        if "" not in sys.path:
            sys.path.append("")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0] and error.name != name:
                raise
            raise WrongOption("methods", name, "allowed are modules that Python finds, a comma between them") from None


def modules_of(chosen: Iterable[tuple[str, str]]) -> set[str]:
    """The modules, other than this library's, that registered the chosen (slot, name): what a saved model needs."""
    own = __name__.rpartition("registry")[0]
    return {found.module for slot, name in chosen if not (found := method(slot, name)).module.startswith(own)}
