"""The source of a model as flat files beside its weights, from which `trust_remote_code=True` loads it.

transformers copies what a model file imports relatively from its own folder. The core's files are not there, so they are
written as `stable_core_<name>.py`, and the imports that name them along with it. Out of a folder so written the files are
copied as they are: a model loaded from one saves its source like any other.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

HEADER = "# Written by stable-transformer (MIT) when the model was saved.\n"
IMPORT = re.compile(r"^(?P<indent>\s*)from (?P<package>stable_core)?\.(?P<name>\w+) import", re.MULTILINE)


def is_written(path: Path) -> bool:
    """Whether a file is one that `write_source` wrote."""
    return path.suffix == ".py" and path.read_text(encoding="utf-8").startswith(HEADER)


def without_source(folder: str | Path, timestamps: dict[str, float]) -> dict[str, float]:
    """Of the files that were there before a model is saved, from which transformers uploads what has changed since, those that
    were not written for it just before."""
    return {name: time for name, time in timestamps.items() if not is_written(Path(folder, name))}


def write_source(folder: str | Path, classes: Iterable[str]) -> None:
    """Writes the modules of `classes` ("module.Class", beside this file), and all that they import from this library.

    Raises:
        ValueError: a file of the same name is there that this function has not written. Nothing is written then.
    """
    put(Path(folder), source_of(classes))


def source_of(classes: Iterable[str]) -> dict[str, str]:
    """The same files, by their names."""
    files: dict[str, str] = {}
    waiting = {(Path(__file__).parent, "", cls.partition(".")[0]) for cls in classes}
    while waiting:
        place, prefix, name = waiting.pop()
        if f"{prefix}{name}.py" in files:
            continue

        def flatten(match: re.Match, here: tuple[Path, str] = (place, prefix)) -> str:
            core = match["package"] and (Path(sys.modules["stable_core"].__path__[0]), "stable_core_")
            waiting.add((*(core or here), match["name"]))
            return f"{match['indent']}from .{(core or here)[1]}{match['name']} import"

        text = IMPORT.sub(flatten, (place / f"{name}.py").read_text(encoding="utf-8"))
        files[f"{prefix}{name}.py"] = HEADER + text.removeprefix(HEADER)
    return files


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
