"""Requests in flight: those that touch the same cluster wait for one another.

A write that makes a cluster local first copies up the rest of it. Two such writes
to one cluster, side by side, would each copy up over the other's bytes; writes to
different clusters have nothing to do with each other and run at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class RangeLock:
    """The cluster ranges that writers hold, for the threads of one process."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, first: int, stop: int) -> Iterator[None]:
        """Hold the clusters ``[first, stop)`` alone for the length of the block."""
        mine = (first, stop)
        with self._changed:
            while any(first < other[1] and other[0] < stop for other in self._held):
                self._changed.wait()
            self._held.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(mine)
                self._changed.notify_all()
