"""Compares two views: finds the bytes that their guests see differently.

The views are compared extent by extent. Nothing is read when both sides use the same bytes of the
same file, share their blocks on the disk, or are zeros. When one side is zeros, only the other is
read. Otherwise both are mapped, window by window, and compared at the speed of memory. Differences
are reported in the unit of the caller: sectors or clusters.

A process that touches an unreadable sector in a mapping dies. So only workers map files, and they
populate the pages first. If that fails, the bytes are read without a mapping, and the error names
the file. A shorter side reads as zeros behind its end.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bitarray import bitarray

from addcow_mp.device.extent import Extent, ExtentKind, joined
from addcow_mp.device.files import BUFFER_SIZE, File, new_buffer
from addcow_mp.device.layer import Layer
from addcow_mp.device.shared_blocks import unshared_runs
from addcow_mp.device.syscalls import populate
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import SECTOR, KiB, MiB, round_down, round_up

#: Bytes of each side that are mapped at a time: bounds the resident memory.
WINDOW = 16 * MiB

#: Bytes compared at once where a window differs, before single sectors are compared.
FINE = 64 * KiB

#: Where a window differs, parts of these sizes are compared, each within a differing larger one.
SECTORS = (FINE, SECTOR)

#: The most differing extents that one task reports; then it reports only that there are more.
MOST = 1000


@dataclass(frozen=True)
class Differences:
    """The differing bytes of one task, as runs ``[start, stop)``.

    Not ``complete``: the task has more differences.
    """

    runs: tuple[Run, ...] = ()
    complete: bool = True


class Comparison:
    """Compares two views, task by task. Picklable to a worker, which maps the files.

    ``first_only``: only the first difference of each task is reported.
    """

    def __init__(
        self,
        one: Layer,
        other: Layer,
        geometry: Geometry,
        *,
        first_only: bool,
        maps: bool = False,
    ) -> None:
        self.sides = (one, other)
        self.geometry = geometry
        self.first_only = first_only
        self._views = Views(one, other, maps=maps)

    def __reduce__(self) -> tuple[object, ...]:
        in_worker = partial(Comparison, first_only=self.first_only, maps=True)
        return (in_worker, (*self.sides, self.geometry))

    def __call__(self, task: Task, worker: WorkerContext) -> Differences:
        """The differences within ``task``, which is in units of the geometry's clusters."""
        start, stop = self.geometry.span(task.first, task.stop)
        found: list[Run] = []
        check = partial(worker.check, self.sides[0].path)
        for run in merged(self._views.differing(start, stop, SECTORS, check)):
            if len(found) == (1 if self.first_only else MOST):
                return Differences(tuple(found), complete=False)
            found.append(run)
        return Differences(tuple(found))


class Views:
    """Two views of the same range; None = zeros.

    ``shares``: blocks that two files share on the disk count as equal. The caller must hold locks
    on both files, so that no program writes them. ``maps``: files are mapped, not read.
    """

    def __init__(
        self, one: Layer | None, other: Layer | None, *, shares: bool = False, maps: bool = False
    ) -> None:
        self._sides = (one, other)
        self._shares = shares
        self._files = [[] if side is None else list(side.files()) for side in self._sides]
        self._windows: _Mapped | _Read = _Mapped() if maps else _Read()

    def differing(
        self, start: int, stop: int, parts: tuple[int, ...], check: Callable[[], None]
    ) -> Iterator[Run]:
        """The bytes of ``[start, stop)`` that differ, in order, in parts of the last size.

        ``parts``: sizes in bytes, each a multiple of the next; a part is compared in smaller parts
        only if it differs. ``check`` is called between two extents.
        """
        for one, other in overlapping(*(_padded(side, start, stop) for side in self._sides)):
            check()
            for first, last in self._to_read(one, other):
                for window in range(first, last, self._windows.size):
                    end = min(window + self._windows.size, last)
                    yield from self._compared(one, other, window, end, parts)

    def _to_read(self, one: Extent, other: Extent) -> Iterator[Run]:
        """The bytes of two extents that must be read: not both zeros, and not the same blocks."""
        if one.data and other.data:
            here, there = self._files[0][one.depth], self._files[1][other.depth]
            if here.identity == there.identity:
                return
            if self._shares:
                yield from unshared_runs(here, there, one.start, one.stop)
                return
        if one.data or other.data:
            yield one.start, one.stop

    def _compared(
        self, one: Extent, other: Extent, start: int, stop: int, parts: tuple[int, ...]
    ) -> Iterator[Run]:
        views = [
            self._windows.view(side, self._files[side][extent.depth], start, stop)
            if extent.data
            else None
            for side, extent in enumerate((one, other))
        ]
        yield from _Pair(views[0], views[1], start).differing(start, stop, parts)


def _padded(side: Layer | None, start: int, stop: int) -> Iterator[Extent]:
    """The extents of ``[start, stop)``; those behind the end of ``side`` are absent."""
    held = start if side is None else max(start, min(stop, side.size))
    if side is not None and start < held:
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


class _Mapped:
    """Maps windows of files, and reads what cannot be mapped."""

    size = WINDOW

    def __init__(self) -> None:
        self._reading = _Read()

    def view(self, side: int, file: File, start: int, stop: int) -> memoryview:
        """The bytes ``[start, stop)`` of the file on a side."""
        base = round_down(start, mmap.ALLOCATIONGRANULARITY)
        try:
            # The disk reads the next window while this one is compared.
            os.posix_fadvise(file.fd, start, 2 * WINDOW, os.POSIX_FADV_WILLNEED)
            window = mmap.mmap(
                file.fd, stop - base, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=base
            )
            window.madvise(mmap.MADV_SEQUENTIAL)
            populate(window)
        except (OSError, ValueError):
            # The file system has no mappings, the file was cut short, or a sector is bad: the error
            # of a read says which.
            return self._reading.view(side, file, start, stop)
        return memoryview(window)[start - base :]


class _Read:
    """Reads files into one buffer for each side. The next read of that side overwrites it."""

    size = BUFFER_SIZE

    def __init__(self) -> None:
        self._buffers = [memoryview(b""), memoryview(b"")]

    def view(self, side: int, file: File, start: int, stop: int) -> memoryview:
        """The bytes ``[start, stop)`` of the file on a side."""
        if len(self._buffers[side]) < stop - start:
            self._buffers[side] = new_buffer(stop - start)
        view = self._buffers[side][: stop - start]
        file.read_into(view, start)
        return view


@dataclass(frozen=True)
class _Pair:
    """The bytes of two files from ``base`` on, in memory; None stands for zeros."""

    one: memoryview | None
    other: memoryview | None
    base: int

    def differing(self, start: int, stop: int, parts: tuple[int, ...]) -> Iterator[Run]:
        """The differing parts of ``[start, stop)``; each begins at a multiple of its size."""
        if self._same(start - self.base, stop - self.base):
            return
        if not parts:
            yield start, stop
            return
        while start < stop:
            end = min(stop, round_up(start + 1, parts[0]))
            yield from self.differing(start, end, parts[1:])
            start = end

    def _same(self, start: int, stop: int) -> bool:
        """Whether both have the same bytes there; compared at the speed of memcmp."""
        if self.one is None or self.other is None:
            view = self.other if self.one is None else self.one
            return view is None or not bitarray(buffer=view[start:stop]).any()
        here, there = bitarray(buffer=self.one[start:stop]), bitarray(buffer=self.other[start:stop])
        return bool(here == there)
