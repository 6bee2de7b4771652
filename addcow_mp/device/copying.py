"""Methods to copy a run of bytes from one file to another, at the same offset.

- *clone*: both files share the blocks (FICLONERANGE: XFS, btrfs, bcachefs). It costs the same for a
  megabyte as for a gigabyte, so it pays for long runs.
- *range*: copy_file_range, a copy inside the kernel.
- *buffer*: read and write through a small buffer that stays in the processor's cache. It is the
  fastest method that moves bytes, and the only one that can look for zeros.
- *map*: written from a mapping of the source, which saves the buffer. It is slower in most places,
  and there to be compared.
- *direct*: like *buffer*, but past the page cache (O_DIRECT), which stays as it was.

:class:`Copier` chooses a method for each run, by the options, the length of the run and the earlier
answers of the two files: a method that does not work between them is not tried again. It counts the
bytes that each method has copied.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, cached_property

from bitarray import bitarray

from addcow_mp.device import faults, holes
from addcow_mp.device.files import File, copy, new_buffer
from addcow_mp.device.filesystem import likely_filesystem_of
from addcow_mp.device.mapped_source import WINDOW, MappedSource
from addcow_mp.errors import FileError, UsageError
from addcow_mp.format.bitmap import WRITE_STEP, write_all
from addcow_mp.format.bits import Run, between
from addcow_mp.units import SECTOR, KiB, MiB, round_down, round_up


class CopyMethod(StrEnum):
    """A method to copy bytes; users can pin all but *direct*."""

    CLONE = "clone"
    RANGE = "range"
    BUFFER = "buffer"
    DIRECT = "direct"
    MAP = "map"


#: In place of a method: the one that fits each run.
AUTO = "auto"


@dataclass(frozen=True)
class CopyOptions:
    """How runs are copied.

    ``method``: the pinned method; None = choose. ``direct``: past the page cache. ``sparse``:
    aligned blocks of so many zero bytes become holes; 0 = do not look for zeros. ``rate``: bytes
    per second for all workers together; 0 = no limit.
    """

    method: CopyMethod | None = None
    direct: bool = False
    sparse: int = 0
    rate: int = 0

    @classmethod
    def chosen(
        cls,
        copy: str = AUTO,
        sparse: int | None = None,
        *,
        direct: bool = False,
        rate: int = 0,
        usual: int = 0,
    ) -> CopyOptions:
        """The options that a user chooses: ``copy`` is a method or AUTO.

        ``sparse`` None: ``usual``, where the method can find zeros. Raises :class:`UsageError`.
        """
        if sparse is None:
            sparse = usual if copy in (AUTO, CopyMethod.BUFFER) else 0
        elif sparse and copy != CopyMethod.CLONE:
            # Only the buffer sees the data: the other methods cannot find zeros.
            copy = CopyMethod.BUFFER
        if sparse % SECTOR or sparse < 0:
            problem = f"give a multiple of {SECTOR}, or 0"
            raise UsageError(message=f"invalid sparse size {sparse} (-S): {problem}")
        return cls(None if copy == AUTO else CopyMethod(copy), direct, sparse, rate)


#: A clone takes 50 us or more whatever the length: shorter runs are copied sooner.
CLONE_FROM = 512 * KiB

#: Runs up to this length need only one read and one write, and are too short to be cloned.
SHORT = WRITE_STEP

#: One request of copy_file_range; an interrupt waits for its end.
RANGE_STEP = 64 * MiB

#: Direct requests: long enough for the disk, aligned as every disk needs it.
DIRECT_STEP, DIRECT_BLOCK = 1 * MiB, 4 * KiB

#: Shorter runs are not preallocated: the call costs more than it saves.
PREALLOCATE_FROM = 1 * MiB

#: The same for the parts that are left between zeros: none is longer than the buffer.
SPARSE_PREALLOCATE_FROM = 512 * KiB

#: Errors that mean "not between these two files", not "something is broken".
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
    """The part of a run that is cloned if the file system can: whole blocks, or nothing."""
    # Shared blocks use no space, zeros or not, so a clone never looks for zeros.
    long_enough = copy_options.method is None and stop - start >= CLONE_FROM
    if copy_options.direct or not (long_enough or copy_options.method is CopyMethod.CLONE):
        return start, start
    return round_up(start, block), round_down(stop, block)


_own = threading.local()


def _buffer_of_thread() -> memoryview:
    """One buffer for all copies of this thread: new pages cost more than a small image.

    No copy leaves anything in it for the next one.
    """
    buffer: memoryview | None = getattr(_own, "buffer", None)
    if buffer is None:
        buffer = _own.buffer = new_buffer()
    return buffer


class Copier:
    """Copies runs into ``target``; ``moved`` counts the bytes that each method has copied."""

    def __init__(self, target: File, copy_options: CopyOptions) -> None:
        self.target = target
        self.copy_options = copy_options
        self.moved: dict[CopyMethod, int] = {}
        #: Methods that do not work from a source, by its descriptor.
        self._cannot: set[tuple[CopyMethod, int]] = set()
        self._block = target.block_size
        self._direct: dict[int, int] = {}
        self._views: dict[int, memoryview] = {}
        self._mapped = MappedSource()

    @cached_property
    def _direct_buffer(self) -> memoryview:
        return new_buffer(DIRECT_STEP)

    @cached_property
    def buffer(self) -> memoryview:
        """The buffer for reading and writing, made when it is first needed."""
        return _buffer_of_thread()

    def move(self, source: File, start: int, stop: int) -> None:
        """Copy ``[start, stop)`` from ``source``. Raises :class:`FileError`."""
        if self.copy_options.direct:
            self._copy_past_cache(source, start, stop)
            return
        start = self.clone(source, start, stop)
        if self.copy_options.method is CopyMethod.RANGE and start < stop:
            start = self._copy_range(source, start, stop)
        elif self.copy_options.method is CopyMethod.MAP and start < stop:
            start = self._copy_mapped(source, start, stop)
        self._copy(source, start, stop)

    def release(self) -> None:
        """Keep nothing of the sources mapped: read-back wants them out of the page cache."""
        self._mapped.close()

    def clone(self, source: File, start: int, stop: int) -> int:
        """Clone a part of ``[start, stop)`` and copy what lies before; returns where it ends."""
        first, last = clonable(self.copy_options, start, stop, self._block)
        # A length of 0 would mean "to the end of the source".
        if first >= last or not self._clone_blocks(source, first, last):
            return start
        self._count(CopyMethod.CLONE, last - first)
        self._copy(source, start, first)
        return last

    def preallocate(self, start: int, stop: int) -> None:
        """Make the file system allocate ``[start, stop)``, which is copied next, in one extent.

        Where zeros are looked for, a part is only allocated once it is known to have none.
        """
        plain = not self.copy_options.direct and not self.copy_options.sparse
        if plain and stop - start >= PREALLOCATE_FROM:
            self._allocate(start, stop)

    def _allocate(self, start: int, stop: int) -> None:
        """Allocate ``[start, stop)`` if that makes writing there faster and it is a hole."""
        if self._preallocates:
            data = self.target.next_data(start)
            if data is None or data >= stop:
                with self.target.doing(f"allocate {stop - start} bytes at {start}"):
                    self._preallocates = holes.allocate(self.target.fd, start, stop)

    @cached_property
    def _preallocates(self) -> bool:
        return likely_filesystem_of(self.target) == "ext4"

    @property
    def copies_plainly(self) -> bool:
        """Whether runs too short to be cloned are only read and written."""
        options = self.copy_options
        usual = options.method in (None, CopyMethod.BUFFER)
        return usual and not (options.direct or options.sparse or options.rate or faults.armed)

    def move_short(self, source: File, start: int, stop: int) -> bool:
        """Copy ``[start, stop)`` with one read and one write; False if that is impossible.

        It is if the run is longer than :data:`SHORT`, contains a hole, or if a call fails:
        :meth:`move` then has the same failure and raises it.
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

    def _count(self, method: CopyMethod, length: int) -> None:
        self.moved[method] = self.moved.get(method, 0) + length

    def _check(self, method: CopyMethod, source: File, error: OSError, place: int) -> None:
        """Remember that ``method`` does not work from ``source``, or raise a real error."""
        if error.errno not in _CANNOT:
            verb = "clone" if method is CopyMethod.CLONE else "copy"
            raise FileError.of(self.target.path, f"{verb} at {place}", error) from error
        self._cannot.add((method, source.fd))

    def _pass_fault_points(self, source: File, start: int, stop: int) -> None:
        if faults.armed:
            for file, verb in ((source, "read"), (self.target, "write")):
                with file.doing(f"{verb} at {start}"):
                    file.fault_point(verb, start, stop - start)

    # Without moving bytes through this process

    def _clone_blocks(self, source: File, start: int, stop: int) -> bool:
        if (CopyMethod.CLONE, source.fd) in self._cannot:
            return False
        self._pass_fault_points(source, start, stop)
        request = struct.pack("qQQQ", source.fd, start, stop - start, start)
        try:
            fcntl.ioctl(self.target.fd, _FICLONERANGE, request)
        except OSError as error:
            self._check(CopyMethod.CLONE, source, error, start)
            return False
        return True

    def _copy_range(self, source: File, start: int, stop: int) -> int:
        """Copy to the end, or until the kernel cannot; returns where it has stopped."""
        if (CopyMethod.RANGE, source.fd) in self._cannot:
            return start
        self._pass_fault_points(source, start, stop)
        position = start
        while position < stop:
            step = min(RANGE_STEP, stop - position)
            try:
                done = os.copy_file_range(source.fd, self.target.fd, step, position, position)
            except OSError as error:
                self._check(CopyMethod.RANGE, source, error, position)
                break
            if done == 0:  # the source has become shorter: the plain copy reports it
                break
            position += done
        self._count(CopyMethod.RANGE, position - start)
        return position

    # From a mapping

    def _copy_mapped(self, source: File, start: int, stop: int) -> int:
        """Copy to the end, or until the source cannot be mapped; returns where it has stopped.

        What a mapping does not give, the plain copy reads, or reports why it cannot be read.
        """
        if (CopyMethod.MAP, source.fd) in self._cannot:
            return start
        self._pass_fault_points(source, start, stop)
        position = start
        while position < stop:
            end = min(stop, round_down(position, WINDOW) + WINDOW)
            if not self._write_mapped(source, position, end):
                break
            position = end
        self._count(CopyMethod.MAP, position - start)
        return position

    def _write_mapped(self, source: File, start: int, stop: int) -> bool:
        try:
            view = self._mapped.view(source, start, stop)
        except OSError:
            self._cannot.add((CopyMethod.MAP, source.fd))
            return False
        if view is None:
            return False
        try:
            with view:
                write_all(self.target.fd, view, start)
        except OSError as error:
            if error.errno == errno.EFAULT:  # a page of the source is gone or cannot be read
                return False
            action = f"write {stop - start} bytes at {start}"
            raise FileError.of(self.target.path, action, error) from error
        # The last page of a file that has become shorter shows zeros behind its end.
        return source.length >= stop

    # Through a buffer

    def _copy(self, source: File, start: int, stop: int) -> None:
        if start >= stop:
            return
        if self.copy_options.sparse:
            for offset in range(start, stop, len(self.buffer)):
                view = self.buffer[: stop - offset]
                source.read_into(view, offset)
                self._write_sparse(view, offset, self.copy_options.sparse, self._write_allocated)
        else:
            copy(source, self.target, start, stop, self.buffer)
        self._count(CopyMethod.BUFFER, stop - start)

    def _write_sparse(
        self, view: memoryview, offset: int, block: int, write: Callable[[memoryview, int], None]
    ) -> None:
        """Write what is not zero in ``view``; make blocks of zeros holes, unless ``block`` is 0."""
        position = 0
        for first, last in nonzero_runs(view, block) if block else [(0, len(view))]:
            self.target.make_zero(offset + position, offset + first)
            write(view[first:last], offset + first)
            position = last
        self.target.make_zero(offset + position, offset + len(view))

    def _write_allocated(self, view: memoryview, offset: int) -> None:
        if len(view) >= SPARSE_PREALLOCATE_FROM:
            self._allocate(offset, offset + len(view))
        self.target.write(view, offset)

    # Past the page cache

    def _copy_past_cache(self, source: File, start: int, stop: int) -> None:
        """Copy whole blocks directly, and less than a block at each end through the page cache.

        The ends are not synced and dropped from the cache: a worker's sync would take the error of
        a failed sync away from the parent.
        """
        first, last = round_up(start, DIRECT_BLOCK), round_down(stop, DIRECT_BLOCK)
        if first >= last or not self._copy_direct(source, first, last):
            self._copy(source, start, stop)
            return
        self._copy(source, start, first)
        self._copy(source, last, stop)

    def _copy_direct(self, source: File, start: int, stop: int) -> bool:
        if (CopyMethod.DIRECT, source.fd) in self._cannot:
            return False
        self._pass_fault_points(source, start, stop)
        block = round_up(self.copy_options.sparse, DIRECT_BLOCK)
        try:
            here = self._direct_fd(source)
            for offset in range(start, stop, DIRECT_STEP):
                view = self._direct_buffer[: stop - offset]
                _refuse_partial(os.preadv(here, [view], offset), view)
                self._write_sparse(view, offset, block, self._write_direct)
        except OSError as error:
            self._check(CopyMethod.DIRECT, source, error, start)
            return False
        self._count(CopyMethod.DIRECT, stop - start)
        return True

    def _write_direct(self, view: memoryview, offset: int) -> None:
        _refuse_partial(os.pwrite(self._direct_fd(self.target), view, offset), view)

    def _direct_fd(self, file: File) -> int:
        """A descriptor of the same file with O_DIRECT; the locks stay with the first descriptor."""
        if file.fd not in self._direct:
            mode = os.O_RDWR if file is self.target else os.O_RDONLY
            flags = mode | os.O_DIRECT | os.O_CLOEXEC
            self._direct[file.fd] = os.open(f"/proc/self/fd/{file.fd}", flags)
        return self._direct[file.fd]


