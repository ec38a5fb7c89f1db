"""The commands that a text calls, and what is wrong with the flags it gives them, as their --help or their launcher says."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from stable_command import COMMANDS
from tests.warm import PYTHON

ROOT = Path(__file__).parents[1]
OURS = ("stable_core", "stable_monitor", "fairseq_sigma", "timm_stable", "hf_stable", "nanogpt_patch", "recipes")
WITH_SUBCOMMANDS = ("hf_stable.convert",)
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
CALLED = re.compile(
    r"(?:python|\$PY) -m (?P<module>[\w.]+)|(?:^|\s)stable (?P<stable>[a-z]+)(?!\S)"
    r"|(?:^|\s)fairseq-(?P<fairseq>train|generate|interactive|score|eval-lm|preprocess)(?!\S)"
)
# What other flags a fairseq command has depends on these, and "..." may stand for the first two.
CHOOSING = ("--user-dir", "--arch", "--task", "--criterion", "--optimizer", "--lr-scheduler", "--scoring", "--bpe")
LEFT_OUT = {"--user-dir": "plugins/fairseq_sigma", "--arch": "sigma_transformer_6l"}
CHECK = "import sys; from nanogpt_patch.launch import check; check(sys.argv[1:])"


def commands(script: str) -> Iterator[tuple[str, list[str]]]:
    """The modules that a script calls of ours and fairseq's, and the words after each."""
    for line in re.sub(r"\\\n", " ", script).splitlines():
        called = CALLED.search(line)
        if called is None or line.lstrip().startswith("#"):
            continue
        if called["fairseq"]:
            module = f"fairseq_cli.{called['fairseq'].replace('-', '_')}"
        else:
            module = called["module"] or COMMANDS[called["stable"]].module
        if module.startswith((*OURS, "fairseq_cli")):
            given = re.split(r"(?:^|\s)--\s|\s#|\s[|>]", line[called.end() :])[0]
            yield module, re.sub(QUOTED, "QUOTED", given).split()


def wrong_flags(script: str, nanogpt: Path) -> list[str]:
    """What is wrong with a script's flags, in a line each; `nanogpt` is a folder with nanoGPT's scripts."""
    found = []
    for module, words in commands(script):
        if module == "nanogpt_patch":  # whose --help is its README's
            found += wrong_settings(words, nanogpt)
            continue
        shown = help_of(module, *choosing(module, words))
        flags = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        found += [f"{module} has no {flag}" for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", shown)]
    return found


def choosing(module: str, words: list[str]) -> list[str]:
    """Those of a command's words that decide which flags it has."""
    if module in WITH_SUBCOMMANDS:
        return words[:1]
    if not module.startswith("fairseq_cli"):
        return []
    given = {flag: value for flag, value in pairwise(words) if flag in CHOOSING}
    if "..." in words:
        given = LEFT_OUT | given
    return [word for pair in given.items() for word in pair]


@cache
def help_of(*command: str) -> str:
    return subprocess.run(
        [PYTHON, "-m", *command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def wrong_settings(words: list[str], nanogpt: Path) -> list[str]:
    """What the launcher says of its arguments, in another process, as they may name modules that register methods."""
    given = [word.replace("PATH/TO/nanoGPT", str(nanogpt)) for word in words if word != "..."]
    if not given[0].endswith(".py"):
        given.insert(0, str(nanogpt / "train.py"))
    done = subprocess.run([PYTHON, "-c", CHECK, *given], capture_output=True, text=True, cwd=nanogpt)
    return done.stderr.splitlines()[-1:]
