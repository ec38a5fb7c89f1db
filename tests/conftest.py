"""What tests leave behind in their process, undone: any others may follow in it."""

import importlib

import pytest
import torch

import tests.warm  # noqa: F401  before the processes of a run, which share its folder
from stable_core import registry


@pytest.fixture(autouse=True)
def classes_that_may_be_loaded():
    """timm and accelerate, when they load a checkpoint, take what others added off torch.load's list: fairseq's classes."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.add_safe_globals(before)


@pytest.fixture
def my_methods(monkeypatch):
    """A user's module of methods, registered until the test ends."""
    for slot, there in registry._METHODS.items():
        monkeypatch.setitem(registry._METHODS, slot, dict(there))
    return importlib.reload(importlib.import_module("tests.my_methods"))
