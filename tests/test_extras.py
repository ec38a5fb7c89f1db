"""The extras: what the packages import is what they install, and a package that lacks something says which."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.test_lock import PROJECT, asked

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "stable_monitor": "monitor",
    "plugins/fairseq_sigma": "fairseq",
    "plugins/hf_stable": "hf",
    "plugins/timm_stable": "timm",
}
OURS = {"stable_core", *(Path(package).name for package in PACKAGES)}
OF_ANOTHER_EXTRA = {
    "convert_fairseq.py": {"fairseq"},
    "convert_timm.py": {"timm"},
    "rescue_checkpoint.py": {"timm"},
    "writers.py": {"wandb"},
}


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_an_extra_installs_what_its_package_imports(package):
    installed = {canonicalize_name(requirement.name) for requirement in asked(PROJECT, PACKAGES[package])}
    known = packages_distributions()
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path) - set(sys.stdlib_module_names) - OURS - OF_ANOTHER_EXTRA.get(path.name, set()):
            assert {canonicalize_name(found) for found in known.get(name, [name])} & installed, f"{path}: {name}"


ONLY_TORCH = """
import sys
for name in ("matplotlib", "numpy", "PIL", "rich", "scipy", "tensorboard", "transformers", "fairseq", "timm"):
    sys.modules[name] = None
import torch, stable_core, stable_monitor, nanogpt_patch.model
from stable_monitor import diagnose, rescue_checkpoint, thin
model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
optimizer = torch.optim.AdamW(model.parameters())
monitor = stable_monitor.Monitor(model, every=1, optimizer=optimizer, path="run")
for _ in range(2):
    loss = model(torch.randn(2, 5, 8)).square().mean()
    loss.backward()
    optimizer.step()
    monitor.step(loss)
    optimizer.zero_grad()
monitor.close()
assert diagnose.main(["run"]) == 0

def lacks(make):
    try:
        make()
    except ModuleNotFoundError as error:
        print(error)

lacks(lambda: stable_monitor.sharpness(model, lambda m, x: m(x).sum(), [torch.randn(1, 5, 8)]))
lacks(lambda: stable_monitor.TensorBoardWriter("."))
for module in ("stable_monitor.report", "stable_monitor.sweep", "hf_stable", "fairseq_sigma", "timm_stable"):
    lacks(lambda: __import__(module))
from stable_command import main
for name in sys.argv[1:]:
    assert main([name, "--help"]) == 2
"""


def test_with_torch_alone_runs_are_monitored_and_all_else_names_its_extra(tmp_path):
    commands = {"report": "monitor", "sweep": "monitor", "convert": "hf", "update": "hf", "average": "fairseq"}
    command = [sys.executable, "-W", "ignore", "-c", ONLY_TORCH, *commands]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lacking = [line.partition(" is not installed: ") for line in done.stdout.splitlines() if "not installed" in line]
    assert [how for _, _, how in lacking] == [
        f"pip install 'stable-transformer[{extra}]'"
        for extra in ("monitor", "monitor", "monitor", "monitor", "hf", "fairseq", "timm")
    ]
    assert [name for name, _, _ in lacking][-3:] == ["transformers", "numpy", "timm"]
    for (name, extra), line in zip(commands.items(), done.stderr.splitlines(), strict=True):
        assert line.startswith(f"stable: {name}: ")
        assert line.endswith(f" is not installed: pip install 'stable-transformer[{extra}]'")
