"""The registry of methods that a user chooses by name. Every stack looks here, for our methods and for a user's own.

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
    """A setting has a value that is not allowed. Attributes: its `name`, its `value`, and a text on what is `allowed`."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} = {value!r}: {allowed}")
        self.name, self.value, self.allowed = name, value, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.value, self.allowed)  # pickle would pass the message alone to __init__

    def as_flag(self) -> str:
        """The message for a command line: `--name value: allowed`."""
        return f"--{self.name.replace('_', '-')} {self.value}: {self.allowed}"


@dataclass(frozen=True)
class Method:
    """A registered method: the function that builds it, a line about it, and the module that function is from."""

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
    """Registers a norm: decorates `build(dim, options, *, eps, bias, device, dtype) -> Module`.

    The module maps (..., dim) to (..., dim). With parameters it needs a `reset_parameters()`, which gives them their first
    values in models that were built on the meta device.

    Raises:
        ValueError: another module has registered the name. All of the decorators here raise it.
    """
    return _register("norm", name, summary)


def register_attention(name: str, summary: str = "") -> Decorator:
    """Registers an attention: `build(head_dim, options, *, sequence_length, eps, device, dtype) -> attentions.QueryKey`."""
    return _register("attention", name, summary)


def register_residual(name: str, summary: str = "") -> Decorator:
    """Registers a residual connection: `build(encoder_layers, decoder_layers) -> (encoder's Residual, decoder's Residual)`."""
    return _register("residual", name, summary)


def register_init(name: str, summary: str = "") -> Decorator:
    """Registers an initialisation: `draw_(weight)` fills the weight (out, in) of a layer in place."""
    return _register("init", name, summary)


def register_reparam(name: str, summary: str = "") -> Decorator:
    """Registers a reparametrisation: `apply(model, options, filter_fn)` changes the layers of `model` that filter_fn picks."""
    return _register("reparam", name, summary)


def names(slot: str) -> tuple[str, ...]:
    """Names of the methods of a slot, in the order in which they were registered."""
    return tuple(_METHODS[slot])


def method(slot: str, name: str) -> Method:
    """The method that is registered under a name.

    Raises:
        WrongOption: the slot has no method of this name.
    """
    found = _METHODS[slot].get(name) if isinstance(name, str) else None
    if found is None:
        raise WrongOption(slot, name, f"allowed are {', '.join(map(repr, names(slot)))}")
    return found


def import_methods(modules: str) -> None:
    """Imports modules that register methods, given as names with commas between; the current directory is searched, too.

    Raises:
        WrongOption: a module is not found.
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
    """Modules outside this library that registered the chosen (slot, name) pairs: a saved model needs them to load again."""
    own = __name__.rpartition("registry")[0]
    return {found.module for slot, name in chosen if not (found := method(slot, name)).module.startswith(own)}
