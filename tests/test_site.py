"""The docs site: it builds without a warning, has every page and every public name, and no link goes nowhere."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"


@pytest.fixture(scope="module")
def staging():
    spec = importlib.util.spec_from_file_location("stage", ROOT / "docs" / "site" / "stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(staging):
    shutil.rmtree(SITE, ignore_errors=True)
    staging.main()
    zensical = Path(sys.executable).with_name("zensical")
    run = [zensical, "build", "--strict", "--config-file", staging.BUILD / "mkdocs.yml"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SITE


def test_every_page_is_there_and_in_the_menu(site, staging):
    menu = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    for page in staging.pages():
        place = page.with_name("index.html") if page.name == "README.md" else page.with_suffix(".html")
        assert (site / place).is_file()
        assert f" {page.with_suffix('.md')}\n" in menu


@pytest.mark.parametrize("package", ["stable_core", "stable_monitor", "hf_stable"])
def test_the_reference_has_every_public_name(site, package):
    page = (site / "api" / f"{package}.html").read_text()
    for name in importlib.import_module(package).__all__:
        if not name.startswith("_"):
            assert f'.{name}" class="doc doc-heading"' in page, name


def test_each_method_has_a_page_with_its_equation_and_code(site, staging):
    for name, method in staging.method_pages.METHODS.items():
        page = (site / "methods" / f"{name}.html").read_text()
        assert method.public is None or f'id="{method.public}"' in page
        assert all(f">{one}<" in page for one in method.reference)
    assert "1.618" in (site / "methods/stable_attention.html").read_text()


def test_a_link_to_a_notebook_is_to_its_page(site):
    assert 'href="notebooks/rescue_gpt.html"' in (site / "docs/index.html").read_text()


def test_pictures_and_logs_that_are_linked_are_copied(site):
    assert (site / "recipes/lr_sensitivity/results/gpt.png").is_file()
    assert (site / "recipes/rescue/results/gpt.jsonl").is_file()


def test_a_link_that_goes_nowhere_is_named(staging, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("See [this](gone.md#there).")
    with pytest.raises(FileNotFoundError, match=r"page\.md: gone\.md"):
        staging.stage(Path("page.md"))
