"""Processes that have children end with them, however they are asked to end."""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def as_by_ctrl_c() -> Iterator[None]:
    """A context in which SIGTERM, the way of `kill`, `timeout` and schedulers, raises KeyboardInterrupt as Ctrl-C does.

    Without it Python ends at once, and its children go on without it. In other threads than the main one it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
