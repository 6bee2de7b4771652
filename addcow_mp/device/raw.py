"""A raw file as a layer: its bytes are the disk, in whole sectors.

Bytes after the last whole sector belong to nobody's view and are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from addcow_mp.device.files import File, ended_early
from addcow_mp.device.layer import Kind, Layer, Piece
from addcow_mp.format.geometry import virtual_size
from addcow_mp.units import SECTOR, round_up


class RawLayer:
    """A raw file, open."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.size = virtual_size(file.length)

    @property
    def path(self) -> str:
        """The file's path."""
        return self.file.path

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on."""
        self.file.read_into(view, offset)

    def pieces(self, start: int, stop: int, depth: int = 0) -> Iterator[Piece]:
        """Data and holes of ``[start, stop)``."""
        for first, last in self.file.data_runs(start, stop):
            if start < first:
                yield self._hole(start, first, depth)
            yield Piece(first, last, depth, Kind.DATA)
            start = last
        if start < stop:
            yield self._hole(start, stop, depth)

    def _hole(self, start: int, stop: int, depth: int) -> Piece:
        """A hole, unless the file has ended there meanwhile: then nothing is known of it."""
        if self.file.length < stop:
            with self.file.doing(f"look at {start}"):
                raise ended_early()
        return Piece(start, stop, depth, Kind.ZERO)

    def files(self) -> Iterator[File]:
        """The file itself."""
        yield self.file

    def warnings(self) -> list[str]:
        """Nothing: bytes after the last whole sector are nobody's in a chain."""
        return []

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    abandon = close


class WholeRaw(RawLayer):
    """A raw file by itself, in no chain: what it has of a last sector is shown, zeros behind it.

    This is how qemu-img looks at a raw file. In a chain the format cuts such bytes off.
    """

    def __init__(self, file: File) -> None:
        super().__init__(file)
        self._held = file.length
        self.size = round_up(self._held, SECTOR)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on, with zeros behind the end of the file."""
        held = max(0, min(len(view), self._held - offset))
        super().read_into(view[:held], offset)
        view[held:] = bytes(len(view) - held)

    def pieces(self, start: int, stop: int, depth: int = 0) -> Iterator[Piece]:
        """Data and holes of ``[start, stop)``, and nothing behind the end of the file."""
        held = max(start, min(stop, self._held))
        yield from super().pieces(start, held, depth)
        if held < stop:
            yield Piece(held, stop, depth, Kind.ABSENT)


def cut_off(layer: Layer) -> list[str]:
    """What is said of a raw file that was copied, and does not end with a whole sector."""
    rest = layer.file.length - layer.size if isinstance(layer, RawLayer) else 0
    told = f"{layer.path}: its last {rest} bytes are no whole sector and were not copied"
    return [told] if rest else []
