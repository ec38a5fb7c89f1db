"""Instruments for transformers in training: a monitor of attention entropy with an alarm, QK-clip, sharpness, temperature."""

from stable_core import __version__ as __version__

from .alarm import Alarm, AlarmConfig, EntropyCollapse, lower_learning_rate, stop_training
from .monitor import Monitor
from .qk_clip import QKClip
from .rescue import Rescue, Rescued, rescue
from .resume import prepare_to_resume
from .sensitivity import learning_rate_sensitivity
from .sharpness import adamw_stability_threshold, sharpness
from .temperature import attention_temperature
from .verification import Verification, verify
from .writers import TensorBoardWriter, WandbWriter, headline

__all__ = [
    "Alarm",
    "AlarmConfig",
    "EntropyCollapse",
    "Monitor",
    "QKClip",
    "Rescue",
    "Rescued",
    "TensorBoardWriter",
    "Verification",
    "WandbWriter",
    "adamw_stability_threshold",
    "attention_temperature",
    "headline",
    "learning_rate_sensitivity",
    "lower_learning_rate",
    "prepare_to_resume",
    "rescue",
    "sharpness",
    "stop_training",
    "verify",
]
