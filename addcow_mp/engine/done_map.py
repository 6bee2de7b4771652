"""The job's board: shared memory in which workers write what they have finished.

It holds one bitmap for every layer whose bits the job will publish, counters for each worker,
and two words of the parent: that the job shall stop, and how much of it is published. Each
byte of a bitmap belongs to one task and each counter to one worker, so nothing is ever locked;
of these the parent only reads. A mark is made when the data it speaks of has been written, so
marks of a worker that died are as good as any. What is counted was marked before.

The memory is sparse: it costs what is marked, not what the image could hold. Bitmaps are
mapped a window at a time, like those of images.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

from addcow_mp.errors import ResourceError
from addcow_mp.format.bits import BITS_PER_BYTE, MappedBits
from addcow_mp.units import MiB, round_up

#: Counters of each worker. They fill a processor cache line, so that workers do not slow each
#: other.
COUNTERS = 8
_SLOT = 8 * COUNTERS

#: No more bytes than this are moved and not yet published: what a crash costs in repeated work.
MOST_UNPUBLISHED = 512 * MiB


class DoneMap:
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
        self._published = self._memory[self._stop + 8 : self._stop + 16].cast("Q")
        starts = _starts(layers, slots)
        self._marks = [
            MappedBits(fd, start, clusters, "the board", writable=True)
            for start, clusters in zip(starts, layers, strict=False)
        ]

    @classmethod
    def create(cls, layers: tuple[int, ...], workers: int) -> DoneMap:
        """A new board, with a counter for each worker and one for this process."""
        try:
            fd = os.memfd_create("addcow-board")
            try:
                os.ftruncate(fd, _starts(layers, workers + 1)[-1])
                return cls(layers, workers + 1, fd)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise ResourceError.of("get memory to share with other processes", error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return (_attached, (*self._layout, DupFd(self._fd)))

    def marks(self, layer: int) -> MappedBits:
        """The bitmap of finished clusters of ``layer``."""
        return self._marks[layer]

    def count(self, slot: int, totals: int) -> None:
        """Add ``totals`` bytes to what the worker in ``slot`` has moved."""
        self._counters[slot * COUNTERS] += totals

    def add(self, slot: int, amounts: Sequence[int]) -> None:
        """Add to all counters of the worker in ``slot``; the first one counts bytes moved."""
        base = slot * COUNTERS
        for number, totals in enumerate(amounts):
            self._counters[base + number] += totals

    @property
    def total(self) -> int:
        """Bytes that all workers have moved so far."""
        return sum(self._counters[::COUNTERS])

    @property
    def totals(self) -> tuple[int, ...]:
        """The sum of each counter over all workers."""
        return tuple(sum(self._counters[number::COUNTERS]) for number in range(COUNTERS))

    @property
    def unpublished(self) -> int:
        """Bytes that were moved after the last checkpoint that has ended began."""
        return self.total - self._published[0]

    def publish(self, total: int) -> None:
        """Say that of the bytes that were moved the first ``total`` are published."""
        self._published[0] = total

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
        self._published.release()
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


def _attached(layers: tuple[int, ...], slots: int, duplicate: Any) -> DoneMap:
    return DoneMap(layers, slots, duplicate.detach())
