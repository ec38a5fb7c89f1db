"""Every command that a recipe prints against paper_settings.txt, the table of the papers' settings."""

import os
import shlex
import subprocess
import sys
from functools import cache
from math import isclose
from pathlib import Path

import pytest

from tests.nanogpt_patch.test_launch import write_scripts

from .paper_settings import Section, sections
from .printed_settings import GPUS, settings_of

RECIPES = Path(__file__).parents[2] / "recipes"
MEASURED = {"weight_std", "patch_std", "weight_bound"}  # of random weights


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """printed(command): the settings of each command that a recipe prints on a machine of eight GPUs, without data."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"  # one that answers for torch, which takes seconds to import
    answers = f'*device_count*) echo {GPUS} ;; *is_available*) echo True ;; *) exec "{sys.executable}" "$@" ;;'
    python.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    python.chmod(0o755)
    write_scripts(folder / "nanoGPT")
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"DRY_RUN": "1", "SMALL": "0", "STABLE_VENV": "none", "NANOGPT_DIR": str(folder / "nanoGPT"), "PATH": path}
    pretrained = (
        folder / "runs" / "vision" / "imagenet21k-pretrain-1" / "model.safetensors"
    )  # fine-tuning's, which is looked for
    pretrained.parent.mkdir(parents=True)
    pretrained.touch()
    ours |= {"RUNS": str(folder / "runs")}

    @cache
    def run(command: str) -> list[dict]:
        words = shlex.split(command)
        at = next(i for i, word in enumerate(words) if "=" not in word)
        given = dict(word.split("=") for word in words[:at])
        done = subprocess.run(
            ["bash", str(RECIPES / words[at]), *words[at + 1 :]],
            env=ours | given,  # the recipes read LR, DEPTH and the like from the environment
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [found for found in map(settings_of, done.stdout.splitlines()) if found is not None]

    return run


def agrees(name: str, said: str, found) -> bool:
    """Whether `found` is what the paper says, or one of the things that it says."""
    return any(_is(name, one, found) for one in [said, *said.split("/")])


def _is(name: str, said: str, found) -> bool:
    if said in ("yes", "no"):
        return found is (said == "yes")
    if said == "none" and found is None:
        return True
    try:
        return isclose(float(said), found, rel_tol=0.05 if name in MEASURED else 1e-6)
    except (TypeError, ValueError):
        return said == found


CASES = [(section, column) for section in sections() for column in section.columns]
IDS = [s.template.format(c) if "{}" in s.template else f"{s.template}, {c}" for s, c in CASES]


@pytest.mark.parametrize("section, column", CASES, ids=IDS)
def test_a_recipe_trains_with_the_papers_settings(section: Section, column: str, printed):
    found = printed(section.template.format(column))[0 if "{}" in section.template else section.columns.index(column)]
    wrong = [
        f"{name}: {found[name]}, and the paper has {said} [{place}]"
        for name, (said, place) in section.of(column).items()
        if not agrees(name, said, found[name])
    ]
    if wrong:
        pytest.fail("\n".join((section.place, *wrong)), pytrace=False)


def test_a_recipe_prints_no_other_run(printed):
    for section in sections():
        if "{}" not in section.template:
            assert len(printed(section.template)) == len(section.columns), section.template
