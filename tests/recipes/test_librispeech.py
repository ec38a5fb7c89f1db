"""The speech recipe: its preparation on a made-up archive, its settings as fairseq reads them, and its scripts end to end."""

import hashlib
import io
import os
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from recipes import small_data
from recipes.librispeech import prepare
from tests.warm import WARM

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "librispeech"


def script(name: str, *args, **env) -> subprocess.CompletedProcess:
    command = [str(RECIPE / name), *map(str, args)]
    return subprocess.run(command, env={**os.environ, **WARM, **env}, capture_output=True, text=True)


def packed(part: str, speakers: dict[str, list[np.ndarray]]) -> bytes:
    """An archive of LibriSpeech's shape, of these recordings at 16 kHz."""
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w:gz") as tar:
        for speaker, recordings in speakers.items():
            names = [f"{speaker}-8-{i:04}" for i in range(len(recordings))]
            said = ("IT'S A TEST", "SECOND")
            files = {f"{speaker}-8.trans.txt": "".join(f"{n} {said[i % 2]}\n" for i, n in enumerate(names)).encode()}
            for name, recording in zip(names, recordings, strict=True):
                sound = io.BytesIO()
                soundfile.write(sound, recording, 16000, format="FLAC")
                files[f"{name}.flac"] = sound.getvalue()
            for name, content in files.items():
                member = tarfile.TarInfo(f"LibriSpeech/{part}/{speaker}/8/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return result.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch) -> Path:
    """The archives of HOURS=100, each with two utterances of one speaker, and their checksums."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for part in ("train-clean-100", "dev-clean", "dev-other", "test-clean", "test-other"):
        content = packed(part, {"7": [np.zeros(16000)] * 2})
        (folder / f"{part}.tar.gz").write_bytes(content)
        monkeypatch.setitem(prepare.MD5, part, hashlib.md5(content).hexdigest())
    return folder


def test_prepare_checks_unpacks_and_lists(archives, tmp_path, capsys):
    manifest = tmp_path / "runs" / "manifest.tsv"
    for _ in range(2):
        assert prepare.main("100", archives, manifest) == 0
    assert capsys.readouterr().out.count("unpacking") == 5  # once each
    header, *lines = [line.split("\t") for line in manifest.read_text().splitlines()]
    assert header == ["split", "path", "seconds", "text"] and len(lines) == 10
    split, path, seconds, text = lines[0]
    assert (split, seconds, text) == ("train", "1.000", "it's a test") and Path(path).is_file()
    assert {line[0] for line in lines} == {"train", "dev-clean", "dev-other", "test-clean", "test-other"}


def test_prepare_refuses_a_damaged_archive(archives, tmp_path, capsys):
    with (archives / "dev-other.tar.gz").open("ab") as archive:
        archive.write(b"x")
    assert prepare.main("100", archives, tmp_path / "manifest.tsv") == 1
    assert re.fullmatch(r"prepare: .*dev-other.tar.gz: md5 \w+, but openslr's is \w+; .*\n", capsys.readouterr().err)
    assert not (tmp_path / "manifest.tsv").exists()


def test_prepare_refuses_a_missing_recording(archives, tmp_path, capsys):
    assert prepare.main("100", archives, tmp_path / "manifest.tsv") == 0
    (archives / "LibriSpeech/dev-clean/7/8/7-8-0001.flac").unlink()
    assert prepare.main("100", archives, tmp_path / "manifest.tsv") == 1
    assert "7-8-0001.flac" in capsys.readouterr().err


def settings(tmp_path, *args, **env):
    """What train.sh would hand to fairseq-train, as fairseq's parser reads it."""
    from fairseq import options

    import fairseq_sigma  # noqa: F401

    done = script("train.sh", *args, RUNS=str(tmp_path), GPUS="4", DRY_RUN="1", **env)
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir())
    command, *argv = shlex.split(done.stdout)
    assert command == "fairseq-train"
    return options.parse_args_and_arch(options.get_training_parser(), argv)


