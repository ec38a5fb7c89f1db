"""The code of README, guides and recipes, dry: what it imports is there, and what it calls takes the arguments it is given.

Commands in sentences and tables too.
"""

import ast
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from tests.documented import CALLED, OURS, ROOT, commands, wrong_flags
from tests.nanogpt_patch.test_launch import write_scripts

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md")]


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


@pytest.fixture(scope="session")
def nanogpt(tmp_path_factory) -> Path:
    """A folder with nanoGPT's scripts, and the modules that the pages show."""
    folder = tmp_path_factory.mktemp("written") / "nanoGPT"
    write_scripts(folder)
    for (code,) in (block.values for block in blocks("python")):
        if named := re.match(r"# (\w+\.py)\n", code):
            (folder / named[1]).write_text(code)
    return folder


@pytest.mark.parametrize("script", blocks("bash"))
def test_bash(script, nanogpt):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    for file in re.findall(r"\brecipes/\w+/\w+\.sh\b", script):
        assert (ROOT / file).is_file()
    for target in re.findall(r"^make ([a-z-]+)", script, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for module, _ in commands(script):
        assert importlib.util.find_spec(module), module
    assert wrong_flags(script, nanogpt) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_and_tables(page, nanogpt):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in (" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)):
        if CALLED.match(code):
            assert wrong_flags(code, nanogpt) == [], code


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        (
            "fairseq-train DATA --user-dir plugins/fairseq_sigma --arch sigma_transformer_6l --reparm sigma",
            "no --reparm",
        ),
        ("fairseq-train DATA ... --reparam sigma --monitor-evry 10", "no --monitor-evry"),
        ("fairseq-train DATA --arch transformer --reparam sigma", "no --reparam"),
        ("fairseq-eval-lm DATA --path A.pt --token-per-sample 5", "no --token-per-sample"),
        ("fairseq-score --sis A --ref B", "no --sis"),
        ("stable rescue A B \\\n  --rn C", "no --rn"),
        ("python -m nanogpt_patch PATH/TO/nanoGPT/train.py --lerning_rate=1", "--lerning_rate is no setting"),
        ("python -m nanogpt_patch ... --norm=half", "norm = 'half'"),
    ],
)
def test_a_wrong_flag_is_found(script, wrong, nanogpt):
    (found,) = wrong_flags(script, nanogpt)
    assert wrong in found
