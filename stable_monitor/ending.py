"""Processes that have children end with them, however they are asked to end."""

import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any


@contextmanager
def as_by_ctrl_c() -> Iterator[None]:
    """A context in which SIGTERM, the way of `kill`, `timeout` and schedulers, raises KeyboardInterrupt as Ctrl-C does.

    SIGHUP, that of a closed terminal, does too where it is not ignored, as under nohup. Without it Python ends at once, and its
    children go on without it. In other threads than the main one it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heard = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, interrupt) for each in heard}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Children:
    """Processes that threads of `workers` start and wait for; they end when that context does."""

    def __init__(self) -> None:
        self.ended = False
        self._running: list[subprocess.Popen[Any]] = []
        self._lock = threading.Lock()

    def start(self, command: Sequence[str], **settings: Any) -> subprocess.Popen[Any]:
        """The process, in a session of its own: Ctrl-C is for us, and what it starts ends with it.

        Raises:
            RuntimeError: the others were ended, and so would this one be.
        """
        with self._lock:  # none while `_end` ends those there are
            if self.ended:
                raise RuntimeError(f"{command[0]} is not started: the others were ended")
            process = subprocess.Popen(command, start_new_session=True, **settings)
            self._running = [other for other in self._running if other.returncode is None] + [process]
        return process

    @contextmanager
    def workers(self, number: int) -> Iterator[ThreadPoolExecutor]:
        """A pool of threads. An error in the context, Ctrl-C or SIGTERM ends the processes, and then the context."""
        try:
            with ThreadPoolExecutor(number) as pool, as_by_ctrl_c():
                try:
                    yield pool
                except BaseException:
                    try:
                        self._end()
                    finally:
                        pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            self.ended = False  # its threads are over

    def _end(self) -> None:
        with self._lock:
            self.ended = True
            for process in self._running:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)


class Claim:
    """A context in which a folder's file `running` is locked, and then for as long as a process lives that got `descriptor`.

    Raises:
        ValueError: such a process lives, as after `kill -9` of its parent.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "running"
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            group = self.path.read_text()
            end = f", or end it: kill -TERM -- -{group}" if group else ""
            raise ValueError(f"{folder}: a process that was started before is still training it; wait{end}") from None
        except OSError:
            pass  # some network file systems lock nothing

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.descriptor)

    def give_to(self, group: int) -> None:
        """Writes down which process group has it."""
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, str(group).encode())
