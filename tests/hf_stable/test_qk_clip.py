"""QK-clip under transformers' Trainer."""

import pytest

from hf_stable import MonitorCallback, QKClipCallback
from stable_monitor.records import read

from .test_monitor import train


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


def test_what_a_callback_cannot_see_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile = True hides the model from QK-clip"):
        train(tmp_path, QKClipCallback(), torch_compile=True)
    with pytest.raises(ValueError, match="threshold = 0"):
        train(tmp_path, QKClipCallback(0))
