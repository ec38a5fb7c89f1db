"""`stable`: the modules' own commands under one name, which start without importing more than they need."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import stable_core
from stable_command import COMMANDS, NAMES, SHELLS, main
from stable_monitor import diagnose
from tests.warm import PYTHON

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommand_is_the_main_of_its_module_and_calls_itself_by_its_name(name):
    ways = [f"stable {name}", f"python -m {COMMANDS[name].module}"]
    calls = [["stable_command", name], [COMMANDS[name].module]]
    ours, theirs = (
        subprocess.run([PYTHON, "-m", *call, "--help"], capture_output=True, text=True, check=True).stdout
        for call in calls
    )
    assert ours.startswith(f"usage: {ways[0]} ") and theirs.startswith(f"usage: {ways[1]} ")
    assert ours.split() == theirs.replace(ways[1], ways[0]).split()
    assert "python -m" not in ours


def test_arguments_and_exit_status_are_the_modules(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["diagnose", run, "--json"]) == diagnose.main([run, "--json"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == second and run in first


def test_modules_of_the_working_directory_are_found_as_with_python_m(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "stable").write_text("import sys\nfrom stable_command import main\nsys.exit(main())\n")
    (tmp_path / "mine.py").write_text("print('mine')\n")
    command = [PYTHON, str(tmp_path / "bin" / "stable"), "convert", "gpt2", "nowhere", "out", "--methods", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "mine\n"), done.stderr


# In a process of its own, where torch, all packages of ours and what the extras install cannot be imported.
ALONE = """
import sys
for name in ("torch", "numpy", "stable_core", "stable_monitor", "hf_stable", "fairseq_sigma"):
    sys.modules[name] = None
from stable_command import main
sys.exit(main(sys.argv[1:]))
"""


def alone(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, check=True).stdout


def test_help_version_and_completion_import_nothing():
    usage = alone("--help")
    assert all(re.search(rf"^  {name}  +\w", usage, re.MULTILINE) for name in NAMES) and "examples:\n  stable " in usage
    assert max(map(len, usage.splitlines())) <= 80
    assert alone("--version") == f"stable-transformer {stable_core.__version__}\n"
    for shell in SHELLS:
        assert set(NAMES) <= set(re.findall(r"\w+", alone("completion", shell)))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["reprot"], f"stable: reprot: no such subcommand; did you mean report? allowed are {', '.join(NAMES)}\n"),
        (["xyzzy", "--help"], f"stable: xyzzy: no such subcommand; allowed are {', '.join(NAMES)}\n"),
        (["completion", "csh"], "stable: usage: stable completion SHELL; allowed are bash, zsh, fish\n"),
    ],
)
def test_what_is_no_subcommand_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words, expected", [("re", "report rescue"), ("diag", "diagnose"), ("report ru", "")], ids=str)
def test_bash_completes_the_names(words, expected):
    *before, word = words.split()
    script = f"{SHELLS['bash'].format(names=' '.join(NAMES))}\nCOMP_CWORD={len(before) + 1}\n_stable stable {word}\n"
    done = subprocess.run(["bash", "-c", script + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_the_changelog_begins_with_the_version():
    assert re.search(r"^## ([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == stable_core.__version__
