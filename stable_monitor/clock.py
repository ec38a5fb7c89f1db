"""The time between records: how fast training goes, and what part of it the monitor takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Clock:
    """Measures the monitor's own work, and the time from one record to the next, on the host.

    Work that is queued on a GPU and not waited for is not in it; waiting for a record's numbers is, and with it whatever the
    training had queued before them. Nor is what Python spends on calling the monitor's hooks."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since: float | None = None  # when the work began that is going on
        self._last: tuple[int, float] | None = None  # updates and time of the last record

    @contextmanager
    def working(self) -> Iterator[None]:
        """A context of the monitor's own work; one inside another counts once."""
        if self._since is not None:
            yield
            return
        self._since = perf_counter()
        try:
            yield
        finally:
            self._spent += perf_counter() - self._since
            self._since = None

    def lap(self, updates: int) -> dict[str, float | None]:
        """Ends the time of a record, inside `working`: updates a second since the last one, and the monitor's part of the time.

        That is what it has worked since then: on this record, and on writing the last one. None for the first."""
        now, since = perf_counter(), self._since
        spent = self._spent + (now - since if since is not None else 0.0)
        self._spent, self._since = 0.0, now if since is not None else None
        last, self._last = self._last, (updates, now)
        if last is None:
            return {"updates_per_second": None, "overhead": None}
        return {"updates_per_second": (updates - last[0]) / (now - last[1]), "overhead": spent / (now - last[1])}
