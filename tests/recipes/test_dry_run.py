"""DRY_RUN=1 of every shell recipe, where there is neither data nor a checkout: it shows something, and writes nothing."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import papers

RECIPES = Path(__file__).parents[2] / "recipes"
ARGUMENTS = {
    "gpt/table2.sh": ["small"],
    "hf_clm/stablegpt.sh": ["S"],
    "librispeech/evaluate.sh": ["run"],
    "librispeech/train.sh": ["sigma"],
    "simclr/run.sh": ["sigma"],
    "vision/ablations.sh": ["heads", "8"],
    "vision/cifar100.sh": ["vit"],
    "vision/imagenet1k.sh": ["wn_b"],
    "vision/imagenet21k.sh": ["finetune"],
    "vision/robustness_grid.sh": ["vit"],
    "vision/stablevit.sh": ["200"],
    "wikitext103/evaluate.sh": ["sigma"],
    "wikitext103/train.sh": ["sigma"],
    "wmt17_en_de/evaluate.sh": ["sigma_transformer_6l"],
    "wmt17_en_de/train.sh": ["sigma_transformer_6l"],
}
SECOND = {  # the seed, or what else stands before options
    "gpt/table2.sh": ["stable"],
    "hf_clm/stablegpt.sh": ["stable", "1"],
    "simclr/run.sh": ["1"],
    "vision/ablations.sh": ["1"],
    "vision/cifar100.sh": ["1"],
    "vision/imagenet1k.sh": ["1"],
    "vision/imagenet21k.sh": ["1"],
    "vision/robustness_grid.sh": ["1"],
    "vision/stablevit.sh": ["stable", "1"],
    "wikitext103/evaluate.sh": ["1"],
    "wikitext103/train.sh": ["1"],
    "wmt17_en_de/evaluate.sh": ["1"],
    "wmt17_en_de/train.sh": ["1"],
}
COMMANDS = [one for rows in papers.papers().values() for row in rows for one in row.commands]
SCRIPTS = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob("*/*.sh") if path.name != "common.sh")


@pytest.mark.parametrize("small", ["0", "1"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_needs_nothing_and_writes_nothing(tmp_path, script, small):
    done = dry_run(tmp_path, small, script, *ARGUMENTS.get(script, []))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
    assert not any((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("command", [one for one in COMMANDS if ".sh" in one])
def test_the_commands_of_the_papers_tables_and_figures(tmp_path, command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if "=" not in word)
    script = words[at].removeprefix("recipes/")
    done = dry_run(tmp_path, "0", script, *words[at + 1 :], **dict(word.split("=") for word in words[:at]))
    assert (done.returncode, done.stderr) == (0, "") and all(word in done.stdout for word in words[at + 3 :])


def test_the_page_of_the_papers_is_what_the_command_writes():
    assert papers.page() == papers.README.read_text()


@pytest.mark.parametrize("small", ["0", "1"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_option_is_passed_on_or_refused(tmp_path, script, small):
    done = dry_run(tmp_path, small, script, *ARGUMENTS.get(script, []), *SECOND.get(script, []), "--surplus", "7")
    evaluated = script.startswith(("wmt", "wiki")) and "--surplus_7" in done.stdout  # the folder of the run with it
    assert "--surplus 7" in done.stdout or evaluated or (done.returncode and "surplus" in done.stderr)


def dry_run(tmp_path: Path, small: str, script: str, *arguments: str, **given: str) -> subprocess.CompletedProcess:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho 0\n")  # quicker than torch at counting GPUs
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "cwd").mkdir()
    environment = {name: x for name, x in os.environ.items() if name not in ("DATA_DIR", "NANOGPT_DIR", "HEADS")}
    environment |= {"DRY_RUN": "1", "SMALL": small, "RUNS": "runs", "STABLE_DATA": "nowhere", "STABLE_VENV": "none"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(RECIPES / script), *arguments]
    return subprocess.run(command, cwd=tmp_path / "cwd", env=environment | given, capture_output=True, text=True)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("plain", "[][1e-3]"),
        ("sigma", "[--reparam sigma][4]"),
        ("", "KIND = : allowed are plain, sigma"),
        ("s*", "KIND = s*:"),
    ],
)
def test_a_table_of_settings_is_read_by_row(kind, expected):
    table = "KIND  | FLAGS           | LR\nplain |                 | 1e-3\nsigma | --reparam sigma | 4"
    script = f"source {RECIPES}/common.sh; KIND='{kind}'; row <<'TABLE'\n{table}\nTABLE\necho \"[$FLAGS][$LR]\""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert expected in (done.stdout or done.stderr) and (done.returncode == 0) == bool(done.stdout)
