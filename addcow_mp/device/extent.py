"""An extent: a range of the guest's view that one file, or no file, supplies.

Each file of a chain holds guest data at the guest's own offset, so an extent has only one offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple


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
        if last is not None and extent[2:] == last[2:] and extent.start == last.stop:
            last = last._replace(stop=extent.stop)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last
