"""`python -m hf_stable.update FOLDER ...`: the source beside a saved model, as this version of the library has it.

Folders of this plugin's models carry their source, which a later transformers may run otherwise. Weights and settings stay.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoConfig

from hf_stable import SigmaTransformerTokenizer
from hf_stable.note import METHOD, annotate
from hf_stable.source import METHODS_HEADER, is_written, put, source_of

PROG = "python -m hf_stable.update"


def update(folder: str | Path) -> list[str]:
    """Brings a folder's files of source up to date, and the note in a config.json of `hf_stable.sigma_reparam`.

    A call that was cut short leaves each file whole, old or new: call it again.

    Returns:
        The names of the files that changed.

    Raises:
        ValueError: it is no folder of a model or tokenizer that this library saved; a file of somebody else's has the name of
            one of its files. Nothing is changed then.
    """
    folder = Path(folder)
    config, tokenizer = (_read(folder / f"{name}.json") for name in ("config", "tokenizer_config"))
    classes = [*_classes(config, "config"), *_classes(tokenizer, "tokenizer_config")]
    if not classes and (config.get("quantization_config") or {}).get("quant_method") != METHOD:
        raise ValueError(f"{folder}: no folder of this library's: its config.json names no model of hf_stable")
    modules = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    methods = {
        name: text.removeprefix(METHODS_HEADER) for name, text in modules.items() if text.startswith(METHODS_HEADER)
    }
    files = source_of(classes, methods)
    stale = [path for path in folder.glob("*.py") if classes and is_written(path) and path.name not in files]
    changed = {name: text for name, text in files.items() if not _holds(folder / name, text)}
    put(folder, changed)
    for path in stale:
        path.unlink()
    noted = ["config.json"] if config and annotate(folder / "config.json") else []
    return sorted([*changed, *(path.name for path in stale), *noted])


def _read(path: Path) -> dict:
    """A file of JSON, {} where there is none; raises ValueError for another one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: no configuration: it holds a {type(found).__name__}")
    return found


def _classes(config: dict, name: str) -> list[str]:
    """What its auto_map names of this library's source; raises ValueError for what is not there (any longer)."""
    ours = _ours(config, name)
    named = config.get("auto_map") or {}
    classes = [cls for entry in named.values() for cls in (entry if isinstance(entry, list) else [entry]) if cls]
    if not ours or not classes:
        return []
    for cls in classes:
        if cls not in ours:
            raise ValueError(f"{name}.json: auto_map has {cls}: allowed are {', '.join(ours)}")
    return ours


def _ours(config: dict, name: str) -> list[str]:
    if name == "tokenizer_config":
        ours = SigmaTransformerTokenizer._auto_map["AutoTokenizer"][0]
        return [ours] if config.get("tokenizer_class") == SigmaTransformerTokenizer.__name__ else []
    try:
        known = type(AutoConfig.for_model(config.get("model_type")))
    except ValueError:
        return []
    return list(getattr(known, "auto_classes", {}).values())


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0].partition(": ")[2])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what save_pretrained wrote")
    status = 0
    for folder in parser.parse_args(argv).folders:
        try:
            changed = update(folder)
            print(f"{folder}: {', '.join(changed) or 'up to date'}")
        except (OSError, ValueError) as error:
            print(f"update: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
