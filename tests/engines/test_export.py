"""torch.export of the folded model: written to a file and read again, it gives the unfolded model's logits."""

import pytest
import torch

from tests.engines.exported import example, folded
from tests.engines.models import KINDS, logits

STRICT = ("sigma_vit", "stable_gpt")  # by dynamo, as test_compile.py has all


@pytest.mark.parametrize("kind, strict", [*((kind, False) for kind in KINDS), *((kind, True) for kind in STRICT)])
def test_other_sizes_than_the_example(kind, strict, tmp_path):
    model, expected = folded(kind)
    args, kwargs, dynamic = example(kind)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for inputs, truth in expected:
        torch.testing.assert_close(logits(kind, loaded, inputs), truth, rtol=1e-4, atol=1e-4)
