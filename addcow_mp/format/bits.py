"""Runs of bits, and bits in a file that is looked at through a small window.

A run is a pair ``(first, stop)``; ranges are ``[start, stop)`` throughout, in bits.

:class:`MappedBits` lays a bitarray over a part of the file, mapped, without a copy, one window
at a time: the bits of a petabyte cost the pages that are looked at, and no address space to
speak of. A hole of the file is 0 and is never looked at: on a full tmpfs, which would have to
give it a page, that is a SIGBUS.

Some file systems have no shared mappings. There the part that is asked for is read, in smaller
pieces, and forgotten again at once: what is written to the file later is seen, as in a mapping.
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

#: Bytes mapped at a time: the bits of 8 TiB in clusters of 64 KiB. A multiple of any page.
WINDOW = 16 * MiB
WINDOW_BITS = WINDOW * BITS_PER_BYTE

#: Bytes read at a time where nothing can be mapped: bounds what is held in memory.
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
    """What ``ones``, in order, leave of ``[start, stop)``."""
    for first, last in ones:
        if start < first:
            yield start, first
        start = last
    if start < stop:
        yield start, stop


class MappedBits:
    """The ``count`` bits that begin at byte ``offset``, a multiple of any page, of an open file.

    ``fd`` stays the caller's, ``path`` is what errors call the file. Threads may share it. Every
    method raises :class:`FileError` when the file has become too short or cannot be looked at.
    """

    def __init__(
        self, fd: int, offset: int, count: int, path: str = "", *, writable: bool = False
    ) -> None:
        self._fd = fd
        self._offset = offset
        self._count = count
        self._path = path
        self._protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        #: The window mapped last, and its number.
        self._last: tuple[int, bitarray] = (-1, bitarray())
        #: Whether the file can be mapped, as far as is known.
        self._maps = True

    # Windows

    def _parts(self, start: int, stop: int) -> Iterator[tuple[bitarray, int, int, int]]:
        """``[start, stop)`` by windows: the bits of each, the number of its first, the range."""
        while start < stop:
            base, bits = self._window(start, stop)
            end = min(stop - base, len(bits))
            yield bits, base, start - base, end
            start = base + end

    def _window(self, start: int, stop: int) -> tuple[int, bitarray]:
        """Bits that begin at or before ``start``, and the number of the first."""
        if self._maps:
            number = start // WINDOW_BITS
            held, bits = self._last
            if held == number:
                return number * WINDOW_BITS, bits
            mapped = self._map(number * WINDOW)
            if mapped is not None:
                self._last = number, mapped
                return number * WINDOW_BITS, mapped
        first = start // BITS_PER_BYTE
        length = min(READ_BYTES, -(-stop // BITS_PER_BYTE) - first)
        return first * BITS_PER_BYTE, self._read(first, length)

    def _map(self, start: int) -> bitarray | None:
        """A window; None where the file system has no such mappings."""
        length = min(WINDOW, -(-self._count // BITS_PER_BYTE) - start)
        try:
            window = mmap.mmap(self._fd, length, prot=self._protection, offset=self._offset + start)
        except OSError as error:
            if self._protection & mmap.PROT_WRITE or error.errno == errno.ENOMEM:
                raise self._error(error) from error
            self._maps = False
            return None
        except ValueError:
            raise self._shrunk() from None
        # The bitarray owns the mapping from here on: it is unmapped with it.
        return bitarray(buffer=window, endian="little")

    def _read(self, first: int, length: int) -> bitarray:
        """A private copy of so many bytes from the byte ``first`` on."""
        bits = bitarray(endian="little")
        try:
            bits.frombytes(os.pread(self._fd, length, self._offset + first))
        except OSError as error:
            raise self._error(error) from error
        if not bits:
            raise self._shrunk()
        return bits

    def unmap(self) -> None:
        """Give back the window mapped last; it is mapped again when it is needed."""
        self._last = -1, bitarray()

    # Looking

    def data_runs(self, start: int, stop: int) -> Iterator[Run]:
        """The parts of ``[start, stop)`` that are not holes of the file; all else is 0."""
        position = self._offset + start // BITS_PER_BYTE
        end = self._offset + -(-stop // BITS_PER_BYTE)
        # Bits that were there at the opening and are gone now are not 0, but unknown.
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
        """How many bits in ``[start, stop)`` are 1; costs what is not a hole."""
        return sum(self._counted(*part) for part in self.data_runs(start, stop))

    def _counted(self, start: int, stop: int) -> int:
        return sum(bits.count(1, first, last) for bits, _, first, last in self._parts(start, stop))

    def counts(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
        """The multiples of ``step`` with ones in ``[start, stop)``, and how many each has."""
        current, total = start, 0
        for part in self.data_runs(start, stop):
            for first, last in self._steps_with_ones(*part, step):
                number = round_down(first, step)
                if number != current and total:
                    yield current, total
                    total = 0
                current, total = number, total + self._counted(first, last)
        if total:
            yield current, total

    def _steps_with_ones(self, start: int, stop: int, step: int) -> Iterator[Run]:
        """``[start, stop)`` cut at multiples of ``step``, from the first one in each on."""
        for bits, base, first, last in self._parts(start, stop):
            place = first
            while place < last and (one := bits.find(1, place, last)) >= 0:
                place = min(round_down(base + one, step) + step - base, last)
                yield base + one, base + place

    def add_to(self, bits: bitarray, start: int) -> None:
        """Set in ``bits``, which are those from ``start`` on, what is 1 here."""
        for part in self.data_runs(start, start + len(bits)):
            for window, base, first, last in self._parts(*part):
                bits[base + first - start : base + last - start] |= window[first:last]

    # Changing

    def set(self, start: int, stop: int) -> None:
        """Set the bits ``[start, stop)``, through the mapping: for memory, never for a disk."""
        number, window = self._last
        base = number * WINDOW_BITS
        if base <= start and stop <= base + WINDOW_BITS:  # as it nearly always is
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
            # A file system that knows no holes: everything is data.
            return position if whence == os.SEEK_DATA else end

    def _bit_at(self, position: int) -> int:
        return max(0, position - self._offset) * BITS_PER_BYTE

    def _refuse_shrunk(self, end: int) -> None:
        try:
            length = os.fstat(self._fd).st_size
        except OSError as error:
            raise self._error(error) from error
        if length < end:
            raise self._shrunk()

    def _error(self, error: OSError) -> FileError:
        return FileError.of(self._path, "look at its bitmap", error)

    def _shrunk(self) -> FileError:
        reason = "the file ends early; was it cut short meanwhile?"
        return FileError(path=self._path, action="look at its bitmap", reason=reason)
