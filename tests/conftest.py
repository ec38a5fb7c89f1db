"""What tests leave behind in their process, undone: any others may follow in it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def classes_that_may_be_loaded():
    """timm and accelerate, when they load a checkpoint, take what others added off torch.load's list: fairseq's classes."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.add_safe_globals(before)
