"""Runs of bits, and bits in a file that is read through a mapped window.

A run is a pair ``(first, stop)``; all ranges are ``[start, stop)``, in bits.

:class:`MappedBits` maps one window of the file at a time and puts a bitarray over it without a
copy, so the bitmap of a petabyte costs only the pages that are read. A hole of the file is 0 and is
never read: on a full tmpfs, reading it would need a new page and end in SIGBUS.

On a file system without shared mappings, the needed part is read into memory in smaller steps and
not cached, so later writes to the file are seen, as through a mapping.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator

from bitarray import bitarray

from addcow_mp.errors import FileError
from addcow_mp.units import MiB, round_down

BITS_PER_BYTE = 8

#: Bytes mapped at a time: the bits of 8 TiB in clusters of 64 KiB. A multiple of any page size.
WINDOW = 16 * MiB
WINDOW_BITS = WINDOW * BITS_PER_BYTE

#: Bytes read at a time where nothing can be mapped; limits the use of memory.
READ_BYTES = 1 * MiB

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
    """The parts of ``[start, stop)`` that are not in ``ones``; ``ones`` must be in order."""
    for first, last in ones:
        if start < first:
            yield start, first
        start = last
    if start < stop:
        yield start, stop


class MappedBits:
    """The ``count`` bits from byte ``offset`` of an open file on; ``offset`` starts a page.

    The caller owns ``fd``; errors call the file ``path``. Threads may share an instance. Every
    method raises :class:`FileError` if the file has become too short or cannot be read.
    """

    def __init__(
        self, fd: int, offset: int, count: int, path: str = "", *, writable: bool = False
    ) -> None:
        self._fd = fd
        self._offset = offset
        self._count = count
        self._path = path
        self._protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        #: The number of the window mapped last, and its bits.
        self._last: tuple[int, bitarray] = (-1, bitarray())
        #: False once a mapping has failed.
        self._can_map = True

    # Windows

    def _parts(self, start: int, stop: int) -> Iterator[tuple[bitarray, int, int, int]]:
        """``[start, stop)`` by windows: bits, number of the first bit, range within them."""
        while start < stop:
            base, bits = self._window(start, stop)
            end = min(stop - base, len(bits))
            yield bits, base, start - base, end
            start = base + end

    def _window(self, start: int, stop: int) -> tuple[int, bitarray]:
        """Bits that begin at or before ``start``, and the number of the first."""
        if self._can_map:
            number = start // WINDOW_BITS
            if self._last[0] == number:
                return number * WINDOW_BITS, self._last[1]
            mapped = self._map(number * WINDOW)
            if mapped is not None:
                self._last = number, mapped
                return number * WINDOW_BITS, mapped
        first = start // BITS_PER_BYTE
        length = min(READ_BYTES, -(-stop // BITS_PER_BYTE) - first)
        return first * BITS_PER_BYTE, self._read(first, length)

    def _map(self, start: int) -> bitarray | None:
        """The window from byte ``start`` on; None on a file system without shared mappings."""
        length = min(WINDOW, -(-self._count // BITS_PER_BYTE) - start)
        try:
            window = mmap.mmap(self._fd, length, prot=self._protection, offset=self._offset + start)
        except OSError as error:
            if self._protection & mmap.PROT_WRITE or error.errno == errno.ENOMEM:
                raise self._error(error) from error
            self._can_map = False
            return None
        except ValueError:
            raise shrunk(self._path) from None
        # The bitarray owns the mapping, which is unmapped with it.
        return bitarray(buffer=window, endian="little")

    def _read(self, first: int, length: int) -> bitarray:
        """A private copy of ``length`` bytes from byte ``first`` on."""
        bits = bitarray(endian="little")
        try:
            bits.frombytes(os.pread(self._fd, length, self._offset + first))
        except OSError as error:
            raise self._error(error) from error
        if not bits:
            raise shrunk(self._path)
        return bits

    def unmap(self) -> None:
        """Release the mapped window; the next access maps it again."""
        self._last = -1, bitarray()

    # Reading

    def data_runs(self, start: int, stop: int) -> Iterator[Run]:
        """The parts of ``[start, stop)`` outside holes of the file; bits in holes are 0."""
        position = self._offset + start // BITS_PER_BYTE
        end = self._offset + -(-stop // BITS_PER_BYTE)
        # Bits that a shorter file no longer has are unknown, not 0.
        self._refuse_shrunk(end)
        while position < end and (data := self._seek(position, os.SEEK_DATA, end)) < end:
            position = self._seek(data, os.SEEK_HOLE, end)
            yield max(start, self._bit_at(data)), min(self._bit_at(position), stop)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The runs of ones in ``[start, stop)``."""
        return merged(
            (base + here, base + there)
            for part in self.data_runs(start, stop)
            for bits, base, first, last in self._parts(*part)
            for here, there in runs(bits, 1, first, last)
        )

    def any(self, start: int, stop: int) -> bool:
        """Whether some bit in ``[start, stop)`` is 1."""
        return next(self.runs(start, stop), None) is not None

    def count(self, start: int, stop: int) -> int:
        """The number of ones in ``[start, stop)``; holes cost nothing."""
        return sum(self._count_data(*part) for part in self.data_runs(start, stop))

    def _count_data(self, start: int, stop: int) -> int:
        return sum(bits.count(1, first, last) for bits, _, first, last in self._parts(start, stop))

    def counts(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
        """Each multiple of ``step`` with ones in ``[start, stop)``, and how many it has."""
        current, total = start, 0
        for part in self.data_runs(start, stop):
            for first, last in self._steps_with_ones(*part, step):
                number = round_down(first, step)
                if number != current and total:
                    yield current, total
                    total = 0
                current, total = number, total + self._count_data(first, last)
        if total:
            yield current, total

    def _steps_with_ones(self, start: int, stop: int, step: int) -> Iterator[Run]:
        """``[start, stop)`` cut at multiples of ``step``, each from its first one on."""
        for bits, base, first, last in self._parts(start, stop):
            place = first
            while place < last and (one := bits.find(1, place, last)) >= 0:
                place = min(round_down(base + one, step) + step - base, last)
                yield base + one, base + place

    def add_to(self, bits: bitarray, start: int) -> None:
        """Set in ``bits``, which begin at number ``start``, every bit that is 1 here."""
        for part in self.data_runs(start, start + len(bits)):
            for window, base, first, last in self._parts(*part):
                bits[base + first - start : base + last - start] |= window[first:last]

    # Changing

    def set(self, start: int, stop: int) -> None:
        """Set the bits ``[start, stop)`` through the mapping: only for files in memory."""
        number, window = self._last
        base = number * WINDOW_BITS
        if base <= start and stop <= base + WINDOW_BITS:  # the usual case
            window[start - base : stop - base] = 1
            return
        for bits, _, first, last in self._parts(start, stop):
            bits[first:last] = 1

    # The file

    def _seek(self, position: int, whence: int, end: int) -> int:
        try:
            return os.lseek(self._fd, position, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                self._refuse_shrunk(end)
                return end
            if error.errno != errno.EINVAL:
                raise self._error(error) from error
            # A file system without holes: everything is data.
            return position if whence == os.SEEK_DATA else end

    def _bit_at(self, position: int) -> int:
        return max(0, position - self._offset) * BITS_PER_BYTE

    def _refuse_shrunk(self, end: int) -> None:
        try:
            length = os.fstat(self._fd).st_size
        except OSError as error:
            raise self._error(error) from error
        if length < end:
            raise shrunk(self._path)

    def _error(self, error: OSError) -> FileError:
        return FileError.of(self._path, "look at its bitmap", error)


def shrunk(path: str) -> FileError:
    """The error for a bitmap that has become shorter since it was opened."""
    reason = "the file ends early; was it cut short meanwhile?"
    return FileError(path=path, action="look at its bitmap", reason=reason)
