"""The three scripts of the translation recipe, end to end on a few number words; the full one's commands."""

import math
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import small_data
from tests.warm import WARM

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "wmt17_en_de"


def script(name: str, *args, env: dict) -> subprocess.CompletedProcess:
    command = [str(RECIPE / name), *map(str, args)]
    return subprocess.run(command, env={**os.environ, **WARM, "SMALL": "1", **env}, capture_output=True, text=True)


def test_prepare_train_evaluate(tmp_path, monkeypatch):
    """On a folder of one's own: number words, and a longer sentence that the recipe leaves out."""
    monkeypatch.setattr(small_data, "NUMBERS", {"train": 500, "valid": 4, "test": 5})
    small_data.number_words(tmp_path / "data" / "mt")
    for language, word in (("en", "and "), ("de", "und ")):
        with (tmp_path / "data" / "mt" / f"test.{language}").open("a") as file:
            file.write(f"{word * 8}one\n")
    env = {"STABLE_DATA": str(tmp_path / "data"), "RUNS": str(tmp_path / "runs"), "GPUS": "0"}

    early = script("train.sh", "sigma_transformer_6l", env=env)
    assert early.returncode == 1 and "prepare.sh first" in early.stderr

    for _ in range(2):  # the second finds everything done
        done = script("prepare.sh", env=env)
        assert done.returncode == 0, done.stderr
        assert re.search(r"ready: 500 training pairs and \d{3} subwords", done.stdout)
    assert "train.en\n" not in done.stdout

    call = ("sigma_transformer_6l", 1, "--max-update", 2, "--distributed-world-size", 1)
    name = "sigma_transformer_6l-1--max-update_2_--distributed-world-size_1"
    done = script("train.sh", *call, env=env)
    assert done.returncode == 0, done.stderr[-2000:]

    done = script("evaluate.sh", *call, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    for split, short in (("valid", 4), ("test", 5)):
        assert re.search(rf"^{name} {split}: BLEU [\d.]+ \(fairseq\), [\d.]+ \(sacrebleu\)$", done.stdout, re.MULTILINE)
        translations = tmp_path / "runs" / "wmt17_en_de_small" / name / f"{split}.hyp.de"
        assert len(translations.read_text().splitlines()) == short

    (tmp_path / "data" / "mt" / "valid.en").write_text("other sentences\n")
    done = script("prepare.sh", env=env)
    assert done.returncode == 1 and "wmt17_en_de_small is of other data than" in done.stderr


@pytest.fixture
def full(tmp_path):
    """full(script, *args): the full recipe, with what needs the network replaced by a few lines of shell."""
    (tmp_path / "bin").mkdir()
    fakes = {
        "sacrebleu": 'case $* in *src*) echo "The house - it is old ." ;; *) echo "Das Haus, es ist alt." ;; esac',
        "curl": "exit 1",
    }
    for name, body in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    # The recipe as it is, but beside no .venv, which would come first on the path.
    (tmp_path / "home" / "recipes").mkdir(parents=True)
    (tmp_path / "home" / "recipes" / "wmt17_en_de").symlink_to(RECIPE)
    path = f"{tmp_path / 'bin'}:{WARM['PATH']}"
    env = {**os.environ, **WARM, "SMALL": "0", "RUNS": str(tmp_path / "runs"), "PATH": path}

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


def settings(tmp_path, name: str, *args, **env):
    """What a script would hand to fairseq, as fairseq's parser reads it."""
    from fairseq import options

    import fairseq_sigma  # noqa: F401

    done = script(name, *args, env={"RUNS": str(tmp_path), "GPUS": "4", "DRY_RUN": "1", **env})
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir())
    parsers = {"fairseq-train": options.get_training_parser, "fairseq-generate": options.get_generation_parser}
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    return [options.parse_args_and_arch(parsers[command](), argv) for command, *argv in commands]


def test_the_best_checkpoint_is_that_of_the_best_perplexity(tmp_path):
    """By fairseq's own figures of two validations, of which the first has the lower perplexity, the second the lower loss."""
    from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
    from fairseq.logging import metrics
    from fairseq_cli.train import get_valid_stats

    (args,) = settings(tmp_path, "train.sh", "sigma_transformer_18l", SMALL="0")
    assert not args.maximize_best_checkpoint_metric
    found = {"loss": [], args.best_checkpoint_metric: []}
    for loss, nll in ((3.0, 1.2), (2.9, 1.3)):  # nats a token
        with metrics.aggregate(new_root=True) as aggregated:
            sums = {"loss": 100 * loss, "nll_loss": 100 * nll, "ntokens": 100, "sample_size": 100}
            LabelSmoothedCrossEntropyCriterion.reduce_metrics([sums])
        trainer = SimpleNamespace(get_num_updates=lambda: 1)
        stats = get_valid_stats(None, trainer, aggregated.get_smoothed_values(), tracking_best=False)
        for name, values in found.items():
            values.append(stats[name])
    assert found.pop("loss") == pytest.approx([3.0 / math.log(2), 2.9 / math.log(2)], abs=1e-3)
    ((metric, values),) = found.items()
    assert metric == "ppl" and values == pytest.approx([math.exp(1.2), math.exp(1.3)], abs=0.01)


def test_commands_of_the_small_recipe(tmp_path):
    (args,) = settings(tmp_path, "train.sh", "postln_transformer_18l", 3)
    assert (args.lr, args.max_update, args.encoder_embed_dim, args.seed) == ([5e-3], 1500, 64, 3)
    for small, bpe in (("0", "subword_nmt"), ("1", "sentencepiece")):
        splits = settings(tmp_path, "evaluate.sh", "postln_transformer_18l", SMALL=small)
        assert [(args.gen_subset, args.post_process) for args in splits] == [("valid", bpe), ("test", bpe)]


def test_other_options_are_another_run(tmp_path):
    calls = [("sigma_transformer_6l", 1, *options) for options in ((), ("--init-std", 0.01), ("--init-std", 0.02))]
    trained = [settings(tmp_path, "train.sh", *call)[0] for call in calls]
    assert [args.init_std for args in trained] == [0.1, 0.01, 0.02]
    assert len({args.save_dir for args in trained}) == 3
    for call, args in zip(calls, trained, strict=True):
        assert settings(tmp_path, "evaluate.sh", *call)[0].path == f"{args.save_dir}/checkpoint_best.pt"


@pytest.mark.parametrize(
    "name, args, env, message",
    [
        ("train.sh", [], {}, "give an ARCH"),
        ("train.sh", ["sigma_transformer_6l", "one"], {}, "SEED = one: allowed are whole numbers"),
        ("prepare.sh", [], {"STABLE_DATA": "nowhere"}, "train.en is missing: STABLE_DATA names your folder with mt/"),
        ("prepare.sh", [], {"SMALL": "yes"}, "SMALL = yes: allowed are 0, 1"),
        ("evaluate.sh", ["sigma_transformer_6l"], {}, "checkpoint_best.pt is missing"),
    ],
)
def test_mistakes_get_one_line(name, args, env, message, tmp_path):
    done = script(name, *args, env={"RUNS": str(tmp_path), **env})
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1
