"""Lock of cluster ranges: writes to the same cluster run one after the other.

A write that allocates a cluster first copies up the rest of it. Two such writes to one cluster at
the same time would copy up over each other's bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class RangeLock:
    """The cluster ranges that are being written, for the threads of one process."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, first: int, stop: int) -> Iterator[None]:
        """Hold the clusters ``[first, stop)`` during the block."""
        own = (first, stop)
        with self._changed:
            while any(first < other[1] and other[0] < stop for other in self._held):
                self._changed.wait()
            self._held.append(own)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(own)
                self._changed.notify_all()
