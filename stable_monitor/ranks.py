"""Communication between the processes that have a monitor, which may be only some of all processes."""

import itertools
import pickle
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(seconds=30)  # how long to wait for other processes to construct their monitors
KEPT = 100  # number of decisions kept for slower processes

_joined = itertools.count()


class Ranks:
    """What the processes with a monitor tell each other, by the key-value store of the process group.

    Reading the store does not wait for processes without a monitor. A collective would hang if only some processes took part,
    so the monitor uses collectives only if `all_here()`.
    """

    def __init__(self) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        whole: Any = (
            dist.distributed_c10d._get_default_store()
        )  # torch's types for a store are not what it takes and has
        self._patience = min(PATIENCE, whole.timeout / 3)
        self._store: Any = dist.PrefixStore(f"stable_monitor/{next(_joined)}", whole)
        self._decisions = 0
        self._all_here: bool | None = None  # not asked yet
        self._main_here: bool | None = None
        self._store.add("here", 1)
        if self.rank == 0:
            self._store.set("main", "")

    def missing(self) -> int:
        """The number of processes that have no monitor yet."""
        return self.size - self._store.add("here", 0)

    def all_here(self) -> bool:
        """Whether all processes have a monitor. The answer of the first process that asks is kept, and used by all."""
        if self._all_here is None:
            deadline = time.monotonic() + self._patience.total_seconds()
            while (missing := self.missing()) and time.monotonic() < deadline:
                time.sleep(0.05)
            found = self._store.compare_set("company", "", "some" if missing else "all")
            self._all_here = found == b"all"
        return self._all_here

    def decided(self, mine: Any) -> Any:
        """Rank 0's value of `mine`, if it has a monitor, else one's own; the n-th calls of all ranks belong together."""
        key, old = (f"decision/{self._decisions - back}" for back in (0, KEPT))
        self._decisions += 1
        if self.rank == 0:
            self._store.set(key, pickle.dumps(mine))
            if self._decisions > KEPT:
                self._store.delete_key(old)
            return mine
        if self._main_here is None:
            try:
                self._store.wait(["main"], self._patience)
                self._main_here = True
            except RuntimeError:
                self._main_here = False
        return pickle.loads(self._store.get(key)) if self._main_here else mine
