"""An extent: a range of the guest's view that one file, or no file, supplies.

Each file of a chain holds guest data at the guest's own offset, so an extent has only one offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from itertools import chain, islice
from typing import NamedTuple

#: Extents between two ranges that are skipped: to begin a new walk takes about as long.
MOST_SKIPPED = 8


class ExtentKind(IntEnum):
    """What supplies an extent."""

    DATA = 0
    """Bytes in the file at its depth."""
    ZERO = 1
    """A hole in the file at its depth: it reads as zeros."""
    ABSENT = 2
    """No file of the chain: it reads as zeros."""


class Extent(NamedTuple):
    """The bytes ``[start, stop)`` of the guest's view; the properties are named as in qemu-img map.

    ``depth`` 0 is the image file, 1 the backing file, and so on. All numbers are bytes.
    """

    start: int
    stop: int
    depth: int
    kind: ExtentKind

    @property
    def length(self) -> int:
        """Bytes in the extent."""
        return self.stop - self.start

    @property
    def present(self) -> bool:
        """Whether a file of the chain supplies it."""
        return self.kind is not ExtentKind.ABSENT

    @property
    def data(self) -> bool:
        """Whether that file holds bytes there, and not a hole."""
        return self.kind is ExtentKind.DATA

    @property
    def zero(self) -> bool:
        """Whether it is known to read as zeros."""
        return not self.data

    @property
    def offset(self) -> int | None:
        """Its offset in the file at its depth; None if no file supplies it."""
        return self.start if self.present else None

    def __repr__(self) -> str:
        state = ("data" if self.data else "zero") if self.present else "absent"
        return f"Extent({self.start}, {self.length}, depth={self.depth}, {state})"


def joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join extents that touch and have the same depth and kind."""
    last: Extent | None = None
    for extent in extents:
        _, _, depth, kind = extent
        if last is not None and (last.depth, last.kind, last.stop) == (depth, kind, extent.start):
            last = last._replace(stop=extent.stop)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


class AscendingWalk:
    """The extents of ascending ranges up to ``end``, from as few calls of ``walk`` as possible.

    ``walk(start, stop)`` gives the extents of a range, in order and without gaps. Each call looks
    for data from its start on, so many short ranges are better served by one long walk. Where the
    walk has many extents between two ranges, a new one is begun.
    """

    def __init__(self, walk: Callable[[int, int], Iterator[Extent]], end: int) -> None:
        self._walk = walk
        self._end = end
        self._extents: Iterator[Extent] = iter(())
        self._current = Extent(0, 0, 0, ExtentKind.ABSENT)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """The extents of ``[start, stop)``, which does not begin before the last range ended."""
        if start >= stop:
            return
        current = self._current
        if not current.start <= start < current.stop:
            current = self._extent_at(start)
        while current.stop < stop:
            yield current if current.start >= start else current._replace(start=start)
            self._current = current = next(self._extents)
        yield Extent(max(current.start, start), stop, current.depth, current.kind)

    def _extent_at(self, start: int) -> Extent:
        """The extent that holds the byte ``start``."""
        for current in chain((self._current,), islice(self._extents, MOST_SKIPPED)):
            if current.stop > start:
                self._current = current
                return current
        self._extents = self._walk(start, self._end)
        self._current = next(self._extents)
        return self._current
