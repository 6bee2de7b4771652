"""A raw file as a layer: all of its bytes, then zeros up to a whole sector.

This holds for a backing file and for a raw file alone. The image file of an overlay ends earlier,
with its last whole sector, which is the overlay's virtual size: ``held`` tells :class:`RawLayer`
how many bytes of the file are part of the disk. No data extent reaches behind them; the rest of the
sector is an extent of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

from addcow_mp.device.extent import Extent, ExtentKind
from addcow_mp.device.files import File, ended_early
from addcow_mp.format.geometry import raw_size


class RawLayer:
    """An open raw file; the first ``held`` bytes, by default all, are part of the disk."""

    def __init__(self, file: File, held: int | None = None) -> None:
        self.file = file
        self.path = file.path
        self.held = file.length if held is None else held
        self.size = raw_size(self.held)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on, with zeros behind the last byte."""
        held = self.held - offset
        if held < len(view):
            held = max(0, held)
            view[held:] = bytes(len(view) - held)
            view = view[:held]
        if view:
            self.file.read_into(view, offset)

    def walk(self, start: int, stop: int, depth: int = 0) -> Iterator[Extent]:
        """Data and holes of ``[start, stop)``; zeros behind the last byte."""
        held = max(start, min(stop, self.held))
        for first, last in self.file.data_runs(start, held):
            if start < first:
                yield Extent(start, first, depth, ExtentKind.ZERO)
            yield Extent(first, last, depth, ExtentKind.DATA)
            start = last
        if start < held:
            self._refuse_shrunk(start, held)
            yield Extent(start, held, depth, ExtentKind.ZERO)
        if held < stop:
            yield Extent(held, stop, depth, ExtentKind.ZERO)

    def _refuse_shrunk(self, start: int, stop: int) -> None:
        """Raise :class:`FileError` if the file has become too short to have a hole there."""
        if self.file.length < stop:
            with self.file.doing(f"look at {start}"):
                raise ended_early()

    def grow(self, size: int) -> None:
        """Lengthen the file to ``size`` bytes with zeros."""
        if self.held < size:
            self.file.grow(size)
            self.held, self.size = size, raw_size(size)

    def files(self) -> Iterator[File]:
        """The file itself."""
        yield self.file

    def warnings(self) -> list[str]:
        """None: a raw file has no rules to break."""
        return []

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    abandon = close
