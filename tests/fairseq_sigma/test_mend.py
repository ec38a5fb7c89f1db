"""Each mend, seen from fairseq's own commands: they load the user dir and nothing else helps them."""

import ast
import importlib.util
import inspect
import io
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, TokenBlockDataset, data_utils

from tests.warm import PYTHON

USER_DIR = Path(__file__).parents[2] / "plugins" / "fairseq_sigma"
TRAIN = (
    "--arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --dropout 0 --optimizer adam --lr 0.01 --criterion label_smoothed_cross_entropy "
    "--batch-size 16 --num-workers 0 --eval-bleu --eval-bleu-detok space --eval-bleu-args {} --no-epoch-checkpoints "
    "--no-progress-bar --cpu"
).split()
TEST_SENTENCES = 43  # not a multiple of 8


def start(command, *arguments, python=PYTHON):
    return subprocess.Popen(
        [python, "-m", f"fairseq_cli.{command}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, succeeds=True):
    output, _ = process.communicate(timeout=300)
    assert (process.returncode == 0) == succeeds, output
    return output


def fairseq(command, *arguments, succeeds=True, python=PYTHON):
    return finish(start(command, *arguments, python=python), succeeds)


def train(data, save_dir, *arguments):
    return ["train", data, "--user-dir", USER_DIR, *TRAIN, "--save-dir", save_dir, *arguments]


def checkpoint(save_dir):
    return torch.load(save_dir / "checkpoint_last.pt", map_location="cpu")


def assert_same_training(save_dir, other_dir):
    ours, theirs = checkpoint(save_dir), checkpoint(other_dir)
    assert ours["optimizer_history"][-1]["num_updates"] == theirs["optimizer_history"][-1]["num_updates"]
    for name, weight in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def mend():
    """The file under test, without the rest of the plugin; this process may then read checkpoints and build datasets."""
    spec = importlib.util.spec_from_file_location("mend_under_test", USER_DIR / "mend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.allow_checkpoint_classes()
    module.names_that_numpy_dropped()
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A language and its reverse: 4 batches of 16 to train on."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for split, sentences in {"train": 64, "valid": 8, "test": TEST_SENTENCES}.items():
        lines = [draw.choices("abcdefghij", k=draw.randint(2, 8)) for _ in range(sentences)]
        (folder / f"{split}.de").write_text("".join(" ".join(line) + "\n" for line in lines))
        (folder / f"{split}.en").write_text("".join(" ".join(reversed(line)) + "\n" for line in lines))
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    fairseq("preprocess", "-s", "de", "-t", "en", *prefixes, "--destdir", folder / "bin")
    return folder / "bin"


@pytest.fixture(scope="module")
def trained(mend, data, tmp_path_factory):
    """One process, two batches an update, two updates: one epoch. Two processes must do the same."""
    save_dir = tmp_path_factory.mktemp("trained")
    fairseq(*train(data, save_dir, "--update-freq", 2, "--max-update", 2))
    return save_dir


@pytest.fixture(scope="module")
def resumed(data, trained, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("resumed")
    shutil.copy(trained / "checkpoint_last.pt", save_dir)
    output = fairseq(*train(data, save_dir, "--update-freq", 2, "--max-update", 4))
    assert "(epoch 2 @ 2 updates)" in output, output
    return save_dir


@pytest.fixture(scope="module")
def generated(data, trained):
    path = trained / "checkpoint_last.pt"
    return fairseq(
        "generate", data, "--user-dir", USER_DIR, "--path", path, "--cpu", "--beam", 1, "--max-len-b", 9, "--sacrebleu"
    )


def test_help_shows_the_flags_of_what_is_named():
    named = "--arch sigma_transformer_18l --task language_modeling --optimizer adam --criterion cross_entropy".split()
    output = fairseq("train", "--help", "--user-dir", USER_DIR, *named)
    arch, task, optimizer = "--reparam", "--sample-break-mode", "--adam-betas"
    assert all(f"\n  {flag}" in output for flag in (arch, "--encoder-layers", task, optimizer)), output
    assert "--kernel-size" not in fairseq("train", "--user-dir", USER_DIR, *named, "-h")  # a flag of other models


def test_help_without_an_arch_is_what_fairseq_has():
    ours, theirs = [
        set(re.findall("^  (?:-., )?(--[a-z0-9-]+)", fairseq("train", *given, "--help"), re.MULTILINE))
        for given in (["--user-dir", USER_DIR], [])
    ]
    assert "--max-tokens" in theirs and theirs < ours
    assert "--source-lang" in fairseq(
        "generate", "--user-dir", USER_DIR, "--help"
    )  # the task's: a command without arch


def test_resume_reads_the_checkpoint(resumed):
    # --eval-bleu left arrays of numpy among its meters.
    assert checkpoint(resumed)["optimizer_history"][-1]["num_updates"] == 4


@pytest.mark.parametrize("held", [np.float64(0.5), np.float32(0.5), np.arange(4), Dictionary()], ids=type)
def test_what_other_tasks_save_can_be_read(mend, held):
    buffer = io.BytesIO()
    torch.save({"extra_state": held}, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer)["extra_state"]) is type(held)


def test_any_other_class_is_still_refused(mend):
    buffer = io.BytesIO()
    torch.save(Path("anything"), buffer)
    buffer.seek(0)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(buffer)


def test_generate_translates_every_sentence(generated):
    translations = [line for line in generated.splitlines() if line.startswith("H-")]
    assert len(translations) == TEST_SENTENCES, generated


def test_sacrebleu_flag_scores_with_sacrebleu(generated):
    assert "beam=1: BLEU = " in generated and "BLEU4" not in generated


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("with_sizes", [True, False], ids=["sizes", "function"])
def test_every_index_is_in_one_batch(mend, monkeypatch, multiple, with_sizes):
    monkeypatch.setattr(data_utils, "batch_by_size", data_utils.batch_by_size)  # restored afterwards
    mend.keep_every_sample()
    draw = np.random.default_rng(0)
    for samples in range(70):
        for max_tokens, max_sentences in [(None, None), (None, 5), (None, 16), (40, None), (100, 16)]:
            sizes = np.sort(draw.integers(1, 30, samples))
            order = draw.permutation(samples) if samples % 2 else range(samples)
            batches = data_utils.batch_by_size(
                order,
                sizes.__getitem__,
                num_tokens_vec=sizes[list(order)] if with_sizes else None,
                max_tokens=max_tokens,
                max_sentences=max_sentences,
                required_batch_size_multiple=multiple,
            )
            assert [index for batch in batches for index in batch] == list(order)
            for batch in batches:
                assert 0 < len(batch) <= (max_sentences or samples)
                assert len(batch) * max(sizes[batch]) <= (max_tokens or np.inf)
                assert len(batch) < multiple or len(batch) % multiple == 0


def test_fairseq_asks_numpy_for_nothing_that_it_does_not_have(mend):
    """In all that importing fairseq loads."""
    missing = []
    for name, module in list(sys.modules.items()):
        if not (name.startswith("fairseq.") and hasattr(module, "np") and module.__file__.endswith(".py")):
            continue
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "np"
                and not hasattr(module.np, node.attr)
            ):
                missing.append(f"{name}:{node.lineno}: np.{node.attr}")
    assert "fairseq.data.token_block_dataset" in sys.modules and not missing


def test_numpy_itself_stays_as_it_is(mend):
    assert not hasattr(np, "compat") and not hasattr(np, "int")


def test_buckets_are_the_percentiles_rounded_down(mend):
    sizes = np.random.default_rng(0).integers(3, 40, 57)
    expected = {sorted(sizes)[math.floor(part / 5 * 56)] for part in range(1, 6)}
    assert set(data_utils.get_buckets(sizes, 5)) == expected


@pytest.mark.parametrize("mode", ["none", "eos", "complete", "complete_doc"])
def test_text_is_cut_into_blocks_as_the_break_mode_says(mend, mode):
    draw = random.Random(0)
    lines = [[draw.randint(4, 9) for _ in range(draw.randint(0, 5))] + [2] for _ in range(40)]
    blocks = TokenBlockDataset([torch.tensor(line) for line in lines], list(map(len, lines)), 12, 1, 2, mode)
    if mode == "eos":
        expected = lines
    elif mode == "none":
        stream = [word for line in lines for word in line]
        expected = [stream[start : start + 12] for start in range(0, len(stream), 12)]
    else:  # whole lines, as many as there is room for
        expected = [[]]
        for line in lines:
            ends = mode == "complete_doc" and line == [2]  # an empty line is between documents, and in no block
            if len(expected[-1]) + len(line) > 12 or ends:
                expected.append([])
            expected[-1] += [] if ends else line
        expected = [block for block in expected if len(block) > (mode == "complete_doc")]
    assert [block.tolist() for block in blocks] == expected


def test_what_would_train_nothing_is_refused(data, tmp_path):
    output = fairseq(*train(data, tmp_path, "--write-checkpoints-asynchronously"), succeeds=False)
    assert output.splitlines()[-1].endswith("--write-checkpoints-asynchronously: needs iopath (pip install iopath)")


def test_two_cpu_processes_train_as_one(data, trained, tmp_path):
    # Nothing but the number of processes: a meeting point, gloo and --ddp-backend pytorch_ddp come by default.
    fairseq(*train(data, tmp_path, "--max-update", 2, "--distributed-world-size", 2))
    assert_same_training(tmp_path, trained)


@pytest.mark.slow  # two processes that train and validate end as well
def test_cpu_processes_run_what_is_registered_for_their_exit_and_do_not_finalize(data, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text(f"""
import atexit, sys
sys.path.insert(0, {str(USER_DIR.parent)!r})
import fairseq_sigma

class Last:
    def __del__(self, write=sys.__stdout__.write):
        write("finalized")

last = Last()
atexit.register(print, "closed")
""")
    arguments = train(data, tmp_path, "--max-update", 1, "--distributed-world-size", 2)
    arguments[arguments.index(USER_DIR)] = tmp_path / "own"
    output = fairseq(*arguments, python=sys.executable)
    assert output.count("closed") == 1 + 2 and output.count("finalized") == 1


@pytest.mark.slow  # two processes that fairseq starts itself do the same
def test_two_ranks_started_by_hand_resume_as_one(data, trained, resumed, tmp_path):
    # Rank 0 reads the checkpoint and broadcasts it.
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    method = "--distributed-init-method", f"file://{tmp_path}/rendezvous"
    flags = ["--distributed-no-spawn", "--distributed-backend", "gloo", *method]
    flags += ["--distributed-world-size", 2, "--ddp-backend", "legacy_ddp"]
    arguments = train(data, tmp_path, "--max-update", 4, *flags)
    for process in [start(*arguments, "--distributed-rank", rank) for rank in (0, 1)]:
        finish(process)
    assert_same_training(tmp_path, resumed)


def test_a_rank_by_hand_without_no_spawn_is_told_the_flags(data, tmp_path):
    arguments = train(data, tmp_path, "--max-update", 2, "--distributed-world-size", 2, "--distributed-rank", 1)
    output = fairseq(*arguments, succeeds=False)
    assert "--distributed-no-spawn --distributed-rank R" in output.splitlines()[-1]


def test_two_cpu_processes_validate_every_sentence(data, trained):
    path = trained / "checkpoint_last.pt"
    flags = ["--path", path, "--cpu", "--batch-size", 16, "--valid-subset", "test", "--distributed-world-size", 2]
    output = fairseq("validate", data, "--user-dir", USER_DIR, "--task", "translation", *flags)
    assert f"bsz {TEST_SENTENCES}" in output, output


def test_a_log_file_has_each_line_once(data, tmp_path):
    path = tmp_path / "train.log"
    output = fairseq(
        *train(data, tmp_path, "--max-epoch", 3, "--log-interval", 1, "--log-format", "json", "--log-file", path)
    )
    logged, printed = (
        [line for line in text.splitlines() if '"num_updates"' in line] for text in (path.read_text(), output)
    )
    assert len(logged) == len(printed) == 3 * 4  # printed with the time before it


@pytest.mark.parametrize(
    "flag, dtype", [("--bf16", torch.bfloat16), pytest.param("--fp16", torch.float16, marks=pytest.mark.slow)]
)
def test_low_precision_trains_on_cpu(mend, data, tmp_path, flag, dtype):
    fairseq(*train(data, tmp_path, "--max-update", 2, flag))
    saved = checkpoint(tmp_path)
    assert saved["optimizer_history"][-1]["num_updates"] == 2
    # fairseq saves in fp32 what it trained in low precision.
    for name, weight in saved["model"].items():
        assert torch.equal(weight, weight.to(dtype).float()), name


def test_mends_are_applied_once(mend, monkeypatch):
    from fairseq import options
    from fairseq.distributed import utils as distributed_utils
    from fairseq.logging import progress_bar
    from fairseq.models import distributed_fairseq_model
    from fairseq.optim import FP16Optimizer

    replaced = [
        (data_utils, "batch_by_size"),
        (distributed_utils, "call_main"),
        (distributed_utils, "all_gather_list"),
        (distributed_fairseq_model, "DistributedDataParallel"),
        (options, "parse_args_and_arch"),
        (FP16Optimizer, "build_optimizer"),
        (progress_bar, "progress_bar"),
    ]
    for owner, name in replaced:
        monkeypatch.setattr(owner, name, vars(owner)[name])  # restored afterwards
    mend.apply()
    once = [vars(owner)[name] for owner, name in replaced]
    mend.apply()
    assert [vars(owner)[name] for owner, name in replaced] == once
