"""The tests of the Triton kernels on the CPU: all of them in one process, which has to be told so before it starts."""

import pytest

from tests.stable_core.interpreter import in_process

FILES = [f"tests/stable_core/test_kernels{which}.py" for which in ("", "_attention", "_training")]


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels(chosen):
    pytest.importorskip("triton")
    done = in_process("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, *FILES, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
