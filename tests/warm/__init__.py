"""Commands without the seconds that imports take: each in a fork of one process that has imported torch and the stacks.

`PYTHON` stands for `sys.executable` where a test's command may find its packages imported; `WARM` is what a shell script's
environment needs for it. It takes `-m MODULE`, `-c CODE` or `FILE` and their arguments, has a working directory, environment,
output and exit code of its own, and is python itself for all else. A test of what imports do, of signals, or of a command that
starts processes, keeps `sys.executable`.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def _make(folder: str) -> None:
    """The programs, in a folder that the processes of one run of tests share. The first command starts the server."""
    os.environ |= {"WARM_FOLDER": folder, "WARM_SERVER": str(HERE / "server.py"), "WARM_OWNER": str(os.getpid())}
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    programs = {"python": f"#!{sys.executable} -IS\n{(HERE / 'client.py').read_text()}"}
    for name in ("train", "preprocess", "generate", "eval-lm"):
        programs[f"fairseq-{name}"] = f'#!/bin/sh\nexec {folder}/python -m fairseq_cli.{name.replace("-", "_")} "$@"\n'
    for name, text in programs.items():
        (Path(folder) / name).write_text(text)
        (Path(folder) / name).chmod(0o755)


if "WARM_FOLDER" not in os.environ:
    _make(tempfile.mkdtemp(prefix="warm-"))
PYTHON = os.environ["WARM_FOLDER"] + "/python"
WARM = {
    "PATH": f"{os.environ['WARM_FOLDER']}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    "STABLE_VENV": "none",  # else the recipes put .venv before it
}
