"""The tables of methods in the docs are those of the registry as it is now."""

from pathlib import Path

import pytest

from benchmarks import methods
from stable_core.registry import SLOTS, method, names

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.mark.parametrize("part", ["methods", "settings", "refused"])
def test_the_docs_have_what_the_command_prints(part, monkeypatch):
    own = {s: tuple(n for n in names(s) if method(s, n).module.startswith("stable_core.")) for s in SLOTS}
    monkeypatch.setattr(methods, "names", own.get)  # without what other tests have registered
    assert f"\n\n{getattr(methods, part)()}\n" in DOCS.read_text()
