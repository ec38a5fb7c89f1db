"""The three scripts of the translation recipe, end to end on a few thousand real sentences."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "wmt17_en_de"
DATA = Path(os.environ.get("STABLE_DATA", ROOT.parent / "shared" / "data")) / "mt"
SIZES = {"train": 8000, "valid": 30, "test": 40}  # of which the recipe takes the short ones


def script(name: str, *args, env: dict) -> subprocess.CompletedProcess:
    command = [str(RECIPE / name), *map(str, args)]
    return subprocess.run(command, env={**os.environ, "SMALL": "1", **env}, capture_output=True, text=True)


@pytest.mark.skipif(
    not DATA.is_dir(), reason=f"needs real sentences in {DATA}; set STABLE_DATA to the folder above mt/"
)
def test_prepare_train_evaluate(tmp_path):
    (tmp_path / "data" / "mt").mkdir(parents=True)
    for split, size in SIZES.items():
        for language in ("en", "de"):
            lines = (DATA / f"{split}.{language}").read_text(encoding="utf-8").split("\n")[:size]
            (tmp_path / "data" / "mt" / f"{split}.{language}").write_text(
                "".join(f"{line}\n" for line in lines), encoding="utf-8"
            )
    env = {"STABLE_DATA": str(tmp_path / "data"), "RUNS": str(tmp_path / "runs")}

    early = script("train.sh", "sigma_transformer_6l", env=env)
    assert early.returncode == 1 and "prepare.sh first" in early.stderr

    for _ in range(2):  # the second finds everything done
        done = script("prepare.sh", env=env)
        assert done.returncode == 0, done.stderr
        assert re.search(r"ready: \d{4} training pairs and 20\d\d subwords", done.stdout)
    assert "train.en\n" not in done.stdout

    for updates in (2, 3):  # the second goes on from the checkpoint of the first
        done = script(
            "train.sh", "sigma_transformer_6l", 1, "--max-update", updates, "--validate-interval-updates", 1, env=env
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"Loaded checkpoint .*@ 2 updates", done.stdout + done.stderr)

    done = script("evaluate.sh", "sigma_transformer_6l", 1, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    for split in ("valid", "test"):
        assert re.search(
            rf"sigma_transformer_6l seed 1 {split}: BLEU [\d.]+ \(fairseq\), [\d.]+ \(sacrebleu\)", done.stdout
        )
        translations = tmp_path / "runs" / "wmt17_en_de_small" / "sigma_transformer_6l-1" / f"{split}.hyp.de"
        both = zip(
            *((tmp_path / "data" / "mt" / f"{split}.{l}").read_text().splitlines() for l in ("en", "de")), strict=True
        )
        short = [max(len(side.split()) for side in pair) <= 8 for pair in both]
        assert len(translations.read_text().splitlines()) == sum(short) > 0


@pytest.fixture
def full(tmp_path):
    """full(script, *args): the full recipe, with what needs the network or a GPU replaced by a few lines of shell."""
    (tmp_path / "bin").mkdir()
    fakes = {
        "fairseq-train": 'printf "%s\\n" "$@"',
        "sacrebleu": 'case $* in *src*) echo "The house - it is old ." ;; *) echo "Das Haus, es ist alt." ;; esac',
        "curl": "exit 1",
    }
    for name, body in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    # The recipe as it is, but beside no .venv, which would come first on the path.
    (tmp_path / "home" / "recipes").mkdir(parents=True)
    (tmp_path / "home" / "recipes" / "wmt17_en_de").symlink_to(RECIPE)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "SMALL": "0", "RUNS": str(tmp_path / "runs"), "PATH": path}

    def run(name: str, *args) -> subprocess.CompletedProcess:
        command = ["bash", str(tmp_path / "home" / "recipes" / "wmt17_en_de" / name), *map(str, args)]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


def test_full_preparation_from_downloaded_archives(full, tmp_path):
    text = tmp_path / "runs" / "wmt17_en_de" / "text"
    (text / "orig" / "training").mkdir(parents=True)
    done = full("prepare.sh")
    assert done.returncode == 1 and "could not be downloaded" in done.stderr
    for archive in (
        "training-parallel-europarl-v7.tgz",
        "training-parallel-commoncrawl.tgz",
        "training-parallel-nc-v12.tgz",
    ):
        (text / "orig" / archive).write_text("already unpacked\n")
    for corpus in ("training/europarl-v7", "commoncrawl", "training/news-commentary-v12"):
        (text / "orig" / f"{corpus}.de-en.en").write_text("The house's door is well-known.\n\nYes\n")
        (text / "orig" / f"{corpus}.de-en.de").write_text(
            "Die Tür des Hauses ist bekannt.\nleer\nJa, ja, ja, ja, ja, ja, ja.\n"
        )
    done = full("prepare.sh")
    assert done.returncode == 0, done.stderr
    # The empty line and the pair with a ratio over 1.5 are gone, from each of the three corpora.
    assert "ready: 3 training pairs" in done.stdout
    assert (text / "tok.train.en").read_text().splitlines()[0] == "The house &apos;s door is well @-@ known ."
    assert (text / "valid.ref.de").read_text() == "Das Haus, es ist alt.\n"
    assert (text.parent / "data" / "test.en-de.de.idx").exists()


def test_table_10_to_the_letter(full, tmp_path):
    """The full recipe's command line, taken from a fairseq-train that only prints it."""
    data = tmp_path / "runs" / "wmt17_en_de" / "data"
    data.mkdir(parents=True)
    (data / "dict.en.txt").write_text("a 1\n")
    flags = {}
    for arch in ("sigma_transformer_100l", "deepnorm_transformer_100l"):
        done = full("train.sh", arch, 3)
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()
        flags[arch] = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    table = {
        "--optimizer": "adam", "--adam-betas": "(0.9, 0.98)", "--adam-eps": "1e-8", "--clip-norm": "0",
        "--lr-scheduler": "inverse_sqrt", "--warmup-updates": "4000", "--warmup-init-lr": "1e-7", "--max-update": "100000",
        "--weight-decay": "0.0001", "--dropout": "0.4", "--label-smoothing": "0.1", "--seed": "3",
    }  # fmt: skip
    for arch, lr in (("sigma_transformer_100l", 4.5e-3), ("deepnorm_transformer_100l", 1.4e-3)):
        assert table.items() <= flags[arch].items()
        assert float(flags[arch]["--lr"]) == lr
        processes = max(1, torch.cuda.device_count())
        assert int(flags[arch]["--max-tokens"]) * int(flags[arch]["--update-freq"]) * processes == 4096 * 8 * 16


@pytest.mark.parametrize(
    "name, args, env, message",
    [
        ("train.sh", [], {}, "give an ARCH"),
        ("train.sh", ["sigma_transformer_6l", "one"], {}, "SEED = one: allowed are whole numbers"),
        ("prepare.sh", [], {"STABLE_DATA": "nowhere"}, "train.en is missing: set STABLE_DATA"),
        ("prepare.sh", [], {"SMALL": "yes"}, "SMALL=yes: allowed are 0 and 1"),
        ("evaluate.sh", ["sigma_transformer_6l"], {}, "checkpoint_best.pt is missing"),
    ],
)
def test_mistakes_get_one_line(name, args, env, message, tmp_path):
    done = script(name, *args, env={"RUNS": str(tmp_path), **env})
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1
