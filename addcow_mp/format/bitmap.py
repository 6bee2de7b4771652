"""The COW bitmap: one bit per cluster, least significant bit first.

The bitmap is read through a read-only mapping and never written through one: on a full disk that
is a SIGBUS. :meth:`CowBitmap.publish` changes it with pwrite, which the mapping shows at once.

A guest asks for the bits of one cluster, or of few. Where no other program may write the file, the
pages that hold them are read once and kept, so that nearly every request is answered without a
system call. A change drops the pages that it concerns.

Bits behind the end of a file that ends inside its bitmap read as 0. Bits past the last cluster
(stray bits) are ignored when read and written as 0.

:class:`SparseBits` is a bitmap in memory that allocates a page when one of its bits is set.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator

from bitarray import bitarray

from addcow_mp.errors import FileError
from addcow_mp.format.bits import (
    BITS_PER_BYTE,
    WINDOW,
    MappedBits,
    Run,
    between,
    merged,
    runs,
    shrunk,
)
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import KiB, MiB, round_down

#: The unit in which the disk and the page cache write, however few bytes change.
PAGE = 4 * KiB

#: Clusters whose bits share one page of bitmap: the page size of sparse bitmaps.
PAGE_BITS = PAGE * BITS_PER_BYTE

#: Pages that are kept at most: as many bytes as are mapped at a time.
MOST_PAGES = WINDOW // PAGE

#: Bytes of bitmap changed by one pwrite; limits the memory used for publishing.
PUBLISH_BYTES = 1 * MiB

#: Bytes written by one pwrite. A file system puts the data of one call into one folio of the page
#: cache. Large folios use memory that a virtual machine has returned to its host: writing a new
#: file with larger calls took up to five times as long.
WRITE_STEP = 256 * KiB


class CowBitmap:
    """The bitmap of an open ``.add-cow`` file.

    The caller owns ``fd``; ``offset`` is the header size; errors call the file ``path``. Bits are
    numbered by cluster, ranges are ``[start, stop)``. ``alone``: no other program writes the file,
    nor another object of this class.
    """

    def __init__(
        self, fd: int, offset: int, geometry: Geometry, path: str = "", *, alone: bool = False
    ) -> None:
        self.path = path
        self.offset = offset
        self.geometry = geometry
        self.clusters = geometry.clusters
        self._fd = fd
        try:
            length = max(0, os.fstat(fd).st_size - offset)
        except OSError as error:
            raise FileError.of(path, "look at its bitmap", error) from error
        #: Whether the file ends inside its bitmap.
        self.short = length < geometry.bitmap_length
        #: Bits in the file, stray bits included.
        self._held = min(length, geometry.bitmap_length) * BITS_PER_BYTE
        self._bits = MappedBits(fd, offset, self._held, path)
        #: Clusters, from the first one on, whose bits are in the file.
        self.known = min(self._held, self.clusters)
        self._alone = alone
        #: Copies of pages as they are in the file; never changed, only dropped.
        self._pages: dict[int, bitarray] = {}
        self._pages_lock = threading.Lock()

    def unmap(self) -> None:
        """Release the mapping and the kept pages; the next access makes them again."""
        self._bits.unmap()
        with self._pages_lock:
            self._pages.clear()

    def runs(self, value: int, start: int, stop: int) -> Iterator[Run]:
        """The runs of clusters in ``[start, stop)`` whose bit is ``value``."""
        if self._alone and start < stop and start // PAGE_BITS == (stop - 1) // PAGE_BITS:
            base = round_down(start, PAGE_BITS)
            found = runs(self._page(start // PAGE_BITS), value, start - base, stop - base)
            return ((base + first, base + last) for first, last in found)
        ones = self._bits.runs(start, min(stop, self.known))
        return ones if value else between(ones, start, stop)

    def any(self, start: int, stop: int) -> bool:
        """Whether some cluster in ``[start, stop)`` is allocated."""
        return next(self.runs(1, start, stop), None) is not None

    def all(self, start: int, stop: int) -> bool:
        """Whether every cluster in ``[start, stop)`` is allocated."""
        return next(self.runs(0, start, stop), None) is None

    def is_set(self, cluster: int) -> bool:
        """Whether one cluster is allocated."""
        number = cluster // PAGE_BITS
        page = self._pages.get(number) or self._page(number)
        return page[cluster % PAGE_BITS] == 1

    def _page(self, number: int) -> bitarray:
        """The bits of one page, cut at the last cluster."""
        page = self._pages.get(number)
        if page is None:
            # Under the lock: a page that was read before a change must not be kept behind it.
            with self._pages_lock:
                start = number * PAGE_BITS
                page = self.slice(start, min(start + PAGE_BITS, self.clusters))
                if self._alone:
                    if len(self._pages) >= MOST_PAGES:
                        self._pages.clear()
                    self._pages[number] = page
        return page

    def _drop_pages(self, start: int, stop: int) -> None:
        """Forget the pages of the bits ``[start, stop)``, which have changed in the file."""
        with self._pages_lock:
            for number in range(start // PAGE_BITS, -(-stop // PAGE_BITS)):
                self._pages.pop(number, None)

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """The number of allocated clusters in ``[start, stop)``; holes cost nothing."""
        return self._bits.count(start, self.known if stop is None else min(stop, self.known))

    def counts(self, step: int) -> Iterator[tuple[int, int]]:
        """Each multiple of ``step`` clusters with allocated ones, and how many it has."""
        return self._bits.counts(0, self.known, step)

    def data_runs(self, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """The parts of ``[start, stop)``, in clusters, outside holes of the file.

        All other bits are 0.
        """
        return self._bits.data_runs(start, self.known if stop is None else min(stop, self.known))

    def slice(self, start: int, stop: int) -> bitarray:
        """A private copy of the bits ``[start, stop)``, read from the file.

        Raises :class:`FileError` if it cannot be read, or has become shorter.
        """
        first, last = start // BITS_PER_BYTE, -(-stop // BITS_PER_BYTE)
        try:
            raw = os.pread(self._fd, last - first, self.offset + first)
        except OSError as error:
            raise FileError.of(self.path, "look at its bitmap", error) from error
        if len(raw) < min(last, self._held // BITS_PER_BYTE) - first:
            raise shrunk(self.path)
        bits = bitarray(endian="little")
        bits.frombytes(raw.ljust(last - first, b"\0"))
        base = first * BITS_PER_BYTE
        return bits[start - base : stop - base]

    def stray(self) -> int:
        """The number of bits past the last cluster that are set."""
        return self._bits.count(self.clusters, self._held)

    def hole_bytes(self) -> int:
        """Bytes of the used part of the bitmap that are holes."""
        held = -(-sum(stop - first for first, stop in self.data_runs()) // BITS_PER_BYTE)
        return max(0, self.geometry.bitmap_used - held)

    def publish(self, start: int, stop: int, change: Callable[[bitarray, int], None]) -> None:
        """Change the bits ``[start, stop)`` in the file; the caller makes them durable.

        ``change(bits, first)`` edits a copy of the bits from cluster ``first`` on. Only bytes that
        differ are written; bits around the range keep their value.
        """
        step = PUBLISH_BYTES * BITS_PER_BYTE
        for first in range(start, stop, step):
            self._publish_part(first, min(first + step, stop), change)

    def _publish_part(self, start: int, stop: int, change: Callable[[bitarray, int], None]) -> None:
        first_byte, stop_byte = start // BITS_PER_BYTE, -(-stop // BITS_PER_BYTE)
        base = first_byte * BITS_PER_BYTE
        old = self.slice(base, stop_byte * BITS_PER_BYTE)
        new = old.copy()
        part = old[start - base : stop - base]
        change(part, start)
        new[start - base : stop - base] = part
        self._write_difference(first_byte, old.tobytes(), new.tobytes())

    def _write_difference(self, first_byte: int, old: bytes, new: bytes) -> None:
        """Write the bytes that differ, and equal bytes between them on the same or next page."""
        pages = (
            (start, min(start + PAGE, len(new)))
            for start in range(0, len(new), PAGE)
            if old[start : start + PAGE] != new[start : start + PAGE]
        )
        for start, stop in merged(pages):
            first = next(at for at in range(start, stop) if old[at] != new[at])
            last = next(at for at in reversed(range(start, stop)) if old[at] != new[at])
            begin, end = first_byte + first, first_byte + last + 1
            try:
                write_all(self._fd, new[first : last + 1], self.offset + begin)
            finally:
                self._drop_pages(begin * BITS_PER_BYTE, end * BITS_PER_BYTE)

    def fill(self, start: int, stop: int, value: int) -> None:
        """Publish ``value`` for every cluster in ``[start, stop)``.

        Clearing skips holes of the bitmap, which are 0 already.
        """
        parts = [(start, stop)] if value else self.data_runs(start, stop)
        for first, last in parts:
            self.publish(first, last, lambda bits, _: bits.setall(value))

    def fill_marked(self, marks: SparseBits, value: int) -> None:
        """Publish ``value`` for the clusters that are set in ``marks``."""
        change = marks.add_to if value else marks.remove_from
        for first, last in marks.pages():
            self.publish(first, min(last, self.clusters), change)

    def clear_stray(self) -> None:
        """Clear the bits past the last cluster."""
        for first, stop in list(self._bits.runs(self.clusters, self._held)):
            self.publish(first, stop, lambda bits, _: bits.setall(0))


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, in steps; one pwrite may take only a part."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[:WRITE_STEP], offset)
        view, offset = view[done:], offset + done


class SparseBits:
    """A bitmap in memory, initially 0, that allocates its pages when they are needed."""

    def __init__(self) -> None:
        self._pages: dict[int, bitarray] = {}

    @classmethod
    def of(cls, marks: MappedBits, ranges: Iterable[Run]) -> SparseBits:
        """A copy of the bits that are set in ``marks`` within ``ranges`` at this moment."""
        copied = cls()
        for start, stop in ranges:
            for part in marks.data_runs(start, stop):
                for number, first, last in _pages_of(*part):
                    bits = bitarray(last - first, endian="little")
                    marks.add_to(bits, number * PAGE_BITS + first)
                    if bits.any():
                        copied._page(number)[first:last] |= bits
        return copied

    def _page(self, number: int) -> bitarray:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bitarray(PAGE_BITS, endian="little")
        return page

    def __bool__(self) -> bool:
        return bool(self._pages)

    def pages(self) -> Iterator[Run]:
        """The ranges that have pages, in order; all other bits are 0."""
        return ((number * PAGE_BITS, (number + 1) * PAGE_BITS) for number in sorted(self._pages))

    def is_set(self, bit: int) -> bool:
        """Whether one bit is set."""
        page = self._pages.get(bit // PAGE_BITS)
        return page is not None and bool(page[bit % PAGE_BITS])

    def set(self, start: int, stop: int) -> None:
        """Set the bits ``[start, stop)``."""
        for number, first, last in _pages_of(start, stop):
            self._page(number)[first:last] = 1

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """The runs of set bits in ``[start, stop)``, in order; a run ends with its page."""
        for number in sorted(self._pages):
            base = number * PAGE_BITS
            last = PAGE_BITS if stop is None else min(PAGE_BITS, stop - base)
            for run in runs(self._pages[number], 1, max(0, start - base), max(0, last)):
                yield base + run[0], base + run[1]

    def copy(self) -> SparseBits:
        """An independent copy."""
        other = SparseBits()
        other._pages = {number: page.copy() for number, page in self._pages.items()}
        return other

    def drop(self, other: SparseBits) -> None:
        """Clear the bits that are set in ``other``; empty pages are freed."""
        for number, dropped in other._pages.items():
            page = self._pages.get(number)
            if page is not None:
                page &= ~dropped
                if not page.any():
                    del self._pages[number]

    def add_to(self, bits: bitarray, start: int) -> None:
        """Set in ``bits``, which begin at cluster ``start``, every bit that is set here."""
        for number, first, last in _pages_of(start, start + len(bits)):
            page = self._pages.get(number)
            if page is not None:
                base = number * PAGE_BITS + first - start
                bits[base : base + last - first] |= page[first:last]

    def copy_to(self, bits: bitarray, start: int) -> None:
        """Make ``bits``, which begin at cluster ``start``, equal to those here."""
        bits.setall(0)
        self.add_to(bits, start)

    def remove_from(self, bits: bitarray, start: int) -> None:
        """Clear in ``bits``, which begin at cluster ``start``, every bit that is set here."""
        own = bitarray(len(bits), endian="little")
        self.add_to(own, start)
        bits &= ~own


def _pages_of(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """``[start, stop)`` by pages: number of the page, and the range within it."""
    while start < stop:
        number, first = divmod(start, PAGE_BITS)
        last = min(PAGE_BITS, first + stop - start)
        yield number, first, last
        start += last - first