@pytest.mark.parametrize(
    ("options", "environment", "half"),
    [
        ((), {}, 330_000),
        (("--warmup-updates", "32000"), {}, 330_000),  # Figure 12
        (("--lr", "1", "--warmup-updates=16000"), {}, 330_000),
        ((), {"OPTIMIZER": "lars"}, 300_000),
        (("--warmup-updates", "64000"), {"OPTIMIZER": "lars"}, 300_000),
    ],
)
def test_the_rate_is_halved_once_and_where_the_paper_halves_it(tmp_path, options, environment, half):
    """By fairseq's own scheduler, whatever the warm-up: step(330k, 0.5), with LARS step(300k, 0.5) [σ, Table 8]."""
    from fairseq.optim import FairseqOptimizer
    from fairseq.optim.lr_scheduler.step_lr_scheduler import StepLRSchedule

    class Rateless(FairseqOptimizer):
        def set_lr(self, lr):
            pass

    args = settings(tmp_path, "preln", 1, *options, **environment)
    scheduler = StepLRSchedule(args, Rateless(args))
    (peak,) = args.lr
    assert [scheduler.step_update(n) for n in (half - 1, half, 499_999)] == [peak, peak / 2, peak / 2]
    assert scheduler.step_update(args.warmup_updates // 2) == pytest.approx(peak / 2 if args.warmup_updates else peak)


def test_the_cosine_ends_where_it_did_whatever_the_warm_up(tmp_path):
    """One phase of 500,000 updates [σ, App. E.5]."""
    args = settings(tmp_path, "preln", 1, "--warmup-updates", "32000", HOURS="960", SCHEDULE="cosine")
    assert (args.warmup_updates, args.warmup_updates + args.lr_period_updates) == (32_000, 500_000)


def test_many_options_name_a_folder_too(tmp_path):
    """A name ends at 255 letters; what was cut off still counts."""
    many = ["--max-tokens", "3200", *["--log-interval", "100"] * 20]
    names = {Path(settings(tmp_path, "sigma", 1, *many, "--dropout", rate).save_dir).name for rate in ("0.1", "0.2")}
    assert len(names) == 2 and all(len(name) <= 255 for name in names)
    assert (
        Path(settings(tmp_path, "sigma", 1, "--dropout", "0.1").save_dir).name == "sigma-adagrad-step-36-1--dropout_0.1"
    )


def test_settings_of_the_small_recipe(tmp_path):
    args = settings(tmp_path, "sigma", 3, SMALL="1")
    assert (args.encoder_layers, args.lr, args.max_update, args.valid_subset) == (4, [0.03], 3000, "valid")
    assert args.seed == 3


def test_other_options_are_another_run(tmp_path):
    runs = [settings(tmp_path, "preln", 1, *options) for options in ((), ("--lr", 1), ("--lr", 0.25))]
    assert [args.lr for args in runs] == [[0.5], [1], [0.25]]
    assert len({args.save_dir for args in runs}) == 3


def test_the_command_of_the_evaluation(tmp_path, capsys):
    from fairseq_sigma import transcribe

    run = tmp_path / "run"
    done = script("evaluate.sh", run, RUNS=str(tmp_path), DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    python, m, module, *arguments = shlex.split(done.stdout)
    assert (python, m, module) == ("python", "-m", "fairseq_sigma.transcribe")
    assert arguments[-5:] == ["--split", "dev-clean", "dev-other", "test-clean", "test-other"]
    assert transcribe.main(arguments) == 1  # and no usage error: there is no such checkpoint
    assert f"{run}/checkpoint_best.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, env, message",
    [
        ((), {}, "MODEL = : allowed are postln"),
        (("ln",), {}, "MODEL = ln: allowed are postln"),
        (("sigma", "x"), {}, "SEED = x: allowed are whole numbers"),
        (("sigma",), {"OPTIMIZER": "adam"}, "OPTIMIZER = adam: allowed are adagrad, lars"),
        (("sigma",), {"DEPTH": "18"}, "DEPTH = 18: allowed are 36, 72"),
        (
            ("sigma", "1", "--warmup-updates", "soon"),
            {},
            "--warmup-updates soon: allowed are whole numbers up to 160000",
        ),
        (("sigma", "1", "--warmup-updates", "200000"), {}, "200000: allowed are whole numbers up to 160000"),
        (("sigma",), {"HOURS": "10"}, "HOURS = 10: allowed are 100, 960"),
        (("sigma",), {"RUNS": "nowhere"}, "prepare.sh first"),
    ],
)
def test_wrong_calls_are_named(tmp_path, args, env, message):
    (tmp_path / "librispeech_100").mkdir()
    (tmp_path / "librispeech_100" / "manifest.tsv").write_text("split\tpath\ttext\n")
    done = script("train.sh", *args, **{"RUNS": str(tmp_path), **env})
    assert done.returncode == 1 and message in done.stderr


def test_prepare_train_evaluate(tmp_path, monkeypatch, server):
    """The small recipe for two updates, on what `small_data asr` makes of archives with noise in them."""
    rng = np.random.default_rng(0)
    speakers = {"train-clean-5": {"7": 6}, "dev-clean-2": {"21": 2, "3": 3, "4": 1}}
    for part, counts in speakers.items():
        content = packed(
            part, {name: [0.1 * rng.standard_normal(16000) for _ in range(n)] for name, n in counts.items()}
        )
        server.files[f"/31/{part}.tar.gz"] = content
        monkeypatch.setitem(prepare.MD5, part, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(prepare, "URL", server.address)
    monkeypatch.setenv("STABLE_DATA", str(tmp_path / "data"))
    assert small_data.main(["asr"]) == 0
    rows = [line.split("\t") for line in (tmp_path / "data/asr/manifest.tsv").read_text().splitlines()]
    assert rows[1][0::2] == ["train", "1.000"] and rows[1][3] == "it's a test"
    held_out = {(split, Path(path).parts[-3]) for split, path, *_ in rows[7:]}
    assert len(rows) == 13 and held_out == {("valid", "21"), ("test", "3"), ("valid", "4")}

    env = {"RUNS": str(tmp_path / "runs"), "SMALL": "1", "GPUS": "0"}
    done = script("prepare.sh", **env)
    assert done.returncode == 0 and "ready: 6 training utterances" in done.stdout, done.stderr
    for _ in range(2):  # the second finds the checkpoint of the first
        done = script("train.sh", "sigma_postln", 1, "--max-update", 2, "--encoder-layers", 1, **env)
        assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"Loaded checkpoint .*@ 2 updates", done.stdout + done.stderr)
    run = tmp_path / "runs" / "librispeech_small" / "sigma_postln-adagrad-step-36-1--max-update_2_--encoder-layers_1"
    done = script("evaluate.sh", run, **env)
    assert done.returncode == 0, done.stderr[-2000:]
    for split, count in (("train", 6), ("valid", 3), ("test", 3)):
        assert re.search(rf"{split}: WER [\d.]+ %, CER [\d.]+ %, {count} utterances, 0 of them unusable", done.stdout)


def test_ones_own_manifest(tmp_path):
    """Its paths are relative to it, or absolute."""
    folder = tmp_path / "data" / "asr"
    folder.mkdir(parents=True)
    (folder / "manifest.tsv").write_text("split\tpath\ttext\ntrain\tone.wav\ta\ntrain\t/else/two.wav\tb\n")
    done = script("prepare.sh", STABLE_DATA=str(tmp_path / "data"), RUNS=str(tmp_path), SMALL="1")
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "librispeech_small" / "manifest.tsv").read_text().splitlines()
    assert written[1:] == [f"train\t{folder}/one.wav\ta", "train\t/else/two.wav\tb"]
