"""One task of comparing: whether two guests' views show the same bytes.

For each extent that both sides agree on, the cheapest way is taken. Nothing is read when both sides
use the same bytes of the same file, or both are zeros. When one side is zeros, only the other is
read. Else both are mapped, window by window, and compared at the speed of memory. Differences are
narrowed down to sectors.

An unreadable sector ends a process that reads it through a mapping. So only workers map files; the
parent reads, and an error has a name. A side that is shorter reads as zeros behind its end.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from bitarray import bitarray

from addcow_mp.device.extent import Extent, ExtentKind, joined
from addcow_mp.device.files import File
from addcow_mp.device.layer import Layer
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import SECTOR, KiB, MiB, round_down

#: Bytes of each side that are mapped at a time: bounds the resident memory.
WINDOW = 16 * MiB

#: Bytes compared at once where a window differs, before single sectors are compared.
FINE = 64 * KiB

#: Differing extents that one task reports; after them it only reports that there are more.
MOST = 1000


@dataclass(frozen=True)
class Differences:
    """The differing bytes of one task, as runs; not ``complete`` if there were too many."""

    runs: tuple[Run, ...] = ()
    complete: bool = True


class Comparison:
    """Compares two views, task by task. Picklable to a worker, which maps the files.

    ``first_only``: one difference per task is enough.
    """

    def __init__(self, one: Layer, other: Layer, geometry: Geometry, *, first_only: bool) -> None:
        self.sides = (one, other)
        self.geometry = geometry
        self.first_only = first_only
        self._files = [list(side.files()) for side in self.sides]
        self._window = reading

    def __reduce__(self) -> tuple[object, ...]:
        parts = (*self.sides, self.geometry)
        return (partial(Comparison, first_only=self.first_only), parts, {"_window": mapped})

    def __call__(self, task: Task, worker: WorkerContext) -> Differences:
        """The differences within ``task``, which is in units of the geometry's clusters."""
        start, stop = self.geometry.span(task.first, task.stop)
        found: list[Run] = []
        for run in merged(self._differences(start, stop, worker)):
            if len(found) == (1 if self.first_only else MOST):
                return Differences(tuple(found), complete=False)
            found.append(run)
        return Differences(tuple(found))

    def _differences(self, start: int, stop: int, worker: WorkerContext) -> Iterator[Run]:
        for one, other in overlapping(*(_padded(side, start, stop) for side in self.sides)):
            worker.check(self.sides[0].path)
            if not self._equal_unread(one, other):
                for first in range(one.start, one.stop, WINDOW):
                    yield from self._compared(one, other, first, min(first + WINDOW, one.stop))

    def _equal_unread(self, one: Extent, other: Extent) -> bool:
        """Whether both are zeros, or the same bytes of the same file."""
        if not (one.data and other.data):
            return not one.data and not other.data
        here, there = self._files[0][one.depth], self._files[1][other.depth]
        return here.identity == there.identity

    def _compared(self, one: Extent, other: Extent, start: int, stop: int) -> Iterator[Run]:
        views = [
            self._window(files[extent.depth], start, stop) if extent.data else None
            for extent, files in zip((one, other), self._files, strict=True)
        ]
        for first, last in _narrowed(views[0], views[1], stop - start):
            yield start + first, start + last


def _padded(side: Layer, start: int, stop: int) -> Iterator[Extent]:
    """The extents of ``[start, stop)``; behind the end of ``side`` they are absent."""
    held = max(start, min(stop, side.size))
    if start < held:
        yield from joined(side.walk(start, held))
    if held < stop:
        yield Extent(held, stop, 0, ExtentKind.ABSENT)


def overlapping(
    ones: Iterator[Extent], others: Iterator[Extent]
) -> Iterator[tuple[Extent, Extent]]:
    """Two lists of extents over the same range, cut so that both have the same borders."""
    one, other = next(ones, None), next(others, None)
    while one is not None and other is not None:
        stop = min(one.stop, other.stop)
        yield one._replace(stop=stop), other._replace(stop=stop)
        one = one._replace(start=stop) if stop < one.stop else next(ones, None)
        other = other._replace(start=stop) if stop < other.stop else next(others, None)


def mapped(file: File, start: int, stop: int) -> memoryview:
    """The bytes ``[start, stop)`` of ``file``, mapped, or read where they cannot be mapped."""
    base = round_down(start, mmap.ALLOCATIONGRANULARITY)
    try:
        window = mmap.mmap(
            file.fd, stop - base, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=base
        )
    except (OSError, ValueError):
        # A file system without mappings, or a file that was cut short: reading tells which.
        return reading(file, start, stop)
    with file.doing(f"map {stop - start} bytes at {start}"):
        window.madvise(mmap.MADV_SEQUENTIAL)
    return memoryview(window)[start - base :]


def reading(file: File, start: int, stop: int) -> memoryview:
    """The bytes ``[start, stop)`` of ``file``, read into memory."""
    view = memoryview(bytearray(stop - start))
    file.read_into(view, start)
    return view


def _narrowed(one: memoryview | None, other: memoryview | None, length: int) -> Iterator[Run]:
    """The differing sectors of two views of ``length`` bytes; None stands for zeros."""
    if _same(one, other, 0, length):
        return
    for start in range(0, length, FINE):
        stop = min(start + FINE, length)
        if not _same(one, other, start, stop):
            for first in range(start, stop, SECTOR):
                last = min(first + SECTOR, stop)
                if not _same(one, other, first, last):
                    yield first, last


def _same(one: memoryview | None, other: memoryview | None, start: int, stop: int) -> bool:
    """Whether two views are equal in ``[start, stop)``; compared at the speed of memcmp."""
    if one is None or other is None:
        view = other if one is None else one
        return view is None or not bitarray(buffer=view[start:stop]).any()
    return bool(bitarray(buffer=one[start:stop]) == bitarray(buffer=other[start:stop]))
