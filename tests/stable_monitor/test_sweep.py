"""Learning-rate sensitivity by hand and from the paper's definition; a sweep that is killed, continued and collected."""

import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from stable_monitor import learning_rate_sensitivity, sweep
from stable_monitor.outcomes import Outcome, summarise, table
from stable_monitor.records import RecordFile

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
GPT2 = (2.429, 2.299, 2.251, 2.613, 2.787, 2.970, 2.971)

# A "training" whose loss is lr off 0.01, in decades; it dies at rates above 1 and notes how often it was started.
SCRIPT = """
import math, sys, time
lr, seed, out, *flags = sys.argv[1:]
with open("started.txt", "a") as file:
    file.write(f"{lr} {seed} {' '.join(flags)}\\n")
time.sleep(float(flags[0]) if flags else 0)
print("loss 4.0")
if float(lr) > 1:
    sys.exit("not a number")
print(f"loss {2 + abs(math.log10(float(lr) / 0.01)) + 0.1 * float(seed)}")
"""
LOSS = ["--loss", r"loss (\S+)"]


def command(tmp_path, monkeypatch) -> list[str]:
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return ["--", sys.executable, "train.py", "{lr}", "{seed}", "{out}", "{variant}"]


def started(tmp_path) -> list[str]:
    return sorted((tmp_path / "started.txt").read_text().splitlines())


def test_the_measure_by_hand():
    final = dict(zip(RATES, GPT2, strict=True))
    assert learning_rate_sensitivity(final, 4.17) == pytest.approx(0.366, abs=5e-4)
    assert learning_rate_sensitivity({1e-3: 2.0, 1e-2: math.nan, 1e-1: 9.0, 1.0: math.inf}, 5.0) == pytest.approx(2.25)
    assert learning_rate_sensitivity({1e-3: 2.0, 1e-2: 2.0}, 5.0) == 0
    for final, initial, error in (
        ({1e-3: 2.0}, 5.0, "two learning rates"),
        ({1e-3: 2, 1e-2: 2}, math.nan, "initial = nan"),
    ):
        with pytest.raises(ValueError, match=error):
            learning_rate_sensitivity(final, initial)


def test_a_seed_without_all_rates_has_no_sensitivity_and_the_best_mean_is_bold():
    outcomes = [Outcome("a", lr, 1, 5.0, loss) for lr, loss in ((1e-3, 3.0), (1e-2, 2.0), (1e-1, math.nan))]
    outcomes.append(Outcome("a", 1e-2, 2, 5.0, 2.4))
    (row,) = summarise(outcomes)
    assert row.best == {1: 2.0, 2: 2.4} and row.sensitivity == {1: pytest.approx(4 / 3)}
    assert table([row]).splitlines()[-1] == "| a | 3.000 | **2.200** | 5.000* | 2.000 / 2.400 | 1.333 |"


def test_runs_that_are_there_stay_and_a_diverged_one_counts_as_the_first_loss(tmp_path, monkeypatch, capsys):
    arguments = ["--out", "swept", "--seed", "1", "2", *LOSS]
    end = command(tmp_path, monkeypatch)
    assert sweep.main([*arguments, "--lr", "0.01", "0.1", *end]) == 0
    assert sweep.main([*arguments, "--lr", "0.01", "0.1", "10", "--jobs", "2", *end]) == 0
    assert len(started(tmp_path)) == 6
    said = capsys.readouterr().out
    assert "plain at 10, seed 2: ended with status 1" in said
    row = (tmp_path / "swept/table.md").read_text().splitlines()[-1]
    assert row == "| plain | **2.150** | 3.150 | 4.000* | 2.100 / 2.200 | 0.967 / 0.933 |"
    assert (tmp_path / "swept/sensitivity.png").read_bytes().startswith(b"\x89PNG")
    died = [json.loads(line) for line in (tmp_path / "swept/outcomes.jsonl").read_text().splitlines()]
    assert [line["final"] for line in died if line["lr"] == 10] == [None, None]


PRINTS = """
import os, signal, sys
rate, mode = sys.argv[1:3]
print("loss 4.0,")
if mode == "killed" and float(rate) > 0.05 and not os.path.exists("room"):
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "broken":
    sys.exit("OSError: disk full")
if mode != "single":
    print({"far": "loss 1.23e+06!", "inf": "loss inf", "words": "loss bad", "comma": "loss 1,234.5"}.get(mode, "loss 3"))
"""


def prints(tmp_path, monkeypatch, mode: str, *options: str) -> int:
    (tmp_path / "prints.py").write_text(PRINTS)
    monkeypatch.chdir(tmp_path)
    rates = ["--lr", "0.01", "0.1", "--seed", "1"]
    return sweep.main(["--out", mode, *rates, *LOSS, *options, "--", sys.executable, "prints.py", "{lr}", mode])


