"""The ways to move a run of bytes from one file to another, at the same offset.

- *clone*: the file system lets both files share the blocks (FICLONERANGE: XFS, btrfs,
  bcachefs). Costs the same for a megabyte as for a gigabyte, so it pays for long runs.
- *range*: copy_file_range, a copy inside the kernel.
- *buffer*: read and write through a small buffer that stays in the processor's cache. The
  fastest plain copy there is here; it alone can look for zeros on the way.
- *direct*: the same past the page cache (O_DIRECT), which stays as it was.

One :class:`Copier` picks a way for every run, by what was asked for, how long the run is and
what these two files have answered before; where a way does not work between them, the next
one is used from then on. What is counted is what was done.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from bitarray import bitarray

from addcow_mp.device import faults, holes
from addcow_mp.device.files import File, copy, new_buffer
from addcow_mp.device.filesystem import filesystem_of
from addcow_mp.errors import FileError
from addcow_mp.format.bitmap import WRITE_STEP
from addcow_mp.format.bits import Run, between
from addcow_mp.units import KiB, MiB, round_down, round_up


class CopyMethod(StrEnum):
    """How bytes were moved."""

    CLONE = "clone"
    RANGE = "range"
    BUFFER = "buffer"
    DIRECT = "direct"


class Copy(StrEnum):
    """What a user may pin."""

    AUTO = "auto"
    CLONE = "clone"
    RANGE = "range"
    BUFFER = "buffer"


@dataclass(frozen=True)
class CopyOptions:
    """How runs are to be moved.

    ``copy``: the way, or auto. ``direct``: past the page cache. ``sparse``: blocks of so many
    zero bytes become holes; 0 = do not look. ``rate``: bytes per second for all workers
    together; 0 = no limit.
    """

    copy: Copy = Copy.AUTO
    direct: bool = False
    sparse: int = 0
    rate: int = 0


#: Cloning takes 50 us a call and more whatever the length: shorter runs are copied sooner.
CLONE_FROM = 512 * KiB

#: Runs up to this length need no more than one read and one write, and nobody would clone them.
SHORT = WRITE_STEP

#: One request of copy_file_range; also the longest time that an interrupt has to wait.
RANGE_STEP = 64 * MiB

#: Direct requests: long enough for the disk, aligned as every disk wants it.
DIRECT_STEP, DIRECT_BLOCK = 1 * MiB, 4 * KiB

#: Runs from this length on are preallocated where that pays: below, the call costs more.
PREALLOCATE_FROM = 1 * MiB

#: Answers that mean "not between these two files", not "something is broken".
_CANNOT = (
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.ETXTBSY,
    errno.EPERM,
)

# _IOW(0x94, 13, struct file_clone_range)
_FICLONERANGE = 0x4020940D


def clonable(copy_options: CopyOptions, start: int, stop: int, block: int) -> tuple[int, int]:
    """The part of a run that is cloned where the file system can: whole blocks, or nothing."""
    # Shared blocks cost nothing, zeros or not: with AUTO, too, nobody looks at them.
    long_enough = copy_options.copy is Copy.AUTO and stop - start >= CLONE_FROM
    if copy_options.direct or not (long_enough or copy_options.copy is Copy.CLONE):
        return start, start
    return round_up(start, block), round_down(stop, block)


@dataclass
class Copier:
    """Moves runs into ``target``. Counts in ``moved`` how many bytes went which way."""

    target: File
    copy_options: CopyOptions = CopyOptions()
    moved: dict[CopyMethod, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cannot: set[tuple[CopyMethod, int]] = set()
        self._preallocates = filesystem_of(self.target) == "ext4"
        self._block = self.target.block_size
        self._direct: dict[int, int] = {}
        self._views: dict[int, memoryview] = {}

    @cached_property
    def _direct_buffer(self) -> memoryview:
        return new_buffer(DIRECT_STEP)

    @cached_property
    def buffer(self) -> memoryview:
        """What is read and written through; made when it is needed first."""
        return new_buffer()

    def move(self, source: File, start: int, stop: int) -> None:
        """Move ``[start, stop)`` from ``source``. Raises :class:`FileError`."""
        if self.copy_options.direct:
            self._move_direct(source, start, stop)
            return
        if self._may(CopyMethod.CLONE, source):
            start, stop = self._clone(source, start, stop)
        if (
            start < stop
            and self._may(CopyMethod.RANGE, source)
            and self.copy_options.copy is Copy.RANGE
        ):
            start = self._copy_range(source, start, stop)
        if start < stop:
            self._copy(source, start, stop)

    def clone(self, source: File, start: int, stop: int) -> int:
        """Clone what can be of ``[start, stop)``; returns where what is left begins."""
        if self.copy_options.direct or not self._may(CopyMethod.CLONE, source):
            return start
        return self._clone(source, start, stop)[0]

    def announce(self, start: int, stop: int) -> None:
        """Take note that ``[start, stop)`` is moved next, in steps: it is placed as one piece."""
        plain = not self.copy_options.direct and not self.copy_options.sparse
        if plain and self._preallocates and stop - start >= PREALLOCATE_FROM:
            self._preallocate(start, stop)

    @property
    def copies_plainly(self) -> bool:
        """Whether nothing but reading and writing is done with runs too short to be cloned."""
        usual = self.copy_options.copy in (Copy.AUTO, Copy.BUFFER)
        special = (
            self.copy_options.direct
            or self.copy_options.sparse
            or self.copy_options.rate
            or faults.armed
        )
        return usual and not special

    def move_short(self, source: File, start: int, stop: int) -> bool:
        """Move ``[start, stop)`` with one read and one write; false when that cannot be.

        It cannot if the run is long enough to be cloned, or has a hole, or if something fails:
        :meth:`move` then meets the same again, and can tell.
        """
        length, fd = stop - start, source.fd
        if length > SHORT:
            return False
        part = self._views.get(length)
        if part is None:
            part = self._views[length] = self.buffer[:length]
        try:
            moved = (
                os.lseek(fd, start, os.SEEK_HOLE) >= stop
                and os.preadv(fd, [part], start) == length
                and os.pwrite(self.target.fd, part, start) == length
            )
        except OSError:
            return False
        if moved:
            self._count(CopyMethod.BUFFER, length)
        return moved

    def _may(self, way: CopyMethod, source: File) -> bool:
        return (way, source.fd) not in self._cannot

    def _count(self, way: CopyMethod, length: int) -> None:
        self.moved[way] = self.moved.get(way, 0) + length

    # Clone

    def _clone(self, source: File, start: int, stop: int) -> tuple[int, int]:
        """Clone what can be of a run; returns what is left, a tail or all of it."""
        first, last = clonable(self.copy_options, start, stop, self._block)
        # A length of 0 would mean "to the end of the source".
        if first >= last or not self._cloned(source, first, last):
            return start, stop
        self._count(CopyMethod.CLONE, last - first)
        if start < first:
            self._copy(source, start, first)
        return last, stop

    def _cloned(self, source: File, start: int, stop: int) -> bool:
        self._pass_fault_points(source, start, stop)
        request = struct.pack("qQQQ", source.fd, start, stop - start, start)
        try:
            fcntl.ioctl(self.target.fd, _FICLONERANGE, request)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise FileError.of(self.target.path, f"clone at {start}", error) from error
            self._cannot.add((CopyMethod.CLONE, source.fd))
            return False
        return True

    def _pass_fault_points(self, source: File, start: int, stop: int) -> None:
        if faults.armed:
            for file, verb in ((source, "read"), (self.target, "write")):
                with file.doing(f"{verb} at {start}"):
                    if file.meet(verb, start, stop - start) < stop - start:
                        raise faults.failure()

    # Copy inside the kernel

    def _copy_range(self, source: File, start: int, stop: int) -> int:
        """Copy until the end or until the kernel cannot; returns how far it came."""
        self._pass_fault_points(source, start, stop)
        position = start
        while position < stop:
            step = min(RANGE_STEP, stop - position)
            try:
                done = os.copy_file_range(source.fd, self.target.fd, step, position, position)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise FileError.of(self.target.path, f"copy at {position}", error) from error
                self._cannot.add((CopyMethod.RANGE, source.fd))
                break
            if done == 0:  # the source ends early: the plain copy says so
                break
            position += done
        self._count(CopyMethod.RANGE, position - start)
        return position

    # Plain copy

    def _copy(self, source: File, start: int, stop: int) -> None:
        if self.copy_options.sparse:
            self._copy_sparse(source, start, stop)
        else:
            copy(source, self.target, start, stop, self.buffer)
        self._count(CopyMethod.BUFFER, stop - start)

    def _preallocate(self, start: int, stop: int) -> None:
        """Let the file system place a run that goes into a hole at once, as one piece."""
        data = self.target.next_data(start)
        if data is None or data >= stop:
            with self.target.doing(f"allocate {stop - start} bytes at {start}"):
                self._preallocates = holes.allocate(self.target.fd, start, stop)

    def _copy_sparse(self, source: File, start: int, stop: int) -> None:
        for offset in range(start, stop, len(self.buffer)):
            view = self.buffer[: stop - offset]
            source.read_into(view, offset)
            position = 0
            for first, last in nonzero_runs(view, self.copy_options.sparse):
                self._make_zero(offset + position, offset + first)
                self.target.write(view[first:last], offset + first)
                position = last
            self._make_zero(offset + position, offset + len(view))

    def _make_zero(self, start: int, stop: int) -> None:
        if start < stop:
            self.target.make_zero(start, stop)

    # Past the page cache

    def _move_direct(self, source: File, start: int, stop: int) -> None:
        first, last = round_up(start, DIRECT_BLOCK), round_down(stop, DIRECT_BLOCK)
        if first >= last or not self._may(CopyMethod.DIRECT, source):
            self._copy_edge(source, start, stop)
            return
        try:
            self._copy_direct(source, first, last)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise FileError.of(self.target.path, f"copy at {start}", error) from error
            self._cannot.add((CopyMethod.DIRECT, source.fd))
            self._copy_edge(source, start, stop)
            return
        self._copy_edge(source, start, first)
        self._copy_edge(source, last, stop)

    def _copy_direct(self, source: File, start: int, stop: int) -> None:
        here, there = self._direct_fd(source), self._direct_fd(self.target)
        buffer = self._direct_buffer
        self._pass_fault_points(source, start, stop)
        for offset in range(start, stop, DIRECT_STEP):
            view = buffer[: stop - offset]
            if os.preadv(here, [view], offset) != len(view):
                raise OSError(errno.EINVAL, "short direct read")
            self._write_direct(there, view, offset)
        self._count(CopyMethod.DIRECT, stop - start)

    def _write_direct(self, there: int, view: memoryview, offset: int) -> None:
        """Write ``view``, or what of it is not zero when zeros are looked for."""
        block = round_up(self.copy_options.sparse, DIRECT_BLOCK)
        position = 0
        for first, last in nonzero_runs(view, block) if block else [(0, len(view))]:
            self._make_zero(offset + position, offset + first)
            if os.pwrite(there, view[first:last], offset + first) != last - first:
                raise OSError(errno.EINVAL, "short direct write")
            position = last
        self._make_zero(offset + position, offset + len(view))

    def _copy_edge(self, source: File, start: int, stop: int) -> None:
        """What is no whole block goes through the cache: a page at most, at each end of a run.

        Syncing here to drop it again is not for a worker: it would take the answer of a
        failed sync away from the parent.
        """
        if start < stop:
            self._copy(source, start, stop)

    def _direct_fd(self, file: File) -> int:
        """The same open file past the cache; the locks stay with the descriptor it came from."""
        if file.fd not in self._direct:
            mode = os.O_RDWR if file is self.target else os.O_RDONLY
            flags = mode | os.O_DIRECT | os.O_CLOEXEC
            self._direct[file.fd] = os.open(f"/proc/self/fd/{file.fd}", flags)
        return self._direct[file.fd]


def nonzero_runs(view: memoryview, block: int) -> Iterator[Run]:
    """The runs of blocks of ``block`` bytes in ``view`` that hold other bytes than 0."""
    end = len(view)
    zero = ((start, min(start + block, end)) for start in _zero_blocks(view, block))
    return between(zero, 0, end)


def _zero_blocks(view: memoryview, block: int) -> Iterator[int]:
    """Where the blocks begin that are all 0. Few are looked at: most begin with something else."""
    bits = bitarray(buffer=view)
    heads = view.cast("Q")[:: block // 8].tolist() if len(view) % 8 == 0 else None
    for number, start in enumerate(range(0, len(view), block)):
        if not (heads and heads[number]) and bits.find(1, start * 8, (start + block) * 8) < 0:
            yield start
