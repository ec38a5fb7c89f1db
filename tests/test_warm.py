"""The python that finds its packages imported does what python does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from .warm import PYTHON

SHOW = "import os, sys; print(sys.argv, os.getcwd(), os.environ['GIVEN'], sys.stdin.read(), __name__)"


@pytest.mark.parametrize(
    "command",
    [
        ("-c", SHOW, "a", "-b"),
        ("-m", "shown", "a"),
        ("shown.py", "--a"),
        ("-c", "raise SystemExit('no')"),
        ("-c", "raise SystemExit(7)"),
        ("-c", "1 / 0"),
        ("-m", "nowhere"),
        ("-c", "import os; os.kill(os.getpid(), 15)"),
        ("-c", "import atexit, threading; atexit.register(print, 2); threading.Timer(0.1, print, [1]).start()"),
        ("-c", "import logging; logging.info('in'); logging.warning('out')"),
        ("-c", "import shown, torch; torch.ones(2, requires_grad=True).sum().backward(); print(shown.__file__)"),
        ("-W", "error", "-c", "import warnings; warnings.warn('told')"),
        ("-c", SHOW.replace("GIVEN", "MISSING")),
    ],
    ids=lambda command: " ".join(command)[:40],
)
def test_a_command_ends_as_python_ends_it(tmp_path, command):
    (tmp_path / "shown.py").write_text(SHOW.replace("sys.argv", "sys.argv[1:]"))
    environment = {**os.environ, "GIVEN": "é", "PYTHONPATH": str(tmp_path)}
    ours, theirs = (
        subprocess.run([python, *command], input="in", capture_output=True, text=True, cwd=tmp_path, env=environment)
        for python in (PYTHON, sys.executable)
    )
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    last = [done.stderr.strip().splitlines()[-1:] for done in (ours, theirs)]
    assert [line.split(": ")[-1] for line in last[0]] == [line.split(": ")[-1] for line in last[1]]


def test_a_command_ends_with_who_started_it(tmp_path):
    code = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(100)"
    client = subprocess.Popen([PYTHON, "-c", code], cwd=tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    client.send_signal(signal.SIGKILL)
    client.wait()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")