@pytest.mark.parametrize(("mode", "final"), [("far", 1.23e6), ("inf", math.inf), ("well", 3.0)])
@pytest.mark.parametrize("pattern", [r"loss (\S+)", r"loss ([0-9.]+|nan|inf)", "loss(.*)"])
def test_a_loss_is_read_whole(tmp_path, monkeypatch, mode, final, pattern):
    assert prints(tmp_path, monkeypatch, mode, "--loss", pattern) == 0
    lines = [json.loads(line) for line in (tmp_path / mode / "outcomes.jsonl").read_text().splitlines()]
    assert [(line["initial"], line["final"]) for line in lines] == [(4.0, final)] * 2


def test_a_variant_whose_runs_all_end_in_an_error_has_not_diverged(tmp_path, monkeypatch, capsys):
    assert prints(tmp_path, monkeypatch, "broken") == 1
    assert "plain: every run ended in an error" in (said := capsys.readouterr().err) and "OSError: disk full" in said
    assert (tmp_path / "broken/table.md").exists()


def test_a_run_that_was_killed_is_missing(tmp_path, monkeypatch, capsys):
    assert prints(tmp_path, monkeypatch, "killed") == 1
    said = capsys.readouterr()
    assert "killed/plain-0.1-1 was killed" in said.out and "the same command tries them again" in said.err
    (tmp_path / "room").touch()
    assert prints(tmp_path, monkeypatch, "killed") == 0
    assert "**3.000** | **3.000**" in (tmp_path / "killed/table.md").read_text()


