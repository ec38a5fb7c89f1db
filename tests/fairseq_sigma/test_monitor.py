"""--monitor-every: what fairseq-train records, and that it trains as if it did not."""

import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.modules import MultiheadAttention
from fairseq.trainer import Trainer

from fairseq_sigma import export
from fairseq_sigma.attention import QueryKeyAttention
from stable_monitor import AlarmConfig
from stable_monitor import monitor as stable_monitor_monitor
from stable_monitor.records import load, read

from . import conftest
from .conftest import TINY, USER_DIR, call

SIGMA = ("sigma_transformer_6l",)
STOCK = ("transformer", "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 32)
EVERY = "--monitor-every"


def run(train, name, arch, updates, *flags):
    return train(name, arch[0], updates, *arch[1:], *flags)


def steps(folder) -> list[int]:
    """The steps in the file, line by line: `read` would hide one that is there twice."""
    return [json.loads(line)["step"] for line in (folder / "monitor.jsonl").read_text().splitlines()]


def assert_same(a, b):
    for one, other in ((a["model"], b["model"]), [x["extra_state"].get("ema", {}) for x in (a, b)]):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key
    assert a["extra_state"]["val_loss"] == b["extra_state"]["val_loss"]


@pytest.fixture
def logged(caplog):
    """logged() -> what fairseq's log lines say of each update, by name."""
    caplog.set_level(logging.INFO)

    def numbers() -> list[dict[str, float]]:
        lines = [record.getMessage() for record in caplog.records if record.name == "train_inner"]
        return [{key: float(value) for key, value in re.findall(r"(\w+)=(-?[\d.]+)", line)} for line in lines]

    return numbers


@pytest.mark.parametrize("arch", [SIGMA, STOCK])
def test_training_and_validation_are_bitwise_those_without(train, arch, tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "TINY", [flag for flag in TINY if flag != "--disable-validation"])
    flags = ["--dropout", 0.1, "--store-ema", "--validate-interval-updates", 2]
    plain = run(train, "plain", arch, 5, *flags)
    monitored = run(train, "monitored", arch, 5, EVERY, 1, *flags)
    assert plain["extra_state"]["val_loss"] is not None
    assert_same(plain, monitored)
    assert "entropy" not in str(monitored["extra_state"]["metrics"])  # nobody else's log lines shall show old numbers
    assert steps(tmp_path / "monitored") == [0, 1, 2, 2, 3, 4, 4, 5]  # three of them validations
    records, validations = load(tmp_path / "monitored")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in validations] == [2, 4, 5]
    assert validations[-1]["validation"]["loss"] == pytest.approx(monitored["extra_state"]["val_loss"], rel=1e-5)
    assert not (tmp_path / "plain" / "monitor.jsonl").exists()


@pytest.mark.parametrize("flags", [(), ("--checkpoint-activations",)])
def test_every_attention_has_its_name_and_kind(train, flags, tmp_path):
    run(train, "run", STOCK, 1, EVERY, 1, *flags)
    (record,) = read(tmp_path / "run")
    assert {name: layer["kind"] for name, layer in record["layers"].items()} == {
        f"{side}.layers.{i}.{name}": kind
        for i in (0, 1)
        for side, name, kind in (
            ("encoder", "self_attn", "encoder"),
            ("decoder", "self_attn", "decoder"),
            ("decoder", "encoder_attn", "cross"),
        )
    }


def test_a_language_model_with_a_dataclass(corpus, tmp_path):
    text = corpus.parent / "train.en"
    call("preprocess", "--only-source", "--trainpref", text, "--validpref", text, "--destdir", tmp_path / "data")
    flags = "--task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 --cpu --lr 0.01 "
    flags += "--decoder-attention-heads 2 --tokens-per-sample 16 --max-tokens 64 --optimizer adam --disable-validation"
    save = ("--save-dir", tmp_path, "--max-update", 2)
    call("train", tmp_path / "data", "--user-dir", USER_DIR, *flags.split(), *save, EVERY, 1)
    assert {name: layer["kind"] for name, layer in read(tmp_path)[1]["layers"].items()} == {
        "decoder.layers.0.self_attn": "decoder"
    }


