"""Tracks which clusters are finished and what was moved: bitmaps and counters in shared memory.

There is one bitmap for each layer whose bits the job publishes, and one set of counters for each
process. Each byte of a bitmap belongs to one task and each counter to one process, so nothing is
locked. A process marks clusters after it has written their data, so the marks of a worker process
that died are valid. It counts bytes after it has marked them.

The parent also stores how much is published. The memory is sparse: it costs what is marked, not the
size of the image. Bitmaps are mapped one window at a time, as those of images are.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from addcow_mp.device.copying import CopyMethod
from addcow_mp.errors import ResourceError
from addcow_mp.format.bits import BITS_PER_BYTE, MappedBits
from addcow_mp.units import MiB, round_up

#: The layers of a map: the overlay whose clusters move, and a backing file that receives them.
TOP, BELOW = 0, 1

#: Counters of each process. They fill processor cache lines, so that processes do not slow each
#: other down.
COUNTERS = 16
_SLOT = 8 * COUNTERS

#: The number of the counter of bytes that stay where they are.
_PASSED = COUNTERS - 1

#: The most bytes that are moved and not yet published: the work that a crash repeats.
MOST_UNPUBLISHED = 512 * MiB


class DoneMap:
    """Marks and counters of one job. Picklable to a process that is starting.

    ``layers``: the clusters of each bitmap. ``slots``: the processes that count. The memory has no
    name in a file system: the kernel frees it with the last process, however that ends.
    """

    def __init__(self, layers: tuple[int, ...], slots: int, fd: int) -> None:
        self._layout = (layers, slots)
        self._fd = fd
        # Behind the counters of all processes stands how many bytes are published.
        self._counters = memoryview(mmap.mmap(fd, _page((slots + 1) * _SLOT))).cast("Q")
        self._end = slots * COUNTERS
        starts = _starts(layers, slots)
        self._marks = [
            MappedBits(fd, start, clusters, "the done map", writable=True)
            for start, clusters in zip(starts, layers, strict=False)
        ]

    @classmethod
    def create(cls, layers: tuple[int, ...], workers: int) -> DoneMap:
        """Create a map with counters for each worker process and for this process."""
        try:
            fd = os.memfd_create("addcow-done-map")
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

        return (_received, (*self._layout, DupFd(self._fd)))

    def marks(self, layer: int) -> MappedBits:
        """Return the bitmap of finished clusters of ``layer``."""
        return self._marks[layer]

    def add(self, slot: int, amounts: Sequence[int]) -> None:
        """Add ``amounts`` to the counters of a process; the first one counts bytes moved."""
        base = slot * COUNTERS
        for number, amount in enumerate(amounts):
            self._counters[base + number] += amount

    def add_passed(self, slot: int, amount: int) -> None:
        """Add bytes that a process has looked at and that stay where they are."""
        self._counters[slot * COUNTERS + _PASSED] += amount

    @property
    def passed(self) -> int:
        """The bytes that all processes have looked at and not moved."""
        return sum(self._counters[_PASSED : self._end : COUNTERS])

    @property
    def total(self) -> int:
        """The bytes that all processes have moved so far."""
        return sum(self._counters[: self._end : COUNTERS])

    @property
    def totals(self) -> tuple[int, ...]:
        """The sum of each counter over all processes."""
        counters = self._counters[: self._end]
        if self._end == COUNTERS:  # one process
            return tuple(counters)
        return tuple(sum(counters[number::COUNTERS]) for number in range(COUNTERS))

    @property
    def unpublished(self) -> int:
        """The bytes that no finished checkpoint covers."""
        return self.total - self._counters[self._end]

    def publish(self, total: int) -> None:
        """Store that the first ``total`` bytes that were moved are published."""
        self._counters[self._end] = total

    def close(self) -> None:
        """Release the shared memory."""
        self._marks.clear()
        self._counters.release()
        os.close(self._fd)


@dataclass(frozen=True)
class Totals:
    """Bytes and clusters that were moved, and that were made zero instead.

    ``ways``: the bytes that were moved by each :class:`CopyMethod`, in its order.
    """

    bytes_moved: int = 0
    clusters_moved: int = 0
    bytes_zeroed: int = 0
    clusters_zeroed: int = 0
    ways: tuple[int, ...] = (0,) * len(CopyMethod)

    def __add__(self, other: Totals) -> Totals:
        ways = tuple(map(sum, zip(self.ways, other.ways, strict=True)))
        return Totals(
            self.bytes_moved + other.bytes_moved,
            self.clusters_moved + other.clusters_moved,
            self.bytes_zeroed + other.bytes_zeroed,
            self.clusters_zeroed + other.clusters_zeroed,
            ways,
        )

    @classmethod
    def on(cls, done_map: DoneMap) -> Totals:
        """Return what all processes have counted on ``done_map``, unfinished tasks included."""
        moved, clusters, zeroed, clusters_zeroed, *ways = done_map.totals
        return cls(moved, clusters, zeroed, clusters_zeroed, tuple(ways[: len(CopyMethod)]))


def _page(length: int) -> int:
    return round_up(length, mmap.ALLOCATIONGRANULARITY)


def _starts(layers: tuple[int, ...], slots: int) -> list[int]:
    """Return where each layer's bitmap begins in the memory, and where the last one ends."""
    starts = [_page((slots + 1) * _SLOT)]
    for clusters in layers:
        starts.append(starts[-1] + _page(-(-clusters // BITS_PER_BYTE)))
    return starts


def _received(layers: tuple[int, ...], slots: int, duplicate: Any) -> DoneMap:
    return DoneMap(layers, slots, duplicate.detach())
