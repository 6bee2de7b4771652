"""The job's board: shared memory in which workers write what they have finished.

It holds one bitmap for every layer whose bits the job will publish, one counter of bytes
per worker, and the parent's word that the job shall stop. Each byte of a bitmap belongs to
one task and each counter to one worker, so nothing is ever locked; of these the parent only
reads. A mark is made when the data it speaks of has been written, so marks of a worker that
died are as good as any.

The memory is sparse: it costs what is marked, not what the image could hold. Bitmaps are
mapped a window at a time, like those of images.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Any

from addcow_mp.format.bits import BITS_PER_BYTE, MappedBits
from addcow_mp.units import round_up

#: One processor cache line per counter, so that workers do not slow each other.
_SLOT = 64


class Board:
    """Marks and counters of one job, for ``layers`` bitmaps of so many clusters each.

    Picklable to a process that is being started, which sees the same memory. It has no name
    in any file system: nothing is left of it when all processes have gone, however they went.
    """

    def __init__(self, layers: tuple[int, ...], slots: int, fd: int) -> None:
        self._layout = (layers, slots)
        self._fd = fd
        self._stop = slots * _SLOT
        self._memory = memoryview(mmap.mmap(fd, _page(self._stop + _SLOT)))
        self._counters = self._memory[: self._stop].cast("Q")
        starts = _starts(layers, slots)
        self._marks = [
            MappedBits(fd, start, clusters, "the board", writable=True)
            for start, clusters in zip(starts, layers, strict=False)
        ]

    @classmethod
    def create(cls, layers: tuple[int, ...], workers: int) -> Board:
        """A new board, with a counter for each worker and one for this process."""
        fd = os.memfd_create("addcow-board")
        os.ftruncate(fd, _starts(layers, workers + 1)[-1])
        return cls(layers, workers + 1, fd)

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return (_attached, (*self._layout, DupFd(self._fd)))

    def marks(self, layer: int) -> MappedBits:
        """The bitmap of finished clusters of ``layer``."""
        return self._marks[layer]

    def count(self, slot: int, amount: int) -> None:
        """Add ``amount`` bytes to the counter of the worker in ``slot``."""
        self._counters[slot * _SLOT // 8] += amount

    @property
    def total(self) -> int:
        """Bytes that all workers have moved so far."""
        return sum(self._counters)

    def stop(self) -> None:
        """Say to all workers that the job shall stop."""
        self._memory[self._stop] = 1

    @property
    def stopped(self) -> bool:
        """Whether the job shall stop."""
        return bool(self._memory[self._stop])

    def stops_by(self, stopping: Callable[[], bool]) -> bool:
        """Whether the job shall stop, here or since ``stopping()`` says so; all are told."""
        if stopping():
            self.stop()
        return self.stopped

    def close(self) -> None:
        """Give the memory back to the system."""
        self._marks.clear()
        self._counters.release()
        self._memory.release()
        os.close(self._fd)


def _page(length: int) -> int:
    return round_up(length, mmap.ALLOCATIONGRANULARITY)


def _starts(layers: tuple[int, ...], slots: int) -> list[int]:
    """Where in the memory each layer's bitmap begins, and where the last one ends."""
    starts = [_page((slots + 1) * _SLOT)]
    for clusters in layers:
        starts.append(starts[-1] + _page(-(-clusters // BITS_PER_BYTE)))
    return starts


def _attached(layers: tuple[int, ...], slots: int, duplicate: Any) -> Board:
    return Board(layers, slots, duplicate.detach())
