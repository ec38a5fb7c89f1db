"""recipes/rescue: its command, small, and its README's tables against the logs."""

import json
import subprocess
from pathlib import Path

import pytest

from recipes.gpt import prepare
from recipes.rescue import blow_up, run, switch, tables
from recipes.tables import log
from tests.warm import PYTHON

RECIPE = Path(run.__file__).parent
BLOW_UP = RECIPE / "results" / "blow_up.jsonl"
SWITCHES = sorted(RECIPE.glob("results/switch_*.jsonl"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    prepare.write("to be, or not to be: that is the question. " * 200, folder)
    return folder


def test_each_remedy_goes_on_from_the_same_training(data, tmp_path, capsys):
    options = ["gpt", "--data", str(data), "--output", str(tmp_path), "--at", "21", "--after", "1", "--seeds", "1"]
    assert run.main([*options, "--remedies", "go_on", "rescue_all"]) == 0
    first = (tmp_path / "log.jsonl").read_text()
    assert run.main([*options, "--remedies", "go_on", "half", "rescue_all"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (tmp_path / "log.jsonl").read_text().startswith(first)
    assert [line["remedy"] for line in lines] == ["go_on", "rescue_all", "half"]
    assert len({line["eval_before"] for line in lines}) == 1
    assert lines[0]["eval_changed"] == lines[2]["eval_changed"] == lines[0]["eval_before"]
    assert len(lines[1]["said"]) == 4 and "half the rate" in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_a_rescue_is_of_the_layers_that_have_collapsed_in_each_stack(data, tmp_path, kind):
    training = run.KINDS[kind].build(data, 1e-3, 1)
    attention = "transformer.h.1.attn.c_attn" if kind == "gpt2" else "blocks.1.attn.qkv"
    weight = training.model.get_submodule(attention).weight.detach()
    (weight[:, :128] if kind == "gpt2" else weight[:64]).mul_(1e4)
    (said,) = run.apply("rescue", training)
    assert said.startswith(f"rescued {attention.rpartition('.')[0]}: entropy ")
    run.train(training, 1, 1)
    assert training.records[0][2] > 0.9  # entropy / log(keys)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"remedies": ("pray",)},
            "remedies = 'pray': allowed are go_on, half, back, qk_clip, sigma, rescue, rescue_half, rescue_sigma, rescue_all",
        ),
        ({"at": 20}, "at = 20: allowed are whole numbers from 21"),
        ({"after": 0}, "after = 0, lr = None: allowed are positive numbers"),
        ({"data": Path("nowhere")}, "data = nowhere: allowed are folders that recipes.gpt.prepare wrote"),
    ],
)
def test_wrong_settings_are_named(data, tmp_path, settings, error):
    with pytest.raises(ValueError, match=error):
        run.Settings(**{"kind": "gpt", "data": data, "output": tmp_path, **settings})


def test_each_log_has_three_seeds_and_is_in_the_tables_and_the_readme_has_the_main_ones():
    assert tables.in_short() in (RECIPE / "README.md").read_text()
    logs = {path.stem for path in {*RECIPE.glob("results/*.jsonl")} - {BLOW_UP, *SWITCHES}}
    assert set(tables.names()) == logs
    for name in logs:
        assert {line["seed"] for line in log("rescue", name)} == {1, 2, 3}


@pytest.mark.parametrize("path", SWITCHES, ids=lambda path: path.stem)
def test_the_switch_is_ahead_where_an_alarm_rings_in_its_log_and_the_page_has_it(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    final = {(line["variant"], line["lr"], line["seed"]): line["final"] for line in lines}
    assert len(final) == 12
    stack = path.stem.removeprefix("switch_")
    full = switch.STACKS[stack].lr
    columns = (("alone", full), ("alone", full / 2), ("switch", full), ("switch", full / 2))
    cells = (" / ".join(f"{final[*column, seed]:.3f}" for seed in (1, 2, 3)) for column in columns)
    assert f"| {stack} | {' | '.join(cells)} |\n" in (tables.RESULTS / "tables.md").read_text()
    rang = {(line["lr"], line["seed"]) for line in lines if line["variant"] == "switch" and line["alarms"]}
    assert len(rang) == (4 if path.stem == "switch_fairseq" else 6)
    for lr, seed in {(lr, seed) for _, lr, seed in final}:
        with_it, alone = final["switch", lr, seed], final["alone", lr, seed]
        assert with_it < alone if (lr, seed) in rang else with_it == alone


@pytest.mark.parametrize("stack", ["trainer", "vision"])
def test_the_switches_commands_have_flags_that_are_there(stack):
    one = switch.STACKS[stack]
    module, *words = map(str, one.command(Path("data"), None))
    usage = subprocess.run([PYTHON, "-m", module, "--help"], capture_output=True, text=True, check=True).stdout
    for flag in (word for word in [*words, *one.switch.split()] if word.startswith("--")):
        assert f"{flag} " in usage, flag


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"stack": "trainer"}, "data = None: allowed are folders with a val.bin, see --help"),
        (
            {"stack": "nanogpt", "checkout": Path("gone")},
            "checkout = gone: allowed is a checkout of nanoGPT, with its train.py",
        ),
    ],
)
def test_what_a_switchs_run_needs_is_named(data, tmp_path, settings, error):
    given = {"output": tmp_path, **({"data": data} if settings["stack"] == "nanogpt" else {}), **settings}
    with pytest.raises(ValueError, match=error):
        switch.Settings(**given)


def test_paths_are_whole_as_nanogpts_script_runs_in_its_own_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    settings = switch.Settings(stack="nanogpt", output=Path("out"), data=data, checkout=Path())
    assert (settings.output, settings.checkout) == (tmp_path / "out", tmp_path)


def test_a_diverged_run_is_said_to_be():
    lines = [{"variant": "alone", "lr": 0.1, "seed": seed, "final": loss} for seed, loss in ((1, None), (2, 1.5))]
    assert switch.row("fairseq", lines) == "| fairseq | diverged / 1.500 |"


def test_the_loss_of_a_blow_up_is_far_above_its_first_where_entropy_is_whole(data, capsys):
    assert blow_up.main(["--data", str(data), "--seeds", "1"]) == 0
    now = json.loads(capsys.readouterr().out.splitlines()[-1])  # nanoGPT's model says its size first
    for line in (now, *map(json.loads, BLOW_UP.read_text().splitlines())):
        pairs = zip(line["loss"], line["entropy"], strict=True)
        assert any(loss > 1.5 * line["loss"][0] and entropy > 0.99 for loss, entropy in pairs)
        assert line["entropy"][-1] < 0.5
