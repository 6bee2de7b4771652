"""A raw file as a layer: all of its bytes, then zeros up to a whole sector.

This holds for a backing file and for a raw file by itself. The image file of an overlay ends
earlier: with its last whole sector, which is the overlay's virtual size. So :class:`RawLayer`
is told how many bytes of its file it holds. No way to copy reads behind these: they end the
last piece of data, and what is left of the sector is a piece of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

from addcow_mp.device.extent import Extent, ExtentKind
from addcow_mp.device.files import File, ended_early
from addcow_mp.format.geometry import raw_size


class RawLayer:
    """A raw file, open. ``held``: the bytes of it that are part of the disk, by default all."""

    def __init__(self, file: File, held: int | None = None) -> None:
        self.file = file
        self.held = file.length if held is None else held
        self.size = raw_size(self.held)

    @property
    def path(self) -> str:
        """The file's path."""
        return self.file.path

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on, with zeros behind the last byte."""
        length = max(0, min(len(view), self.held - offset))
        if length < len(view):
            view[length:] = bytes(len(view) - length)
            view = view[:length]
        if length:
            self.file.read_into(view, offset)

    def walk(self, start: int, stop: int, depth: int = 0) -> Iterator[Extent]:
        """Data and holes of ``[start, stop)``; behind the last byte there is no data."""
        held = max(start, min(stop, self.held))
        for first, last in self.file.data_runs(start, held):
            if start < first:
                yield self._hole(start, first, depth)
            yield Extent(first, last, depth, ExtentKind.DATA)
            start = last
        if start < held:
            yield self._hole(start, held, depth)
        if held < stop:
            yield Extent(held, stop, depth, ExtentKind.ZERO)

    def _hole(self, start: int, stop: int, depth: int) -> Extent:
        """A hole, unless the file has ended there meanwhile: then nothing is known of it."""
        if self.file.length < stop:
            with self.file.doing(f"look at {start}"):
                raise ended_early()
        return Extent(start, stop, depth, ExtentKind.ZERO)

    def grow(self, size: int) -> None:
        """Lengthen the file to ``size`` bytes with zeros behind all that it holds."""
        if self.held < size:
            self.file.grow(size)
            self.held, self.size = size, raw_size(size)

    def files(self) -> Iterator[File]:
        """The file itself."""
        yield self.file

    def warnings(self) -> list[str]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    abandon = close
