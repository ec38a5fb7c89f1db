"""What every recipe's command does to its process, undone."""

import logging

import pytest


@pytest.fixture(autouse=True)
def log_level():
    """A command quiets the monitor's warnings; here other tests come after it."""
    log = logging.getLogger("stable_monitor")
    before = log.level
    yield
    log.setLevel(before)
