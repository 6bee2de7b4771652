"""The COW bitmap: one bit per cluster, least significant bit first.

It is looked at through a mapping, read-only, and never stored through it: on a full disk
that is a SIGBUS. :meth:`CowBitmap.publish` changes it with pwrite, which the mapping sees
at once. A file that ends inside its bitmap reads as 0 there. Bits past the last cluster are
ignored when reading and written 0.

:class:`SparseBits` is the other bitmap: bits that live in memory only, in pages
that exist once one of their bits is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from bitarray import bitarray

from addcow_mp.errors import FileError
from addcow_mp.format.bits import BITS_PER_BYTE, MappedBits, Run, between, merged, runs
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import KiB, MiB

#: What a disk and the page cache write at once, however little of it has changed.
PAGE = 4 * KiB

#: Clusters whose bits share one page of bitmap: the grain of sparse bitmaps.
PAGE_BITS = PAGE * BITS_PER_BYTE

#: Bytes of bitmap changed by one pwrite: bounds the memory of publishing.
PUBLISH_BYTES = 1 * MiB

#: Bytes written by one pwrite. File systems put what one call brings into one piece of the page
#: cache; large pieces of memory are the ones that a virtual machine has lent back to its host, and
#: writing a new file took up to five times as long through them.
WRITE_STEP = 256 * KiB


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
        length = max(0, self._file_length() - offset)
        #: Whether the file ends inside its bitmap.
        self.short = length < geometry.bitmap_length
        #: Bits in the file, those past the last cluster included.
        self._held = min(length, geometry.bitmap_length) * BITS_PER_BYTE
        self._bits = MappedBits(fd, offset, self._held, path)
        #: Clusters, from the first, whose bits are in the file.
        self.known = min(self._held, self.clusters)

    def _file_length(self) -> int:
        try:
            return os.fstat(self._fd).st_size
        except OSError as error:
            raise FileError.of(self.path, "look at its bitmap", error) from error

    def unmap(self) -> None:
        """Give back what is mapped of the file; it is mapped again when it is needed."""
        self._bits.unmap()

    def runs(self, value: int, start: int, stop: int) -> Iterator[Run]:
        """The runs of clusters in ``[start, stop)`` whose bit is ``value``."""
        ones = self._bits.runs(start, min(stop, self.known))
        return ones if value else between(ones, start, stop)

    def any(self, start: int, stop: int) -> bool:
        """Whether some cluster in ``[start, stop)`` is local."""
        return next(self.runs(1, start, stop), None) is not None

    def all(self, start: int, stop: int) -> bool:
        """Whether every cluster in ``[start, stop)`` is local."""
        return next(self.runs(0, start, stop), None) is None

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """How many clusters in ``[start, stop)`` are local; costs what is set."""
        return self._bits.count(start, self.known if stop is None else min(stop, self.known))

    def counts(self, step: int) -> Iterator[tuple[int, int]]:
        """The multiples of ``step`` clusters with local ones, and how many each has."""
        return self._bits.counts(0, self.known, step)

    def data_runs(self, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """The parts of ``[start, stop)`` that are not holes in the file, as runs of clusters.

        Outside these runs every bit is 0.
        """
        return self._bits.data_runs(start, self.known if stop is None else min(stop, self.known))

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
        return self._bits.count(self.clusters, self._held)

    def hole_bytes(self) -> int:
        """Bytes of the used part of the bitmap that take no space yet."""
        held = -(-sum(stop - first for first, stop in self.data_runs()) // BITS_PER_BYTE)
        return max(0, self.geometry.bitmap_used - held)

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
        parts = [(start, stop)] if value else self.data_runs(start, stop)
        for first, last in parts:
            self.publish(first, last, lambda bits, _: bits.setall(value))

    def fill_marked(self, marks: SparseBits, value: int) -> None:
        """Publish ``value`` for the clusters that are set in ``marks``; costs the marks."""
        change = marks.add_to if value else marks.take_from
        for first, last in marks.pages():
            self.publish(first, min(last, self.clusters), change)

    def clear_stray(self) -> None:
        """Write 0 to the bits past the last cluster, where one is set."""
        for first, stop in list(self._bits.runs(self.clusters, self._held)):
            self.publish(first, stop, lambda bits, _: bits.setall(0))


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, in steps; the kernel may take them in parts."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[:WRITE_STEP], offset)
        view, offset = view[done:], offset + done


class SparseBits:
    """A bitmap in memory, 0 everywhere at first, in pages made when they are needed."""

    def __init__(self) -> None:
        self._pages: dict[int, bitarray] = {}

    @classmethod
    def of(cls, marks: MappedBits, ranges: Iterable[Run]) -> SparseBits:
        """A copy of what is set in ``marks`` within ``ranges`` at this moment."""
        copied = cls()
        for start, stop in ranges:
            for first, last in marks.data_runs(start, stop):
                copied._copy(marks, first, last)
        return copied

    def _copy(self, marks: MappedBits, start: int, stop: int) -> None:
        for number, first, last in self._pages_of(start, stop):
            bits = bitarray(last - first, endian="little")
            marks.add_to(bits, number * PAGE_BITS + first)
            if bits.any():
                self._page(number)[first:last] |= bits

    def _page(self, number: int) -> bitarray:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bitarray(PAGE_BITS, endian="little")
        return page

    def __bool__(self) -> bool:
        return bool(self._pages)

    def pages(self) -> Iterator[Run]:
        """The ranges that have pages, in order; outside them nothing is set."""
        return ((number * PAGE_BITS, (number + 1) * PAGE_BITS) for number in sorted(self._pages))

    def set(self, start: int, stop: int) -> None:
        """Set the bits ``[start, stop)``."""
        for number, first, last in self._pages_of(start, stop):
            self._page(number)[first:last] = 1

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

    def take_from(self, bits: bitarray, start: int) -> None:
        """Clear in ``bits``, which hold the clusters from ``start`` on, what is set here."""
        mine = bitarray(len(bits), endian="little")
        self.add_to(mine, start)
        bits &= ~mine

    @staticmethod
    def _pages_of(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            number, first = divmod(start, PAGE_BITS)
            last = min(PAGE_BITS, first + stop - start)
            yield number, first, last
            start += last - first
