"""The wheel: what is in it, and that its packages and command work from where it is installed, away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import stable_core
import stable_monitor
from tests.fairseq_sigma.conftest import TINY, corpus  # noqa: F401  a fixture
from tests.hf_stable.models import OURS, stable_gpt

ROOT = Path(__file__).parents[1]
PACKAGES = {  # where each lies in the checkout
    "stable_core": "stable_core",
    "stable_monitor": "stable_monitor",
    "nanogpt_patch": "nanogpt_patch",
    "fairseq_sigma": "plugins/fairseq_sigma",
    "hf_stable": "plugins/hf_stable",
    "timm_stable": "plugins/timm_stable",
}


def call(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """What git tracks or would, as it is now."""
    export = tmp_path_factory.mktemp("export")
    listed = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (export / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, export / name)
    return export


@pytest.fixture(scope="module")
def wheel(export, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, export)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """run(*command) -> what python prints, in another folder and with the wheel's packages before the checkout's."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", site)
    call(sys.executable, "-m", "pip", "install", *options, wheel)

    def run(*command) -> str:
        return call(sys.executable, *command, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)})

    run.site, run.folder = site, elsewhere
    return run


def test_it_holds_the_six_packages_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(ROOT / place).as_posix()}"
        for package, place in PACKAGES.items()
        for path in (ROOT / place).rglob("*.py")
    }
    assert names == expected | {"stable_command.py", "stable_core/py.typed", "stable_monitor/py.typed"}
    assert "nanogpt_patch/config/train_gpt.py" in names


def metadata(wheel: Path) -> str:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return archive.read(name).decode()


def test_it_names_its_license_and_extras(wheel):
    text = metadata(wheel)
    assert "Requires-Dist: torch>=2.10\n" in text
    assert f"\nVersion: {stable_core.__version__}\n" in text and stable_monitor.__version__ == stable_core.__version__
    for extra in ("monitor", "fairseq", "timm", "hf"):
        assert f"Provides-Extra: {extra}\n" in text
    assert "\nAuthor: the stable-transformer authors\n" in text and "\nLicense-Expression: MIT\n" in text
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


BUILD = """
import sys
from pathlib import Path
from setuptools import build_meta
home, backend, out = sys.argv[1:]
setup = Path("setup.py").read_text()
assert setup.count('HOME = ""') == 1
Path("setup.py").write_text(setup.replace('HOME = ""', f"HOME = {home!r}"))
getattr(build_meta, backend)(out)
"""
RELATIVE = re.compile(r"\]\((?!https?://|#)")


@pytest.mark.parametrize("home", ["", "https://example.org/stable"])
def test_its_page_has_addresses_where_the_repository_has_one(home, export, tmp_path):
    checkout = shutil.copytree(export, tmp_path / "checkout")
    assert RELATIVE.search((checkout / "README.md").read_text())
    call(sys.executable, "-c", BUILD, home, "build_wheel", tmp_path, cwd=checkout)
    (wheel,) = tmp_path.glob("*.whl")
    text = metadata(wheel)
    assert not RELATIVE.search(text) and ("Project-URL: " in text) is bool(home)
    tree = f"{home}/{{}}/v{stable_core.__version__}"
    assert (f"Project-URL: Changelog, {tree.format('blob')}/CHANGELOG.md\n" in text) is bool(home)
    assert f"]({tree.format('raw')}/" in text or not home


def test_the_sdist_has_the_packages_and_no_part_of_the_tests(export, wheel, tmp_path):
    checkout = shutil.copytree(export, tmp_path / "checkout")
    call(sys.executable, "-c", BUILD, "", "build_sdist", tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    root = f"stable_transformer-{stable_core.__version__}"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "recipes"))]
    modules = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert modules == {name.removeprefix("plugins/") for name in names if name.endswith((".py", "py.typed"))} - {
        "setup.py"
    }


IMPORTS = """
import importlib, sys
for package in {packages}:
    module = importlib.import_module(package)
    assert module.__file__.startswith({site!r}), module.__file__
import timm
vit = timm.create_model("sigma_vit_small_patch16_224", img_size=32, depth=1)
assert "blocks.0.attn.qkv.parametrizations.weight.original" in vit.state_dict()
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="stable")
assert script.load()(["--version"]) == 0
import runpy
for module in ("nanogpt_patch", "stable_monitor.report"):
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""


def test_its_packages_import_and_its_commands_answer(installed):
    said = installed("-c", IMPORTS.format(packages=sorted(PACKAGES), site=str(installed.site)))
    assert said.count("usage: ") == 2
    assert f"stable-transformer {stable_core.__version__}\n" in said


def test_fairseq_train_with_the_folder_it_prints(installed, corpus, tmp_path):  # noqa: F811
    user_dir = installed("-m", "fairseq_sigma").removesuffix("\n")
    assert user_dir == str(installed.site / "fairseq_sigma")
    flags = (
        "--arch",
        "sigma_transformer_6l",
        *TINY,
        "--max-update",
        3,
        "--no-epoch-checkpoints",
        "--save-dir",
        tmp_path,
    )
    installed("-m", "fairseq_cli.train", corpus, "--user-dir", user_dir, *flags)
    checkpoint = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert checkpoint["optimizer_history"][-1]["num_updates"] == 3
    assert "encoder.layers.0.fc1.parametrizations.weight.0.u" in checkpoint["model"]


SAVE = """
import torch
from hf_stable import StableGPTForCausalLM
StableGPTForCausalLM.from_pretrained({plain!r}).save_pretrained({folder!r})
"""
LOAD = """
import sys
for package in {packages}:
    sys.modules[package] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True).eval()
print(model(torch.arange(9)[None]).logits.double().norm().item())
"""


@pytest.mark.slow  # tests/hf_stable/test_export.py loads such folders without the package
def test_a_model_that_it_saves_loads_without_it(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = stable_gpt(reparam="sigma")
    model.save_pretrained(tmp_path / "plain")
    folder = str(tmp_path / "saved")
    installed("-c", SAVE.format(plain=str(tmp_path / "plain"), folder=folder))
    printed = call(sys.executable, "-c", LOAD.format(packages=OURS, folder=folder), cwd=installed.folder)
    assert float(printed) == pytest.approx(model(torch.arange(9)[None]).logits.double().norm().item(), rel=1e-6)
