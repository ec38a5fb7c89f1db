"""Hugging Face plugin: the monitor as a `TrainerCallback`."""

from .monitor import MonitorCallback

__all__ = ["MonitorCallback"]
