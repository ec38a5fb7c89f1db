"""What pyproject.toml cannot say: the addresses in the metadata, all made from one."""

import re
from pathlib import Path

from setuptools import setup

HOME = ""  # where the repository is, "https://...", without a slash at its end; none is known yet
VERSION = re.search(r'^__version__ = "(.+)"', Path("stable_core/__init__.py").read_text(), re.MULTILINE)[1]
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^]]*)\]\((?!https?:|#)(?P<path>[^)]+)\)")


def absolute(link: re.Match) -> str:
    """A link of README.md into the checkout, as it is where the checkout is not; without HOME its text alone."""
    if not HOME:
        return "" if link["image"] else link["text"]
    return f"{link['image']}[{link['text']}]({HOME}/{'raw' if link['image'] else 'blob'}/v{VERSION}/{link['path']})"


setup(
    long_description=LINK.sub(absolute, Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": HOME,
        "Documentation": f"{HOME}/blob/v{VERSION}/docs/README.md",
        "Changelog": f"{HOME}/blob/v{VERSION}/CHANGELOG.md",
    }
    if HOME
    else {},
)
