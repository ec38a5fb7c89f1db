"""`prepare.py HOURS ARCHIVES MANIFEST`: LibriSpeech from openslr.org/12, checked, unpacked, as a manifest for `sigma_ctc`."""

import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import soundfile

from recipes.download import Archive, fetch, md5

URL = "https://www.openslr.org/resources"
MINI = ("train-clean-5", "dev-clean-2")  # openslr.org/31
MD5 = {  # their md5sum.txt
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-5": "5df7d4e78065366204ca6845bb08f490",
    "dev-clean-2": "6d7ab67ac6a1d2c993d050e16d61080d",
}
TRAIN = {"100": ("train-clean-100",), "960": ("train-clean-100", "train-clean-360", "train-other-500")}


def fetch_all(parts: Sequence[str], folder: Path) -> list[Path]:
    """Downloads the archives that are not there, and unpacks those that were not; returns the folder of speakers of each part.

    Raises:
        OSError: one could not be downloaded.
        ValueError: its checksum is wrong, or the recordings are not in it.
    """
    todo = [part for part in parts if not (folder / f"{part}.done").exists()]
    archives = {part: folder / f"{part}.tar.gz" for part in todo}
    fetch(
        [Archive(f"{URL}/{31 if part in MINI else 12}/{path.name}", path, MD5[part]) for part, path in archives.items()]
    )
    for part, archive in archives.items():
        found = md5(archive)
        if found != MD5[part]:
            raise ValueError(f"{archive}: md5 {found}, but openslr's is {MD5[part]}; remove it to download it again")
        print(f"unpacking {archive.name}")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        if not (folder / "LibriSpeech" / part).is_dir():
            raise ValueError(f"{archive}: no folder LibriSpeech/{part} in it")
        (folder / f"{part}.done").touch()
    return [folder / "LibriSpeech" / part for part in parts]


def rows(split: str, speakers: Path) -> list[str]:
    """A manifest line for each line of the transcripts: split, path, seconds, text.

    Raises:
        ValueError: no transcripts, or a recording that cannot be opened.
    """
    lines = []
    for transcripts in sorted(speakers.rglob("*.trans.txt")):
        for line in transcripts.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            path = transcripts.parent / f"{name}.flac"
            try:
                seconds = soundfile.info(str(path)).duration
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
            lines.append(f"{split}\t{path.resolve()}\t{seconds:.3f}\t{text.lower()}")
    if not lines:
        raise ValueError(f"{speakers}: no transcripts")
    return lines


def main(hours: str, archives: Path, manifest: Path) -> int:
    try:
        lines = ["split\tpath\tseconds\ttext"]
        parts = (*TRAIN[hours], "dev-clean", "dev-other", "test-clean", "test-other")
        for part, speakers in zip(parts, fetch_all(parts, archives), strict=True):
            lines += rows("train" if part.startswith("train") else part, speakers)
    except (OSError, ValueError, tarfile.TarError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    manifest.parent.mkdir(parents=True, exist_ok=True)
    partial = manifest.with_suffix(".part")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.rename(manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