@pytest.mark.parametrize("arch", [SIGMA, STOCK])
def test_entropy_is_that_of_the_attention_matrix(train, arch, tmp_path, monkeypatch):
    entropies, forward = [], MultiheadAttention.forward

    @torch.no_grad()
    def dense(self, query, key, value, key_padding_mask=None, attn_mask=None, **kwargs):
        q, k = (p(x).unflatten(-1, (self.num_heads, -1)) for p, x in ((self.q_proj, query), (self.k_proj, key)))
        logits = torch.einsum("qbhd,kbhd->bhqk", q, k) * self.head_dim**-0.5
        pad = torch.zeros(key.shape[1::-1], dtype=torch.bool) if key_padding_mask is None else key_padding_mask.bool()
        logits = logits.masked_fill(pad[:, None, None], -torch.inf) + (0 if attn_mask is None else attn_mask)
        entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).transpose(0, 1)
        entropies.append((entropy[:, ~pad] if query is key else entropy.flatten(1)).mean(dim=1))
        return forward(self, query, key, value, key_padding_mask, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "forward", dense)
    run(train, "run", arch, 1, EVERY, 1, "--update-freq", 2)  # two batches, of which the first is looked at
    (record,) = read(tmp_path / "run")
    assert len(entropies) == 2 * len(record["layers"]) == 12
    for (name, layer), entropy in zip(record["layers"].items(), entropies, strict=False):
        assert layer["entropy"] == pytest.approx(entropy.tolist(), rel=1e-4), name


@pytest.mark.parametrize("attention", ["stable", "l2"])
def test_entropy_of_another_attention_is_that_of_its_own_weights(train, attention, tmp_path, monkeypatch):
    """q and k are then not what the projections give. Queries that are padding are left out."""
    entropies, attend = [], QueryKeyAttention._attend

    @torch.no_grad()
    def dense(self, q, k, v, mask, need_weights):
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scaling + (0 if mask is None else mask)
        entropy = torch.special.entr(torch.exp(logits - logits.logsumexp(-1, keepdim=True))).sum(-1).transpose(0, 1)
        padded = self.self_attention and mask is not None and mask.ndim == 4
        entropies.append(
            (entropy[:, mask[:, 0, -1] == 0] if padded else entropy.flatten(1)).mean(1)
        )  # the last row sees all
        return attend(self, q, k, v, mask, need_weights)

    monkeypatch.setattr(QueryKeyAttention, "_attend", dense)
    run(train, "run", SIGMA, 1, EVERY, 1, "--attention", attention)
    (record,) = read(tmp_path / "run")
    assert len(entropies) == len(record["layers"]) == 6
    for (name, layer), entropy in zip(record["layers"].items(), entropies, strict=True):
        assert layer["entropy"] == pytest.approx(entropy.tolist(), rel=1e-4), name


@pytest.mark.parametrize("flags, rel", [((), 1e-6), (("--bf16",), 2e-2), (("--fp16",), 2e-2), (("--amp",), 1e-6)])
def test_records_are_what_fairseq_logs(train, flags, rel, tmp_path, logged):
    schedule = ("--lr-scheduler", "inverse_sqrt", "--warmup-updates", 10)
    clip = ("--clip-norm", 0.1, "--update-freq", 2)  # the gradient before it is clipped, and of all batches
    run(train, "run", SIGMA, 6, EVERY, 2, "--log-format", "simple", *schedule, *clip, *flags)
    lines, records = logged(), read(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 2, 4] and len(lines) == 6
    for record in records:
        line = lines[record["step"]]
        assert record["loss"] == line["loss"]
        assert record["lr"] == pytest.approx(0.001 * record["step"], rel=1e-4)  # the one this update was made with
        assert record["grad_l2"] == pytest.approx(line["gnorm"], rel=rel, abs=5e-4)
        means = [sum(layer["entropy"]) / 2 for layer in record["layers"].values()]
        largest = max(max(layer["max_logit"]) for layer in record["layers"].values())
        shown = {"entropy": sum(means) / len(means), "entropy_min": min(means), "logit_max": largest}
        for later in (line, lines[record["step"] + 1]):  # until there is a newer record
            assert {name: later[name] for name in shown} == pytest.approx(shown, abs=6e-4)


def test_skipped_updates_do_not_count(train, tmp_path, monkeypatch, logged):
    calls, clip_grad_norm = [], Trainer.clip_grad_norm

    def overflow_at_times(self, clip_norm):
        calls.append(clip_norm)
        if len(calls) in (1, 3):
            raise OverflowError("as --fp16 on a GPU does")
        return clip_grad_norm(self, clip_norm)

    monkeypatch.setattr(Trainer, "clip_grad_norm", overflow_at_times)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # fairseq's handling of it asks for a GPU
    run(train, "run", SIGMA, 3, EVERY, 1)
    records = read(tmp_path / "run")
    assert len(calls) == 5 and steps(tmp_path / "run") == [0, 1, 2]
    assert [record["loss"] for record in records] == [line["loss"] for line in logged()]
    assert [record["grad_l2"] for record in records] == pytest.approx([line["gnorm"] for line in logged()], abs=5e-4)


