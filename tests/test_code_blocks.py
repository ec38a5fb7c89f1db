"""The code of README, guides and recipes, dry: what it imports is there, and what it calls takes the arguments it is given."""

import ast
import importlib
import inspect
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from stable_command import COMMANDS
from tests.warm import PYTHON

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]
OURS = ("stable_core", "stable_monitor", "fairseq_sigma", "timm_stable", "hf_stable", "nanogpt_patch", "recipes")
WITH_SUBCOMMANDS = ("hf_stable.convert",)
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
OTHERS_FLAGS = ("nanogpt_patch",)  # a command whose --help is its README's, and which passes flags on


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for block in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            line = page.read_text()[: block.start()].count("\n") + 2
            found.append(pytest.param(block[1], id=f"{page.relative_to(ROOT)}:{line}"))
    assert found
    return found


def imported(tree: ast.AST) -> dict[str, object]:
    """What a block imports, by the name it has there."""
    names: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                name = alias.asname or alias.name.split(".")[0]
                names[name] = module if alias.asname else importlib.import_module(name)
    return names


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code):
    tree = ast.parse(code)
    names = imported(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if not re.fullmatch(r"[\w.]+", ast.unparse(call.func)):
            continue  # of what another call returned
        first, *rest = ast.unparse(call.func).split(".")
        called = names.get(first)
        for attribute in rest if first in names else ():
            called = getattr(called, attribute)
        if called is None or not (getattr(called, "__module__", None) or "").startswith(OURS):
            continue
        if any(isinstance(given, ast.Starred) for given in call.args) or any(k.arg is None for k in call.keywords):
            continue
        inspect.signature(called).bind_partial(*call.args, **{k.arg: None for k in call.keywords})


@cache
def help_of(*command: str) -> str:
    return subprocess.run(
        [PYTHON, "-m", *command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def commands(script: str) -> Iterator[tuple[list[str], list[str]]]:
    """What a script calls of ours, a module and perhaps its subcommand, and the flags it gives."""
    script = re.sub(r"\\\n", " ", script)
    for line in script.splitlines():
        called = re.search(r"(?:python|\$PY) -m ([\w.]+)|(?:^|\s)stable ([a-z]+)\s", line)
        if called is None or line.lstrip().startswith("#"):
            continue
        module = called[1] or COMMANDS[called[2]].module
        if module.startswith(OURS):
            given = re.split(r"\s--\s|\s#|\s[|>]", line[called.end() :])[0]
            first = given.split()[0] if module in WITH_SUBCOMMANDS else ""
            yield [module, *filter(None, [first])], re.findall(r"(?<=\s)--[a-z][\w-]*", f" {re.sub(QUOTED, '', given)}")


@pytest.mark.parametrize("script", blocks("bash"))
def test_bash(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    for file in re.findall(r"\brecipes/\w+/\w+\.sh\b", script):
        assert (ROOT / file).is_file()
    for target in re.findall(r"^make ([a-z-]+)", script, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for command, flags in commands(script):
        assert importlib.util.find_spec(command[0]), command
        for flag in flags if command[0] not in OTHERS_FLAGS else ():
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(*command)), f"{command} has no {flag}"
