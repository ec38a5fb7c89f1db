"""Where code refers to attention kernels, and puts a stand-in there for a while.

A kernel is called by a name in a Python module, or by an attribute of a model's module or of its class: `flash_attn_func`, or
`attend = torch.compile(flex_attention)`. References elsewhere, as in a closure, are not found.
"""

import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from .interfaces import INTERFACE, interface_arguments, registries
from .kernel_calls import Arguments, Kernel
from .kernels import BY_NAME, by_name, find_kernel

Run = Callable[["StandIn", tuple[Any, ...], dict[str, Any]], Any]


class StandIn:
    """Stands for a function that computes attention, and calls `run(stand_in, args, kwargs)` in its place."""

    def __init__(self, function: Callable[..., Any], kernel: Kernel, run: Run) -> None:
        self.function, self.kernel, self._run = function, kernel, run
        self.__wrapped__ = function  # so that it has its signature
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(self, name, getattr(function, name, None))
        self._signature = None if kernel is INTERFACE else inspect.signature(function)

    def of(self, function: Callable[..., Any]) -> "StandIn":
        """One like it, for another function."""
        return StandIn(function, self.kernel, self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self, args, kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a call by name."""
        return interface_arguments(args, kwargs) if self._signature is None else by_name(self._signature, args, kwargs)

    def __reduce__(self) -> str:
        return str(vars(self)["__qualname__"])  # it is copied and pickled as the function is, by name


@dataclass(frozen=True)
class Reference:
    """`name` in a namespace, which is the dictionary of a module or a class."""

    namespace: Any
    name: str

    @property
    def key(self) -> tuple[int, str]:
        return id(self.namespace), self.name

    def get(self) -> Any:
        found = (self.namespace.__dict__ if isinstance(self.namespace, type) else self.namespace).get(self.name)
        return found.__func__ if isinstance(found, staticmethod) else found

    def is_registered(self) -> bool:
        """Whether it is of transformers' attention interface."""
        return any(self.namespace is registry for registry in registries())

    def set(self, value: Any) -> None:
        if not isinstance(self.namespace, type):
            self.namespace[self.name] = value
        elif isinstance(self.namespace.__dict__.get(self.name), staticmethod):
            setattr(self.namespace, self.name, staticmethod(value))
        else:
            setattr(self.namespace, self.name, value)


LATE = (
    "transformers.modeling_flash_attention_utils",
)  # modules that come to refer to a kernel when it is first called

FUNCTIONS = (FunctionType, StandIn)
_held: dict[tuple[int, str], tuple[int, Reference, Any]] = {}  # times held, and the function
_stand_ins: dict[int, StandIn] = {}  # by the id of the function; one for all references to it, as pickle compares them
# What was searched, and what was found in it. Not by id, which a new module may have of one that is gone.
_in_modules: tuple[list[Any], list[Reference]] = ([], [])
_left: list[Reference] = []  # by those that were collected while they held them
_in_models: WeakKeyDictionary[nn.Module, tuple[list["ref[nn.Module]"], list[Reference]]] = WeakKeyDictionary()


def hold(model: nn.Module, run: Run) -> list[Reference]:
    """Puts stand-ins wherever kernels are referred to, for `model`, until `release` of the returned references."""
    release(_left)
    _left.clear()
    held: dict[tuple[int, str], Reference] = {}
    for reference in _references(model):
        if reference.key in held:
            continue
        function = reference.get()
        times, _, original = _held.get(reference.key, (0, reference, function))
        if not times:
            if isinstance(function, StandIn) or not callable(function):
                continue  # code that ran while there was a stand-in has kept it
            kernel = INTERFACE if reference.is_registered() else find_kernel(function)
            if kernel is None:
                continue
            reference.set(_stand_ins.setdefault(id(function), StandIn(function, kernel, run)))
        _held[reference.key] = times + 1, reference, original
        held[reference.key] = reference
    return list(held.values())


def renew(stand_in: StandIn) -> None:
    """Puts stand-ins before functions that were registered while `stand_in` ran: transformers does so as it loads a kernel."""
    for key, (times, reference, _) in _held.items():
        function = reference.get()
        if callable(function) and not isinstance(function, StandIn) and reference.is_registered():
            reference.set(_stand_ins.setdefault(id(function), stand_in.of(function)))
            _held[key] = times, reference, function


def release(held: list[Reference]) -> None:
    """Puts the functions back where no one else holds the references."""
    for reference in held:
        times, _, original = _held.pop(reference.key)
        if times > 1:
            _held[reference.key] = times - 1, reference, original
        elif isinstance(reference.get(), StandIn):
            reference.set(original)
    if not _held:
        _stand_ins.clear()


def leave(held: list[Reference]) -> None:
    """Has them released by the next `hold`: garbage may be collected while a model that refers to a stand-in is compiled."""
    _left.extend(held)


def _references(model: nn.Module) -> Iterator[Reference]:
    global _in_modules
    imported = list(sys.modules.values())
    if not _are_same(_in_modules[0], imported):
        namespaces = [getattr(module, "__dict__", None) for module in imported]
        _in_modules = imported, list(_named(x for x in namespaces if type(x) is dict))
    yield from _in_modules[1]
    yield from _named(vars(sys.modules[name]) for name in LATE if name in sys.modules)
    for registry in registries():
        yield from (Reference(registry, name) for name in list(registry))
    modules = list(model.modules())
    searched, found = _in_models.get(model, ([], []))
    if not _are_same([link() for link in searched], modules):
        found = [*_named(module.__dict__ for module in modules), *_of_classes(modules)]
        _in_models[model] = list(map(ref, modules)), found
    yield from found


def _are_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _of_classes(modules: list[nn.Module]) -> Iterator[Reference]:
    classes = {cls for module in modules for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    for cls in classes - {nn.Module}:
        for reference in _named([dict(cls.__dict__)]):
            whole = Reference(cls, reference.name)
            if "." not in getattr(whole.get(), "__qualname__", "."):  # else it is a method
                yield whole


def _named(namespaces: Iterable[dict[str, Any]]) -> Iterator[Reference]:
    for namespace in namespaces:
        for name, value in list(namespace.items()):
            if type(value) is staticmethod:
                value = value.__func__
            if type(value) in FUNCTIONS and value.__name__ in BY_NAME:
                yield Reference(namespace, name)
