"""QK-clip under transformers' Trainer."""

import pytest
import torch

from hf_stable import MonitorCallback, QKClipCallback
from stable_monitor.records import read

from .collapsing import without_dropout
from .test_monitor import COMPILED, train


def largest(folder) -> list[float]:
    return [
        max(max(layer["max_logit"]) for layer in record["layers"].values()) for record in read(folder / "monitor.jsonl")
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logits_stay_under_the_threshold(tmp_path, accumulation):
    settings = {"learning_rate": 1e-7, "gradient_accumulation_steps": accumulation}
    train(tmp_path / "free", MonitorCallback(1), **settings)
    train(tmp_path / "clipped", MonitorCallback(1), QKClipCallback(1e-3), **settings)
    free, clipped = largest(tmp_path / "free"), largest(tmp_path / "clipped")
    assert free[0] == clipped[0] and min(free) > 1e-2  # the first update's were seen before anything was clipped
    assert all(5e-4 < logit < 2e-3 for logit in clipped[1:])


def test_a_compiled_model_is_clipped_as_the_plain_one(tmp_path):
    settings = {"steps": 2, "learning_rate": 1e-7, "prepare": without_dropout}
    plain = train(tmp_path, QKClipCallback(1e-3), **settings)
    compiled = train(tmp_path, QKClipCallback(1e-3), **settings, **COMPILED)
    free = train(tmp_path, **settings)
    for name, W in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], W, rtol=1e-4, atol=1e-6)
    weights = (trainer.model.transformer.h[0].attn.c_attn.weight for trainer in (plain, free))
    assert not torch.allclose(*weights, rtol=1e-2)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="threshold = 0"):
        train(tmp_path, QKClipCallback(0))