def test_runs_with_and_without_go_on_from_each_other(train, tmp_path):
    one_epoch = ("--batch-size", 4)  # fairseq makes other batches in a run that is resumed in a later one
    straight = run(train, "straight", SIGMA, 9, *one_epoch)
    for updates, flags in ((3, [EVERY, 2]), (5, []), (7, [EVERY, 2]), (9, [EVERY, 2])):
        last = run(train, "run", SIGMA, updates, *one_epoch, *flags)
    assert_same(straight, last)
    assert steps(tmp_path / "run") == [0, 2, 6, 8]


def test_checkpoints_load_and_export(train, tmp_path):
    for name, arch in (("sigma", SIGMA), ("stock", STOCK)):
        run(train, name, arch, 1, EVERY, 1, "--monitor-alarm", "stop")
    paths = [str(tmp_path / x) for x in ("sigma/checkpoint_last.pt", "stock/checkpoint_last.pt", "exported.pt")]
    assert export.main([paths[0], paths[2]]) == 0
    for path in paths:
        (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([path])
        assert cfg.common.monitor_every == 1 and cfg.common.monitor_alarm == "stop"
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("alarm, updates", [("warn", 12), ("stop", 3)])
def test_alarm(train, alarm, updates, tmp_path, monkeypatch, caplog):

    class Sensitive(AlarmConfig):
        def __init__(self) -> None:
            super().__init__(fraction=0.99)  # nearly any fall will do

    monkeypatch.setattr(stable_monitor_monitor, "AlarmConfig", Sensitive)
    caplog.set_level(logging.INFO)
    last = run(train, "run", STOCK, 12, EVERY, 2, "--monitor-alarm", alarm, "--lr", 0.3)
    warnings = [record for record in caplog.records if record.name == "stable_monitor"]
    assert "update 2: entropy collapse in " in warnings[0].getMessage()
    assert last["optimizer_history"][-1]["num_updates"] == updates
    assert ("--monitor-alarm stop: entropy collapse" in caplog.text) == (alarm == "stop")


@pytest.mark.slow  # tests/stable_monitor/test_file.py and test_ranks.py have the processes, test_alarm the stopping
def test_two_processes_write_one_file_and_stop_together(train, corpus, tmp_path):
    run(train, "run", STOCK, 3, EVERY, 2)
    command = [sys.executable, "-m", "fairseq_cli.train", corpus, "--user-dir", USER_DIR, "--arch", *STOCK, *TINY]
    command += ["--batch-size", 8, "--max-update", 40, "--save-dir", tmp_path / "run", "--no-epoch-checkpoints"]
    command += ["--distributed-world-size", 2, EVERY, 2, "--monitor-alarm", "stop", "--reset-lr-scheduler", "--lr", 3]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    # Only the process with the file knows what was before: left to itself, the other would go on, and wait for ever.
    assert steps(tmp_path / "run") == [0, 2, 4]
    assert done.stdout.count("--monitor-alarm stop: entropy collapse") == 1
    assert torch.load(tmp_path / "run" / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 5
    gnorms = [float(gnorm) for gnorm in re.findall(r"\| train_inner \|.* gnorm=([\d.]+)", done.stdout)]
    assert read(tmp_path / "run")[-1]["grad_l2"] == pytest.approx(gnorms[-1], abs=5e-4)


@pytest.mark.parametrize("value", ["-1", "ten", "2.5"])
def test_a_bad_value_is_refused_in_one_line(train, value, capsys):
    with pytest.raises(SystemExit):
        run(train, "run", SIGMA, 1, EVERY, value)
    error = f"error: argument --monitor-every: '{value}': allowed are whole numbers from 0, which is off"
    assert capsys.readouterr().err.splitlines()[-1].endswith(error)


def test_an_alarm_without_records_is_refused(train):
    with pytest.raises(ValueError, match="--monitor-alarm rescue: it needs --monitor-every N"):
        run(train, "run", STOCK, 1, "--monitor-alarm", "rescue")


def test_help(capsys):
    with pytest.raises(SystemExit):
        call("train", "--user-dir", USER_DIR, "--help")
    assert "--monitor-every N" in capsys.readouterr().out
