"""The verdict of a run: on committed runs, on small real ones, and at the edges of the rules."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stable_monitor import Monitor, Rescue, report
from stable_monitor.diagnose import diagnose, main
from stable_monitor.records import RecordFile, load
from stable_monitor.remedies import ROWS, STACKS
from stable_monitor.verdicts import WORDS, Verdict, examine

ROOT = Path(__file__).parents[2]
RESCUE = ROOT / "recipes" / "rescue" / "results"
KEYS = 100


def record(step: int, loss: float | None = 2.0, entropy: float | None = 0.8, logit: float = 5.0, **more) -> dict:
    """Of a model with one layer; entropy is that of its head as a part of log(KEYS)."""
    nats = None if entropy is None else entropy * math.log(KEYS)
    layer = {"kind": "encoder", "keys": KEYS, "entropy": [nats], "max_logit": [logit]}
    return {"step": step, "loss": loss, "grad_l2": 1.0, "layers": {"a": layer}, "alarms": [], **more}


def verdict_of(*runs: tuple) -> tuple[str, int | None]:
    """Of records with (loss, entropy, logit)."""
    found = examine(record(step, *numbers) for step, numbers in enumerate(runs))
    return found.verdict, found.step


def committed(name: str) -> list[tuple[dict, str]]:
    """(line, verdict) of each line of a log."""
    found = []
    for line in map(json.loads, (RESCUE / name).read_text().splitlines()):
        steps, logits = line.get("steps", range(len(line["loss"]))), line.get("logit", [0.0] * len(line["loss"]))
        records = (record(*numbers) for numbers in zip(steps, line["loss"], line["entropy"], logits, strict=True))
        found.append((line, examine(records).verdict))
    return found


@pytest.mark.parametrize("stack", ["gpt", "gpt2", "vit", "vit_early", "translation"])
def test_committed_runs_that_collapsed_and_went_on(stack):
    found = [verdict for line, verdict in committed(f"{stack}.jsonl") if line["remedy"] == "go_on"]
    assert found == ["collapse"] * 3


def test_committed_runs_that_blew_up_and_healthy_ones():
    assert [verdict for _, verdict in committed("blow_up.jsonl")] == ["blowup"] * 3
    assert [verdict for _, verdict in committed("gpt_healthy.jsonl")] == ["healthy"] * 6


def test_committed_runs_that_were_rescued():
    assert [verdict for line, verdict in committed("gpt2.jsonl") if line["remedy"] == "rescue"] == ["healthy"] * 3


def test_what_comes_first_is_the_cause():
    healthy, collapsed, nan = (2.0, 0.8, 5.0), (2.0, 0.05, 200.0), (None, None, 0.0)
    assert verdict_of(healthy, healthy, healthy) == ("healthy", None)
    assert verdict_of(healthy, collapsed, collapsed) == ("collapse", 1)
    assert verdict_of(healthy, collapsed, nan) == ("collapse", 1)
    assert verdict_of(healthy, healthy, nan) == ("nan", 2)
    assert verdict_of(healthy, (4.1, 0.8, 5.0), (9.0, 0.8, 5.0), collapsed) == ("blowup", 1)
    assert verdict_of(healthy, (4.1, 0.8, 5.0), nan) == ("blowup", 1)
    assert verdict_of(healthy, (40.0, 0.05, 900.0), collapsed) == ("blowup", 1)  # both within a record
    assert verdict_of(healthy, collapsed, (40.0, 0.05, 900.0)) == ("collapse", 1)


def test_a_loss_that_turns():
    learns = [(4.0 - x / 2, 0.9, 5.0) for x in range(6)]
    assert verdict_of(*learns, *[(3.4, 0.9, 5.0)] * 5) == ("blowup", 5)
    assert verdict_of(*learns, *[(3.4, 0.2, 30.0)] * 5) == ("collapse", 6)  # as 100L-100L DeepNorm, in recipes/evidence
    assert verdict_of(*learns, *[(1.7, 0.2, 30.0)] * 5) == ("healthy", None)
    assert verdict_of(*learns, (3.4, 0.9, 5.0)) == ("healthy", None)  # one record is noise


def test_what_comes_back_is_healthy():
    healthy, collapsed = (1.0, 0.8, 5.0), (2.0, 0.05, 200.0)
    assert verdict_of(healthy, collapsed, collapsed, healthy) == ("healthy", None)
    assert verdict_of((2.0, 0.8, 5.0), (4.5, 0.8, 5.0), *[healthy] * 5) == ("healthy", None)  # the first step of Adam
    assert verdict_of((2.0, 0.8, 5.0), (4.5, 0.8, 5.0), (4.6, 0.8, 5.0), *[healthy] * 5) == ("healthy", None)
    assert verdict_of(healthy, (None, 0.8, 5.0), healthy) == ("healthy", None)
    assert verdict_of(healthy, (1.0, 0.05, 20.0), (0.5, 0.05, 20.0)) == ("healthy", None)  # sharp, at small logits


def test_fp16_may_skip_a_step():
    overflow = {"grad_l2": None}
    assert examine([record(0), record(1), record(2, **overflow)]).verdict == "healthy"
    steps = [record(0), *(record(step, **overflow) for step in (1, 2, 3))]
    assert examine(steps) == Verdict("nan", 1, "", "the gradient is not a number")
    assert examine(record(step, **overflow) for step in range(9)).verdict == "healthy"  # never recorded, as under FSDP1


class Deep(nn.Module):
    """Post-LN or pre-LN encoder that predicts the next token."""

    def __init__(self, depth: int, norm_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (
            nn.TransformerEncoderLayer(16, 2, 64, 0.0, batch_first=True, norm_first=norm_first) for _ in range(depth)
        )
        self.embedding, self.layers, self.head = nn.Embedding(16, 16), nn.ModuleList(layers), nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def trained(model: nn.Module, run: Path, lr: float, optimizer=torch.optim.SGD, steps: int = 12, hurt: int = -1, **more):
    """The verdict of a run in a loop."""
    optimizer = optimizer(model.parameters(), lr)
    monitor = Monitor(model, 1, path=run, optimizer=optimizer, **more)
    for step in range(steps):
        tokens = torch.randint(16, (4, 12), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        if step == hurt:
            loss = loss * math.nan
        loss.backward()
        optimizer.step()
        monitor.step(loss)
        optimizer.zero_grad()
    found = examine(load(run)[0])
    assert monitor.last["verdict"] == found.verdict
    return found


def test_real_runs(tmp_path, caplog):
    assert trained(Deep(2, True), tmp_path / "healthy", 0.05).verdict == "healthy"
    assert trained(Deep(18, False), tmp_path / "vanishing", 0.01, torch.optim.Adam).verdict == "vanishing"
    assert trained(Deep(18, True), tmp_path / "deep", 0.01, torch.optim.Adam).verdict == "healthy"
    assert trained(Deep(2, True), tmp_path / "nan", 0.05, hurt=6) == Verdict("nan", 6, "", "the loss is not a number")
    assert trained(nn.Sequential(nn.Embedding(16, 16)), tmp_path / "unseen", 0.05).verdict == "unseen"
    said = [line.message for line in caplog.records if "try: " in line.message]
    for words in ("vanishing gradients from", "not a number from update 6", "nothing seen"):
        assert sum(words in line for line in said) == 1, words


def test_a_blow_up_is_not_rescued(tmp_path, caplog):
    model = Deep(2, True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    monitor = Monitor(model, 1, optimizer=optimizer, on_alarm=Rescue(model, optimizer, lambda: None))
    for step, numbers in enumerate([(2.0, 0.9), (5.0, 0.9), (9.0, 0.9), (30.0, 0.01)]):
        monitor._raise(monitor._publish(record(step, *numbers, 500.0)))
    assert monitor.last is None and "entropy falls after the loss blew up in a" in caplog.text
    assert "is not rescued, as the loss blew up before: lower the learning rate" in caplog.text
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_command_says_it_to_people_and_to_scripts(tmp_path, capsys):
    runs = {"good": [(2.0, 0.8, 5.0)] * 3, "bad": [(2.0, 0.8, 5.0), (2.0, 0.01, 500.0)]}
    for name, lines in runs.items():
        file = RecordFile(tmp_path / name)
        file.prepare()
        for step, numbers in enumerate(lines):
            file.append(record(step, *numbers, stack="fairseq"))
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    assert main([good]) == 0
    assert main([good, bad]) == 3
    said = capsys.readouterr().out
    assert f"{bad}: entropy collapse in a from update 1: entropy 0.01 of log(keys), largest logit 500" in said
    assert "--monitor-alarm rescue" in said
    assert main([bad, "--json"]) == 3
    line = json.loads(capsys.readouterr().out)
    assert line["verdict"] == "collapse" and line["step"] == 1 and line["layer"] == "a"
    assert report.main([good, bad, "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "1 of 2 runs healthy" in page and "<strong>bad</strong>: entropy collapse in a from update 1" in page
    assert "<code>--monitor-every 10 --monitor-alarm rescue" in page
    assert main([str(tmp_path / "none"), good]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1 and f"; below it: {bad} {good}" in capsys.readouterr().err


def test_each_verdict_has_its_row_and_each_stack_its_remedy():
    headings = {
        line.lstrip("# ").lower().replace(" ", "-")
        for line in (ROOT / "docs" / "my_run_diverges.md").read_text().splitlines()
        if line.startswith("#")
    }
    assert set(ROWS.values()) <= headings
    assert set(ROWS) == set(WORDS) - {"healthy"}
    assert all(set(remedies) == set(ROWS) - {"unseen"} for remedies in STACKS.values())


def test_a_loss_that_was_not_given_is_no_nan():
    healthy = [record(step, nonfinite=[]) for step in range(4)]
    assert examine([*healthy, record(4, loss=None, nonfinite=[])]).verdict == "healthy"
    assert examine([*healthy, record(4, loss=None, nonfinite=["loss"])]).verdict == "nan"
    assert examine([record(0, loss=None, nonfinite=["loss"])]).verdict == "nan"  # from the first record on
    assert examine([*healthy, *(record(step, grad_l2=None, nonfinite=[]) for step in (4, 5, 6))]).verdict == "healthy"


def test_what_a_layer_does_not_say():
    def without(*keys: str):
        made = record(0, entropy=0.01)
        for key in keys:
            del made["layers"]["a"][key]
        return examine([made]).verdict

    assert without("max_logit") == "collapse"
    assert without("keys") == "unseen"


def test_a_healthy_run_says_what_had_collapsed():
    lines = [(2.0, 0.9, 5.0), (2.0, 0.01, 500.0), (1.0, 0.9, 5.0)]
    found = examine(record(step, *numbers) for step, numbers in enumerate(lines))
    assert found.verdict == "healthy" and "1 layer had collapsed, the first at update 1, and came back" in found.why


def test_a_healthy_run_says_that_it_had_blown_up():
    losses = (4.5, 33.0, 21.0, 8.0, 3.5, 3.4, 3.3, 3.3, 3.2)
    found = examine(record(step, loss, 0.9, 5.0) for step, loss in enumerate(losses))
    assert found.verdict == "healthy" and "the loss blew up from 4.5 to 33 at update 1, and came back" in found.why


def test_records_that_begin_late_say_so():
    early = [record(step, entropy=0.9) for step in (0, 10, 20)]
    assert "not known" not in examine(early).why and "not known" not in examine(early[1:]).why  # nanoGPT's begin so
    assert (
        "the records begin at update 20, and what was before is not known"
        in examine([*early[2:], record(30, entropy=0.9)]).why
    )


RESCUED = {"layer": "a", "entropy": [0.1, 0.2], "uniform": 4.6, "queries": [9.0, 3.0], "keys": [9.0, 3.0]}


def test_a_run_that_was_rescued_is_not_told_to_rescue(tmp_path):
    lines = [record(0, entropy=0.9), record(1, entropy=0.01, logit=500.0, rescues=[RESCUED])]
    (tmp_path / "monitor.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdict, (what, _) = diagnose(tmp_path)
    assert verdict.verdict == "collapse" and verdict.why.endswith("; 1 rescue") and "Rescue(" not in what
    assert what == "anew: sigma_reparam(model); or half the learning rate"
    assert report.main([str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert "anew: sigma_reparam(model); or half" in (tmp_path / "page.html").read_text()
