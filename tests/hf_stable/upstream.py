"""transformers' own tests for models, out of the source distribution that `make venv` puts beside the installed package."""

import importlib
import sys
import tarfile
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import pytest

_extracted = tempfile.TemporaryDirectory()  # until the tests are over


def common_tests() -> types.ModuleType:
    """tests/test_modeling_common.py of the transformers that is installed."""
    archive = Path(sys.prefix, "upstream", f"transformers-{version('transformers')}.tar.gz")
    if not archive.exists():
        pytest.fail(f"{archive} is missing: make venv downloads it", pytrace=False)
    package = types.ModuleType("transformers_tests")
    with tarfile.open(archive) as tar:
        tar.extractall(_extracted.name, filter="data")
    package.__path__ = [str(Path(_extracted.name, archive.name.removesuffix(".tar.gz"), "tests"))]
    sys.modules[package.__name__] = package
    # What the distribution leaves out.
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        sys.modules[f"{package.__name__}.{name.partition('.')[0]}"] = types.ModuleType(name)
        stub = sys.modules[f"{package.__name__}.{name}"] = types.ModuleType(name)
        setattr(stub, mixin, type(mixin, (), {}))
    return importlib.import_module(f"{package.__name__}.test_modeling_common")
