"""A made-up parallel corpus, and fairseq's commands run in this process: importing fairseq takes longer than the runs."""

import random
import sys
from pathlib import Path

import pytest
import torch

USER_DIR = Path(__file__).parents[2] / "plugins" / "fairseq_sigma"
TINY = (
    "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --decoder-attention-heads 2 "
    "--encoder-layers 2 --decoder-layers 2 --dropout 0 --optimizer adam --lr 0.01 --clip-norm 0 --cpu "
    "--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --batch-size 16 --num-workers 0 "
    "--disable-validation --no-progress-bar --log-interval 1"
).split()


def call(command: str, *args) -> None:
    """Runs a fairseq command line in this process."""
    import importlib

    argv, sys.argv = sys.argv, [f"fairseq-{command}", *map(str, args)]
    try:
        importlib.import_module(f"fairseq_cli.{command}").cli_main()
    finally:
        sys.argv = argv


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """64 training sentences of letters and their mirror images, 43 for testing, binarised with a joint dictionary."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for split, size in (("train", 64), ("valid", 16), ("test", 43)):
        lines = ["".join(rng.choices("abcdef", k=rng.randint(3, 9))) for _ in range(size)]
        (folder / f"{split}.en").write_text("".join(f"{' '.join(line)}\n" for line in lines))
        (folder / f"{split}.de").write_text("".join(f"{' '.join(reversed(line))}\n" for line in lines))
    prefixes = [arg for split in ("train", "valid", "test") for arg in (f"--{split}pref", folder / split)]
    call("preprocess", "-s", "en", "-t", "de", "--joined-dictionary", *prefixes, "--destdir", folder / "data")
    return folder / "data"


@pytest.fixture
def train(corpus, tmp_path):
    """train(name, arch, steps, *flags) -> the checkpoint that fairseq-train wrote into tmp_path/name."""

    def run(name: str, arch: str, steps: int, *flags) -> dict:
        save = ("--save-dir", tmp_path / name, "--no-epoch-checkpoints", "--max-update", steps)
        call("train", corpus, "--user-dir", USER_DIR, "--arch", arch, *TINY, *save, *flags)
        return torch.load(tmp_path / name / "checkpoint_last.pt", map_location="cpu")

    return run


@pytest.fixture
def generate(corpus, tmp_path, capsys):
    """generate(name, *flags) -> the hypotheses of fairseq-generate with beam 5 for the test set, in order."""

    def run(name: str, *flags, plugin=("--user-dir", USER_DIR)) -> list[str]:
        capsys.readouterr()
        path = ("--path", tmp_path / name / "checkpoint_last.pt", "--beam", 5, "--max-len-b", 12)
        call("generate", corpus, *plugin, *path, "--cpu", "--gen-subset", "test", "--batch-size", 20, *flags)
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if line.startswith("H-")]
        return [text for _, _, text in sorted(lines, key=lambda line: int(line[0][2:]))]

    return run
