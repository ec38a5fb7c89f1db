"""Every submodule of every package is imported, as documentation tools and editors do; no public name becomes another."""

import re
import subprocess
import sys
from pathlib import Path

import stable_core

# In a process of its own, where nothing is imported yet; prints the public names that changed.
IMPORT_ALL = """
import importlib, pkgutil, sys, types
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    before = {key: value for key, value in vars(package).items()
              if not key.startswith("_") and not isinstance(value, types.ModuleType)}
    assert set(getattr(package, "__all__", ())) <= set(before)
    for module in list(pkgutil.walk_packages(package.__path__, name + ".")):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    print("changed:", [f"{name}.{key}" for key, value in before.items() if getattr(package, key) is not value])
"""


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


def test_importing_every_submodule_leaves_the_public_names():
    packages = ["stable_core", "stable_monitor", "hf_stable", "timm_stable", "nanogpt_patch", "fairseq_sigma"]
    done = run("-W", "ignore", "-c", IMPORT_ALL, *packages)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "changed" in line] == ["changed: []"] * len(packages)


def test_folding_a_file_leaves_the_function_its_name():
    """Python warns where a command's module was loaded before it is run."""
    done = run("-W", "error", "-m", "stable_core.fold_checkpoint", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: python -m stable_core.fold_checkpoint" in done.stdout


def test_the_reading_order_of_the_core_names_every_file():
    files = {path.name for path in Path(stable_core.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\b\w+\.py\b", stable_core.__doc__)) == files
