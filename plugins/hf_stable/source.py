"""The source of a model as flat files beside its weights, from which `trust_remote_code=True` loads it.

transformers copies what a model file imports relatively from its own folder. The core's files are not there, so they are
written as `stable_core_<name>.py`, and the imports that name them along with it. Out of a folder so written the files are
copied as they are: a model loaded from one saves its source like any other.

Modules that register methods of a user's own go along, and the configuration's file imports them: their names must be known
when it is read.
"""

import ast
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from stable_core.registry import SLOTS, modules_of

HEADER = "# Written by stable-transformer (MIT) when the model was saved.\n"
METHODS_HEADER = "# Registers methods of this model; written by stable-transformer when it was saved.\n"
IMPORT = re.compile(r"^(?P<indent>\s*)from (?P<package>stable_core)?\.(?P<name>\w+) import", re.MULTILINE)
REGISTERS = re.compile(r"^from \.\w+ import __name__ as _methods\n", re.MULTILINE)
CORE = "stable_core_"
REGISTRY = Path(
    inspect.getfile(modules_of)
)  # registry.py beside the core's files; or, in a folder, stable_core_registry.py


def is_written(path: Path) -> bool:
    """Whether a file is one that `write_source` wrote."""
    return path.suffix == ".py" and path.read_text(encoding="utf-8").startswith((HEADER, METHODS_HEADER))


def without_source(folder: str | Path, timestamps: dict[str, float]) -> dict[str, float]:
    """Of the files that were there before a model is saved, from which transformers uploads what has changed since, those that
    were not written for it just before."""
    return {name: time for name, time in timestamps.items() if not is_written(Path(folder, name))}


def write_source(folder: str | Path, classes: Iterable[str], methods: Mapping[str, str] | None = None) -> None:
    """Writes the modules of `classes` ("module.Class", beside this file), what they import from this library, and `methods`.

    Raises:
        ValueError: as `source_of`, or a file of the same name is there that this function has not written. Nothing is written
            then.
    """
    put(Path(folder), source_of(classes, methods))


def source_of(classes: Iterable[str], methods: Mapping[str, str] | None = None) -> dict[str, str]:
    """The same files, by their names; `methods` are modules by theirs, as `methods_of` gives them.

    Raises:
        ValueError: one of `methods` has the name of a file of this library's.
    """
    waiting, files = {cls.partition(".")[0] for cls in classes}, {}
    configurations = {f"{name}.py" for name in waiting if name.startswith("configuration_")}
    own: dict[str, str] = {}
    for name, text in (methods or {}).items():
        text, imported = _flatten(text)
        own[f"{name}.py"] = METHODS_HEADER + text
        waiting |= imported
    while waiting:
        name = waiting.pop()
        text, imported = _flatten(REGISTERS.sub("", _file(name).read_text(encoding="utf-8")), name.startswith(CORE))
        files[f"{name}.py"] = HEADER + text.removeprefix(HEADER)
        waiting |= {other for other in imported if f"{other}.py" not in files}
    for name in files.keys() & own.keys():
        raise ValueError(f"{name}, which registers a method: this library has a file of that name; allowed are others")
    for name in configurations:
        files[name] += "".join(f"from .{Path(module).stem} import __name__ as _methods\n" for module in own)
    return files | own


def methods_of(config) -> dict[str, str]:
    """The modules of a user's own that registered what a configuration names: their text by their name.

    Raises:
        ValueError: one cannot go along with a saved model.
    """
    found: dict[str, str] = {}
    for slot in SLOTS:
        for name in modules_of([(slot, getattr(config, slot))]):
            what = f"{slot} = {getattr(config, slot)!r}, which {name} registers, cannot be saved with the model"
            path = getattr(sys.modules.get(name), "__file__", None)
            if name == "__main__" or path is None:
                raise ValueError(f"{what}: allowed are modules that are imported from a file of their own")
            text = Path(path).read_text(encoding="utf-8").removeprefix(METHODS_HEADER)
            for imported in _imports(_flatten(text)[0]):
                raise ValueError(
                    f"{what}: it imports {imported}; allowed are torch, the standard library and names of stable_core's modules"
                )
            if found.setdefault(name.rpartition(".")[2], text) != text:
                raise ValueError(f"{what}: another such module has the same name; allowed are two names")
    return found


def _imports(text: str) -> list[str]:
    """What a flattened module imports and is not there where the model is loaded."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    there = {"torch", *sys.stdlib_module_names}
    core = [name for name in names if name.startswith(f".{CORE}") and _file(name[1:]).is_file()]
    return [name for name in names if name.partition(".")[0] not in there and name not in core]


def _flatten(text: str, of_core: bool = False) -> tuple[str, set[str]]:
    """A module's text as a file among the others, and what it imports of them."""
    imported = set()

    def flatten(match: re.Match) -> str:
        name = match["name"]
        if (match["package"] or of_core) and not name.startswith(CORE):
            name = CORE + name
        imported.add(name)
        return f"{match['indent']}from .{name} import"

    return IMPORT.sub(flatten, text), imported


def _file(name: str) -> Path:
    """Where the text of `name`.py comes from."""
    if name.startswith(CORE):
        return REGISTRY.with_name(REGISTRY.name.replace("registry", name.removeprefix(CORE)))
    return Path(__file__).with_name(f"{name}.py")


def put(folder: Path, files: Mapping[str, str]) -> None:
    """Writes files of source: all beside the folder's first, and then each in its place, so that none is ever cut short.

    Raises:
        ValueError: as `write_source`.
    """
    for name in files:
        if (folder / name).exists() and not is_written(folder / name):
            raise ValueError(f"{folder / name} is not this library's: save the model to a folder without it")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".source-") as scratch:
        for name, text in files.items():
            Path(scratch, name).write_text(text, encoding="utf-8")
        for name in files:
            os.replace(Path(scratch, name), folder / name)