@pytest.mark.parametrize(
    ("mode", "error"), [("single", "give that by --initial"), ("words", "'bad' in the output"), ("comma", "'1,234.5'")]
)
def test_what_is_no_first_loss_or_no_number_is_said(tmp_path, monkeypatch, capsys, mode, error):
    assert prints(tmp_path, monkeypatch, mode) == 1
    assert error in capsys.readouterr().err
    if mode == "single":
        assert prints(tmp_path, monkeypatch, mode, "--initial", "5") == 0
        assert len((tmp_path / mode / "outcomes.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_sweep_that_is_killed_goes_on(how, tmp_path, monkeypatch, capsys):
    end = command(tmp_path, monkeypatch)
    options = [
        "--out",
        "swept",
        "--lr",
        "0.01",
        "0.1",
        "--seed",
        "1",
        "--variant",
        "plain=",
        "--variant",
        "slow=2.5",
        *LOSS,
    ]
    whole = [sys.executable, "-m", "stable_monitor.sweep", *options, *end]
    # Where the tests themselves run in the background, Ctrl-C is ignored, and children inherit that.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    while not (tmp_path / "started.txt").exists() or len(started(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    _, error = process.communicate(timeout=30)
    if how == signal.SIGKILL:  # what it ran is left, and must not write where its successor does
        assert sweep.main([*options, *end]) == 1
        said = capsys.readouterr().err
        assert "swept/slow-0.01-1: a process that was started before is still training it" in said
        os.killpg(int(re.search(r"kill -TERM -- -(\d+)", said)[1]), signal.SIGTERM)
        with open("swept/slow-0.01-1/running") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for its end
    else:
        assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error
    assert not (tmp_path / "swept/slow-0.01-1/status").exists()
    assert sweep.main([*options, *end]) == 0, capsys.readouterr().err
    assert len(started(tmp_path)) == 5  # the one that was interrupted twice
    assert (tmp_path / "swept/slow-0.01-1/status").read_text() == "0\n"


def test_commands_for_a_scheduler_and_what_they_left(tmp_path, monkeypatch, capsys):
    end = command(tmp_path, monkeypatch)
    arguments = ["--out", "a folder", "--lr", "0.01", "0.1", "--seed", "1", "--variant", "b=0 'two words'", *LOSS]
    assert sweep.main([*arguments, "--commands", *end]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and not (tmp_path / "started.txt").exists()
    subprocess.run(["bash", "-c", lines[0]], check=True)
    assert started(tmp_path) == ["0.01 1 0 two words"]
    assert sweep.main([*arguments, "--collect", *end]) == 0
    assert "1 runs have not ended" in capsys.readouterr().out
    assert sweep.main([*arguments, "--commands", *end]) == 0
    assert capsys.readouterr().out.splitlines() == lines[1:]
    (folder := tmp_path / "a folder/b-0.1-1").mkdir()
    with open(folder / "running", "w") as file:  # as the line that a node runs holds it
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep.main([*arguments, "--commands", *end]) == 0
        said = capsys.readouterr()
        assert said.out == "" and "1 runs are under way" in said.err
        assert subprocess.run(["bash", "-c", lines[1]]).returncode == 1
    assert len(started(tmp_path)) == 1


def test_the_monitors_losses(tmp_path, monkeypatch):
    """The last validation's, else the mean of the last ten; the first is of the untrained model."""
    monkeypatch.chdir(tmp_path)
    swept, _ = sweep.parse(["--out", "swept", "--lr", "0.1", "1", "--seed", "1", "--", "sh", "{lr}", "{out}"])
    for run, validations in zip(swept.runs(), ([], [3.0, 2.5]), strict=True):
        file = RecordFile(run.folder)
        file.prepare()
        for step in range(20):
            file.append({"step": step, "loss": 4.0 if step < 10 else 2.0 + step % 2, "layers": {}, "alarms": []})
        for loss in validations:
            file.append({"step": 20, "validation": {"loss": loss}})
        (run.folder / "status").write_text("0\n")
    assert [(o.initial, o.final) for o in map(sweep.Run.outcome, swept.runs())] == [(4.0, 2.5), (4.0, 2.5)]
    (tmp_path / "swept/plain-1-1/status").write_text("1\n")
    assert math.isnan(swept.runs()[1].outcome().final)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["--lr", "0.1", "0.1", "--", "sh", "{lr}", "{out}"],
            "lr = [0.1, 0.1]: allowed are different positive numbers",
        ),
        (["--lr", "0.1", "--", "sh", "{out}"], "the command has no {lr} in it: sh '{out}'"),
        (
            ["--lr", "0.1", "--seed", "1", "2", "--", "sh", "{lr}", "{out}"],
            "the command has no {seed} in it, and its runs",
        ),
        (["--lr", "0.1", "--", "sh", "{lr}", "{out}", "{sed}"], "{sed} in the command: do you mean {seed}?"),
        (["--lr", "0.1", "sh", "--lr={lr}", "--out={out}"], "-- is missing"),
        (["--lr", "0.1", "--seed", "1", "--", "sh x", "{lr}", "{out}"], "command = 'sh x': there is no such program"),
        (["--lr", "0.1", "--loss", "loss", "--", "sh", "{lr}"], "loss = 'loss': allowed are patterns with one group"),
        (["--lr", "0.1", "--variant", "a/b=", "--", "sh", "{lr}", "{out}"], "variant = 'a/b=': allowed is NAME=FLAGS"),
        (
            ["--lr", "0.1", "--seed", "1", "--", sys.executable, "-c", "print('oh')", "{lr}", "{out}"],
            "no monitor.jsonl with a loss there; it ended with status 0, and said at last: oh",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, arguments, error):
    assert sweep.main(["--out", str(tmp_path / "swept"), *arguments]) == 1
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1


def test_rates_that_are_not_even_are_said(tmp_path, monkeypatch, capsys):
    end = command(tmp_path, monkeypatch)
    assert sweep.main(["--out", "swept", "--lr", "1e-3", "2e-3", "0.1", "--seed", "1", *LOSS, *end]) == 0
    assert "the rates are not even in log(rate)" in capsys.readouterr().err
    assert sweep.is_even((3e-4, 1e-3, 3e-3, 1e-2)) and sweep.is_even((0.1,))


def test_another_command_or_other_flags_need_another_name(tmp_path, monkeypatch, capsys):
    end = command(tmp_path, monkeypatch)
    start = ["--out", "swept", "--lr", "0.01", "--seed", "1", *LOSS, "--variant"]
    assert sweep.main([*start, "a=0", *end]) == 0
    assert sweep.main([*start, "a=1", *end]) == 1
    assert "its variant a has '0'; give it another name" in capsys.readouterr().err
    assert sweep.main([*start, "a=0", *end, "more"]) == 1
    assert "take another --out" in capsys.readouterr().err


def test_a_command_may_be_mended_until_a_run_has_ended(tmp_path, monkeypatch, capsys):
    """What an old command leaves afterwards, as from a scheduler's queue, is not taken for the new one's."""
    end = command(tmp_path, monkeypatch)
    start = ["--out", "swept", "--lr", "0.01", "--seed", "1", *LOSS]
    assert sweep.main([*start, "--commands", *end]) == 0
    (queued,) = capsys.readouterr().out.splitlines()
    assert sweep.main([*start, "--commands", *end, "0"]) == 0
    subprocess.run(["bash", "-c", queued], check=True)
    assert sweep.main([*start, "--collect", *end, "0"]) == 1
    assert "no run has ended yet" in capsys.readouterr().err
    assert sweep.main([*start, *end, "0"]) == 0
    assert started(tmp_path) == ["0.01 1 ", "0.01 1 0"]


def test_the_help_shows_the_example(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    assert re.search(r"-- python train.py --learning_rate=\{lr\}", capsys.readouterr().out)
