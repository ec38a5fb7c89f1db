"""Where the tests of the Triton kernels run: on a GPU, else under Triton's interpreter in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
ROOT = Path(__file__).parents[2]

here = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETED, reason="runs in test_all_kernels_under_the_interpreter"
)


def in_process(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python with `command`."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
