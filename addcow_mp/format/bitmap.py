"""The COW bitmap: one bit per cluster, least significant bit first.

The bitmap is a bitarray laid over the file, mapped read-only, without a copy: a
terabyte's bitmap costs the pages that are looked at. It is never stored through
the mapping (on a full disk that is a SIGBUS); :meth:`CowBitmap.publish` changes
it with pwrite, which the mapping sees at once. A file that ends inside its bitmap
reads as 0 there. Bits past the last cluster are ignored when reading and written 0.

:class:`SparseBits` is the other bitmap: bits that live in memory only, in pages
that exist once one of their bits is set.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable, Iterator

from bitarray import bitarray

from addcow_mp.errors import FileError
from addcow_mp.format.geometry import BITS_PER_BYTE, Geometry
from addcow_mp.units import KiB, MiB

#: What a disk and the page cache write at once, however little of it has changed.
PAGE = 4 * KiB

#: Clusters whose bits share one page of bitmap: the grain of sparse bitmaps.
PAGE_BITS = PAGE * BITS_PER_BYTE

#: Bytes of bitmap changed by one pwrite: bounds the memory of publishing.
PUBLISH_BYTES = 1 * MiB

Run = tuple[int, int]


def runs(bits: bitarray, value: int, start: int, stop: int) -> Iterator[Run]:
    """The runs ``[first, last)`` of bits equal to ``value`` within ``[start, stop)``."""
    find = bits.find
    while start < stop and (first := find(value, start, stop)) >= 0:
        start = find(1 - value, first, stop)
        if start < 0:
            start = stop
        yield first, start


def merged(parts: Iterable[Run]) -> Iterator[Run]:
    """Join runs that touch; ``parts`` must be in order."""
    pending: Run | None = None
    for first, stop in parts:
        if pending is not None and pending[1] >= first:
            pending = (pending[0], max(stop, pending[1]))
            continue
        if pending is not None:
            yield pending
        pending = (first, stop)
    if pending is not None:
        yield pending


def between(ones: Iterable[Run], start: int, stop: int) -> Iterator[Run]:
    """What ``ones``, in order, leave of ``[start, stop)``."""
    for first, last in ones:
        if start < first:
            yield start, first
        start = last
    if start < stop:
        yield start, stop


class CowBitmap:
    """The bitmap in an open ``.add-cow`` file.

    ``fd`` stays the caller's; ``offset`` is the header size. Bits are numbered by
    cluster, ranges are ``[start, stop)``.
    """

    def __init__(self, fd: int, offset: int, geometry: Geometry, path: str = "") -> None:
        #: What errors call the file.
        self.path = path
        self.offset = offset
        self.geometry = geometry
        self.clusters = geometry.clusters
        self._fd = fd
        length = max(0, self._end_of_file() - offset)
        #: Whether the file ends inside its bitmap.
        self.short = length < geometry.bitmap_length
        self._bits = self._map(min(length, geometry.bitmap_length))
        #: Clusters, from the first, whose bits are in the file.
        self.known = min(len(self._bits), self.clusters)

    def _map(self, length: int) -> bitarray:
        if length == 0:
            return bitarray(endian="little")
        window = mmap.mmap(self._fd, length, prot=mmap.PROT_READ, offset=self.offset)
        # The bitarray owns the window from here on: it is unmapped with it.
        return bitarray(buffer=window, endian="little")

    def runs(self, value: int, start: int, stop: int) -> Iterator[Run]:
        """The runs of clusters in ``[start, stop)`` whose bit is ``value``."""
        ones = merged(
            run for part in self.inhabited(start, stop) for run in runs(self._bits, 1, *part)
        )
        return ones if value else between(ones, start, stop)

    def any(self, start: int, stop: int) -> bool:
        """Whether some cluster in ``[start, stop)`` is local."""
        return next(self.runs(1, start, stop), None) is not None

    def all(self, start: int, stop: int) -> bool:
        """Whether every cluster in ``[start, stop)`` is local."""
        return next(self.runs(0, start, stop), None) is None

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """How many clusters in ``[start, stop)`` are local; costs what is set."""
        return sum(self._bits.count(1, *part) for part in self.inhabited(start, stop))

    def slice(self, start: int, stop: int) -> bitarray:
        """A private copy of the bits ``[start, stop)``, read from the file."""
        first, last = start // BITS_PER_BYTE, -(-stop // BITS_PER_BYTE)
        bits = bitarray(endian="little")
        bits.frombytes(
            os.pread(self._fd, last - first, self.offset + first).ljust(last - first, b"\0")
        )
        base = first * BITS_PER_BYTE
        return bits[start - base : stop - base]

    def stray(self) -> int:
        """How many bits past the last cluster are set."""
        parts = self._data(self.clusters, len(self._bits))
        return sum(self._bits.count(1, *part) for part in parts)

    def inhabited(self, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """The parts of ``[start, stop)`` that are not holes in the file, as runs of clusters.

        Outside these runs every bit is 0.
        """
        return self._data(start, self.known if stop is None else min(stop, self.known))

    def _data(self, start: int, stop: int) -> Iterator[Run]:
        """The bits in ``[start, stop)`` that are not in a hole.

        A hole is never looked at through the mapping: on a full tmpfs, which would have to
        give it a page, that is a SIGBUS.
        """
        position = self.offset + start // BITS_PER_BYTE
        end = self.offset + -(-stop // BITS_PER_BYTE)
        self._refuse_shrunk(end)
        while position < end and (data := self._seek(position, os.SEEK_DATA, end)) < end:
            position = self._seek(data, os.SEEK_HOLE, end)
            yield max(start, self._clusters_at(data)), min(self._clusters_at(position), stop)

    def hole_bytes(self) -> int:
        """Bytes of the used part of the bitmap that take no space yet."""
        held = -(-sum(stop - first for first, stop in self.inhabited()) // BITS_PER_BYTE)
        return max(0, self.geometry.bitmap_used - held)

    def _refuse_shrunk(self, end: int) -> None:
        """Bits that were there at the opening and are gone now are not 0, but unknown."""
        if self._end_of_file() < end:
            raise FileError(
                path=self.path,
                action="look at its bitmap",
                reason="the file ends early; was it cut short meanwhile?",
            )

    def _end_of_file(self) -> int:
        try:
            return os.fstat(self._fd).st_size
        except OSError as error:
            raise FileError.of(self.path, "look at its bitmap", error) from error

    def _seek(self, position: int, whence: int, end: int) -> int:
        try:
            return os.lseek(self._fd, position, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                self._refuse_shrunk(end)
                return end
            if error.errno != errno.EINVAL:
                raise FileError.of(self.path, "look at its bitmap", error) from error
            # A file system that knows no holes: everything is data.
            return position if whence == os.SEEK_DATA else end

    def _clusters_at(self, position: int) -> int:
        return max(0, position - self.offset) * BITS_PER_BYTE

    def publish(self, start: int, stop: int, change: Callable[[bitarray, int], None]) -> None:
        """Change the bits ``[start, stop)`` in the file; making them durable is the caller's.

        ``change(bits, first)`` edits a copy of the bits from cluster ``first`` on.
        Only what differs is written; bits around the range keep their value.
        """
        step = PUBLISH_BYTES * BITS_PER_BYTE
        for first in range(start, stop, step):
            self._publish_part(first, min(first + step, stop), change)

    def _publish_part(self, start: int, stop: int, change: Callable[[bitarray, int], None]) -> None:
        first_byte, stop_byte = start // BITS_PER_BYTE, -(-stop // BITS_PER_BYTE)
        base = first_byte * BITS_PER_BYTE
        old = self.slice(base, stop_byte * BITS_PER_BYTE)
        new = old[start - base : stop - base]
        change(new, start)
        whole = old.copy()
        whole[start - base : stop - base] = new
        self._write_difference(first_byte, old.tobytes(), whole.tobytes())

    def _write_difference(self, first_byte: int, old: bytes, new: bytes) -> None:
        """Write the bytes in which ``new`` differs, with what lies between them in a page."""
        pages = (
            (start, min(start + PAGE, len(new)))
            for start in range(0, len(new), PAGE)
            if old[start : start + PAGE] != new[start : start + PAGE]
        )
        for start, stop in merged(pages):
            first = next(at for at in range(start, stop) if old[at] != new[at])
            last = next(at for at in reversed(range(start, stop)) if old[at] != new[at])
            write_all(self._fd, new[first : last + 1], self.offset + first_byte + first)

    def fill(self, start: int, stop: int, value: int) -> None:
        """Publish ``value`` for every cluster in ``[start, stop)``.

        Clearing costs what is set: holes of the bitmap are 0 already.
        """
        parts = [(start, stop)] if value else self.inhabited(start, stop)
        for first, last in parts:
            self.publish(first, last, lambda bits, _: bits.setall(value))

    def clear_stray(self) -> None:
        """Write 0 to the bits past the last cluster, where one is set."""
        for part in self._data(self.clusters, len(self._bits)):
            for first, stop in list(runs(self._bits, 1, *part)):
                self._clear_raw(first, stop)

    def _clear_raw(self, first: int, stop: int) -> None:
        first_byte, stop_byte = first // BITS_PER_BYTE, -(-stop // BITS_PER_BYTE)
        bits = self._bits[first_byte * BITS_PER_BYTE : stop_byte * BITS_PER_BYTE]
        old = bits.tobytes()
        bits[first - first_byte * BITS_PER_BYTE : stop - first_byte * BITS_PER_BYTE] = 0
        self._write_difference(first_byte, old, bits.tobytes())


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; the kernel may take it in parts."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


class SparseBits:
    """A bitmap in memory, 0 everywhere at first, in pages made when they are needed."""

    def __init__(self) -> None:
        self._pages: dict[int, bitarray] = {}

    def __bool__(self) -> bool:
        return bool(self._pages)

    def set(self, start: int, stop: int) -> None:
        """Set the bits ``[start, stop)``."""
        for number, first, last in self._pages_of(start, stop):
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = bitarray(PAGE_BITS, endian="little")
            page[first:last] = 1

    def runs(self) -> Iterator[Run]:
        """The runs of set bits, in order."""
        for number in sorted(self._pages):
            base = number * PAGE_BITS
            for first, stop in runs(self._pages[number], 1, 0, PAGE_BITS):
                yield base + first, base + stop

    def copy(self) -> SparseBits:
        """A bitmap of its own with the same bits."""
        other = SparseBits()
        other._pages = {number: page.copy() for number, page in self._pages.items()}
        return other

    def drop(self, other: SparseBits) -> None:
        """Clear the bits that are set in ``other``; pages left empty go away."""
        for number, dropped in other._pages.items():
            page = self._pages.get(number)
            if page is not None:
                page &= ~dropped
                if not page.any():
                    del self._pages[number]

    def add_to(self, bits: bitarray, start: int) -> None:
        """Set in ``bits``, which hold the clusters from ``start`` on, what is set here."""
        for number, first, last in self._pages_of(start, start + len(bits)):
            page = self._pages.get(number)
            if page is not None:
                base = number * PAGE_BITS + first - start
                bits[base : base + last - first] |= page[first:last]

    @staticmethod
    def _pages_of(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            number, first = divmod(start, PAGE_BITS)
            last = min(PAGE_BITS, first + stop - start)
            yield number, first, last
            start += last - first
