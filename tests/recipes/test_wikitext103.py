"""The scripts of the language modelling recipe: small for real, and the full preparation."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from recipes import small_data
from tests.warm import WARM

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "wikitext103"


def script(name: str, *args, env: dict) -> subprocess.CompletedProcess:
    command = [str(RECIPE / name), *map(str, args)]
    return subprocess.run(command, env={**os.environ, **WARM, "SMALL": "1", **env}, capture_output=True, text=True)


@pytest.mark.slow  # wmt17's small recipe has the scripts, and tests/fairseq_sigma/test_language_model.py the training
def test_prepare_train_evaluate(tmp_path):
    """On the beginnings of what `small_data lm` writes: of plays."""
    small_data.plays_by_line(tmp_path / "data" / "lm")
    for split, size in (("train", 10000), ("valid", 30), ("test", 40)):
        path = tmp_path / "data" / "lm" / f"{split}.txt"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:size]), encoding="utf-8")
    env = {"STABLE_DATA": str(tmp_path / "data"), "RUNS": str(tmp_path / "runs")}
    # The smaller vocabulary of these lines, and one process: they start one after the other here.
    tiny = ("--adaptive-input-cutoff", "200,400", "--adaptive-softmax-cutoff", "200,400", "--max-tokens", 256)
    tiny += ("--distributed-world-size", 1, "--save-interval-updates", 1)

    early = script("train.sh", "sigma", env=env)
    assert early.returncode == 1 and "prepare.sh first" in early.stderr

    for _ in range(2):  # the second finds everything done
        done = script("prepare.sh", env=env)
        assert done.returncode == 0, done.stderr
        assert re.search(r"ready: \d{5,6} training words and a vocabulary of \d{3,4} ", done.stdout)

    done = script("train.sh", "sigma", 1, *tiny, "--max-update", 2, env=env)
    assert done.returncode == 0, done.stderr[-2000:]

    done = script("evaluate.sh", "sigma", 1, *tiny, "--max-update", 2, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    for split in ("valid", "test"):
        assert re.search(
            rf"^sigma-16-lr0\.1-decay1e-4-1--adaptive\S+ {split}: perplexity \d+\.\d+$", done.stdout, re.MULTILINE
        )


@pytest.fixture
def full(tmp_path):
    """full(script, *args, **env): the full recipe beside no .venv, with a curl that has no network."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "curl").write_text("#!/bin/sh\nexit 6\n")
    (tmp_path / "bin" / "curl").chmod(0o755)
    (tmp_path / "home" / "recipes").mkdir(parents=True)
    (tmp_path / "home" / "recipes" / "wikitext103").symlink_to(RECIPE)
    path = f"{tmp_path / 'bin'}:{WARM['PATH']}"

    def run(name: str, *args, **env) -> subprocess.CompletedProcess:
        command = ["bash", str(tmp_path / "home" / "recipes" / "wikitext103" / name), *map(str, args)]
        env = {**os.environ, **WARM, "SMALL": "0", "RUNS": str(tmp_path / "runs"), "PATH": path, **env}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


def test_full_preparation(full, tmp_path):
    text = tmp_path / "runs" / "wikitext103" / "text"
    done = full("prepare.sh")
    assert done.returncode == 1
    assert "wikitext-103-v1.zip could not be downloaded; if you have wikitext-103-v1.zip, put it into" in done.stderr
    (text / "wikitext-103-v1.zip").write_text("a page that says the archive has moved\n")
    done = full("prepare.sh")
    assert done.returncode == 1
    assert re.search(r"has SHA-256 [0-9a-f]{64}, the official archive [0-9a-f]{64}: remove it", done.stderr)
    for split in ("train", "valid", "test"):
        (text / f"wiki.{split}.tokens").write_text(" \n = Robert <unk> = \n \n Robert <unk> is an English actor . \n")
    done = full("prepare.sh")
    assert done.returncode == 0, done.stderr
    # Every word is kept, however rare: = Robert is an English actor and the full stop; 4 special symbols, one of them <unk>;
    # filled up to a multiple of 8.
    assert "ready: 11 training words and a vocabulary of 16" in done.stdout
    assert (text.parent / "data" / "test.idx").exists()


@pytest.mark.parametrize(
    "name, args, env, message",
    [
        ("train.sh", [], {}, "MODEL = : allowed are sigma, preln, postln"),
        ("train.sh", ["gpt"], {}, "MODEL = gpt: allowed are sigma, preln, postln"),
        ("train.sh", ["sigma", "one"], {}, "SEED = one: allowed are whole numbers"),
        ("train.sh", ["sigma"], {"LR": "0"}, "LR = 0: allowed are positive numbers"),
        ("train.sh", ["sigma"], {"LR": "fast"}, "LR = fast: allowed are positive numbers"),
        ("train.sh", ["sigma"], {"DECAY": "-1e-4"}, "DECAY = -1e-4: allowed are numbers from 0"),
        ("evaluate.sh", ["sigma"], {"DEPTH": "24"}, "DEPTH = 24: allowed are 16, 32"),
        ("prepare.sh", [], {"STABLE_DATA": "nowhere"}, "train.txt is missing: STABLE_DATA names your folder with lm/"),
        ("prepare.sh", [], {"SMALL": "yes"}, "SMALL = yes: allowed are 0, 1"),
        ("evaluate.sh", ["preln"], {}, "checkpoint_best.pt is missing: run"),
    ],
)
def test_mistakes_get_one_line(name, args, env, message, tmp_path):
    done = script(name, *args, env={"RUNS": str(tmp_path), **env})
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1
