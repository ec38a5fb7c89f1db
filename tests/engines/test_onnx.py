"""ONNX of the folded model: onnxruntime gives the unfolded model's logits."""

import onnx
import onnxruntime
import pytest
import torch

from tests.engines.exported import example, folded


# What it begins with, torch.export, has all kinds.
@pytest.mark.parametrize(
    "kind", ["sigma_vit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("stable_gpt", "gpt2"))]
)
def test_other_sizes_than_the_example(kind, tmp_path):
    model, expected = folded(kind)
    args, kwargs, dynamic = example(kind)
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamic_shapes=dynamic, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for inputs, truth in expected:
        given = {slot.name: inputs.numpy() for slot in session.get_inputs()}
        found = torch.from_numpy(session.run(None, given)[0])
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