def _refuse_partial(done: int, view: memoryview) -> None:
    if done != len(view):
        raise OSError(errno.EINVAL, "incomplete direct request")


def nonzero_runs(view: memoryview, block: int) -> Iterable[Run]:
    """The runs of blocks of ``block`` bytes in ``view`` that are not all zero."""
    end = len(view)
    heads = _heads(view, block)
    if 0 not in heads:
        return ((0, end),)
    if _is_zero(view):
        return ()
    return between(_zero_blocks(view, block, heads), 0, end)


def _heads(view: memoryview, block: int) -> list[int]:
    """The first 8 bytes of each block, as numbers; zeros if they cannot be had at once.

    They tell of most blocks that they are not zero.
    """
    if len(view) % 8:
        return [0] * -(-len(view) // block)
    return view.cast("Q")[:: block // 8].tolist()


@cache
def _zeros() -> memoryview:
    return new_buffer()


def _is_zero(view: memoryview) -> bool:
    """Whether all bytes of a part of a buffer are zeros.

    This compares memory; a search for a bit that is set takes four times as long.
    """
    return bitarray(buffer=view) == bitarray(buffer=_zeros()[: len(view)])


def _zero_blocks(view: memoryview, block: int, heads: list[int]) -> Iterator[Run]:
    """The blocks of zeros."""
    for number, head in enumerate(heads):
        if not head:
            start, stop = number * block, min((number + 1) * block, len(view))
            if _is_zero(view[start:stop]):
                yield start, stop
