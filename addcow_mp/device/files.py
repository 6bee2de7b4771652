"""Open files, and the few ways in which bytes reach them.

A file is used by its descriptor from its opening on: what was checked is what is written.
Data is read and written by position (pread, pwrite), never through a writable mapping: a
store into a mapping of a full disk is a SIGBUS, a pwrite is an ENOSPC.

A file remembers when a sync of it failed. After one failure the kernel forgets which pages
did not reach the disk, so a second sync would succeed and prove nothing: :meth:`File.sync`
then refuses for good.

Every operation is a fault point, named by the file's role.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from addcow_mp.device import faults, holes, syscalls
from addcow_mp.device.location import base_path, real_path
from addcow_mp.device.permissions import EVERYBODY, Readers, settle
from addcow_mp.errors import AddcowError, FileError, ImageError, NoLocksError, SyncError
from addcow_mp.format.bitmap import write_all
from addcow_mp.units import MAX_SIZE, KiB, MiB, round_up

#: One buffer to copy or hash through: small enough to stay in the processor's cache between read
#: and write, and a sixth faster than 256 KiB, which are four calls for one.
BUFFER_SIZE = 1 * MiB

_ZEROS = bytes(64 * KiB)

#: Answers that mean "there are no locks here"; a sandbox answers EPERM.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


def new_buffer(size: int = BUFFER_SIZE) -> memoryview:
    """Memory to read into again and again, in whole pages.

    A bytearray of this size begins 16 bytes behind a page: copying through it takes a quarter
    longer, hashing from it a sixth. Making one costs more than a small copy: keep it.
    """
    try:
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise MemoryError from error


#: What a file is in its chain: names its fault points.
COW, IMAGE, BACKING, TARGET = "cow", "image", "backing", "target"


class File:
    """An open file. Offsets and lengths are in bytes.

    Picklable to a process that is being started, which receives a duplicate of the
    descriptor, not the path to open again: locks stay held until the last process that
    could write has ended.
    """

    def __init__(self, path: str, fd: int, *, writable: bool) -> None:
        self.path = path
        self.fd = fd
        self.writable = writable
        self.role = BACKING
        #: Whether syncs are carried out.
        self.durable = True
        #: Lets go of locks before the file is closed; a duplicate in a worker has none.
        self.let_go: Callable[[], None] | None = None
        #: Of the overlay that is worked on: fault rules count in its clusters.
        self.cluster_size = 64 * KiB
        self._sync_error: OSError | None = None

    @classmethod
    def create(cls, path: str, readers: Readers = EVERYBODY) -> File:
        """Create a file that must not exist yet, for ``readers``, and open it for writing."""
        try:
            if faults.armed:
                faults.hit("create")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, readers.mode)
            settle(fd, readers)
        except FileExistsError as error:
            raise it_exists(path) from error
        except (OSError, ValueError) as error:
            raise cannot_open(path, "create it", error) from error
        return cls(path, fd, writable=True)

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        state = {"role": self.role, "durable": self.durable, "cluster_size": self.cluster_size}
        return (_received, (self.path, DupFd(self.fd), self.writable), state)

    # What it is

    @property
    def status(self) -> os.stat_result:
        """What the system says of the file; a file system that has died says nothing."""
        try:
            return os.fstat(self.fd)
        except OSError as error:
            raise FileError.of(self.path, "look at it", error) from error

    @property
    def length(self) -> int:
        """The file's length, or the device's size, at this moment."""
        status = self.status
        if stat.S_ISBLK(status.st_mode):
            with self.doing("look at its size"):
                return os.lseek(self.fd, 0, os.SEEK_END)
        return status.st_size

    @property
    def is_device(self) -> bool:
        """Whether it is a block device, whose length nobody can change."""
        return is_device(self.identity)

    @property
    def identity(self) -> tuple[int, int]:
        """The same for every name of one file: device and inode, or the device itself."""
        return identity_of(self.status)

    @cached_property
    def real(self) -> str:
        """The path at which the file lies, without links."""
        return real_path(self.fd, self.path)

    @cached_property
    def base(self) -> str:
        """The path that names inside the file are relative to."""
        return base_path(self.path, self.real)

    @property
    def allocated(self) -> int:
        """Bytes of disk that the file takes."""
        return self.status.st_blocks * 512

    @property
    def free_space(self) -> int:
        """Bytes that can still be written to the file system of this file."""
        with self.doing("look at its file system"):
            return free_bytes(os.fstatvfs(self.fd))

    @property
    def block_size(self) -> int:
        """Bytes in a block of its file system: extents begin at multiples of it."""
        with self.doing("look at its file system"):
            return os.fstatvfs(self.fd).f_frsize

    def close(self) -> None:
        """Let go of locks and close the descriptor; calling it twice does no harm."""
        if self.fd < 0:
            return
        if self.let_go is not None:
            # A mapping of the file has a duplicate of the descriptor, which would hold locks.
            with contextlib.suppress(OSError):
                self.let_go()
        fd, self.fd = self.fd, -1
        with self.doing("close it"):
            os.close(fd)

    @contextlib.contextmanager
    def doing(self, action: str) -> Iterator[None]:
        """Turn an :class:`OSError` of the block into a :class:`FileError` naming this file."""
        try:
            yield
        except OSError as error:
            raise FileError.of(self.path, action, error) from error

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self.cluster_size, -(-(offset + length) // self.cluster_size)

    # Reading and writing

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on; the file must be that long."""
        length, start = len(view), offset
        try:
            if faults.armed:
                self.meet_read(offset, length)
            while view:
                done = os.preadv(self.fd, [view], offset)
                if done == 0:
                    raise ended_early()
                view, offset = view[done:], offset + done
        except OSError as error:
            raise FileError.of(self.path, f"read {length} bytes at {start}", error) from error

    def meet(self, verb: str, offset: int, length: int) -> int:
        """Pass the fault point of this role and ``verb``; returns how much may be done."""
        if not faults.armed:
            return length
        role = "header" if self.role == COW else self.role
        return faults.cut(f"{role}_{verb}", length, self._clusters(offset, length))

    def meet_read(self, offset: int, length: int) -> None:
        """Pass the fault point of reading: a read that is cut short has failed."""
        if self.meet("read", offset, length) < length:
            raise faults.failure()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        with self.doing(f"write {len(data)} bytes at {offset}"):
            allowed = self.meet("write", offset, len(data))
            write_all(self.fd, memoryview(data)[:allowed], offset)
            if allowed < len(data):
                raise faults.failure()

    def make_zero(self, start: int, stop: int) -> None:
        """Make the bytes ``[start, stop)`` read as zeros, freeing their space where possible.

        A hole already reads as zeros and is left alone. The length never changes.
        """
        for first, last in self.data_runs(start, stop):
            if not self._punched(first, last):
                self._write_zeros(first, last)

    def next_data(self, position: int) -> int | None:
        """The first byte at or behind ``position`` that is not in a hole; None when none is."""
        try:
            return holes.next_data(self.fd, position)
        except OSError as error:
            raise FileError.of(self.path, f"look for data from {position} on", error) from error

    def data_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of ``[start, stop)`` that are not in a hole, in order."""
        try:
            yield from holes.data_runs(self.fd, start, stop)
        except OSError as error:
            raise FileError.of(self.path, f"look for data from {start} on", error) from error

    def punch(self, start: int, stop: int) -> None:
        """Free the space of ``[start, stop)`` where the file system can; the length stays."""
        if start < stop and next(self.data_runs(start, stop), None):
            # Only whole blocks are freed; that of the file's end is one if all of it is named.
            end = round_up(stop, self.block_size) if stop == self.length else stop
            self._punched(start, min(end, MAX_SIZE))

    def _punched(self, start: int, stop: int) -> bool:
        with self.doing(f"free {stop - start} bytes at {start}"):
            if faults.armed:
                faults.hit("punch", self._clusters(start, stop - start))
            return holes.punch(self.fd, start, stop)

    def _write_zeros(self, start: int, stop: int) -> None:
        for offset in range(start, stop, len(_ZEROS)):
            self.write(memoryview(_ZEROS)[: stop - offset], offset)

    def grow(self, length: int) -> None:
        """Lengthen the file to ``length`` with zeros behind its last byte; never cut it."""
        with self.doing(f"grow it to {length} bytes"):
            if self.length < length:
                os.ftruncate(self.fd, length)

    def start_writing(self, start: int, stop: int) -> None:
        """Let the disk begin with ``[start, stop)``, if it will be synced later anyhow."""
        if self.durable:
            syscalls.start_writing(self.fd, start, stop)

    def sync(self) -> None:
        """Make the file's data durable. Final when it fails: see :class:`SyncError`."""
        if not self.durable:
            return
        try:
            if self._sync_error is not None:
                raise self._sync_error
            if faults.armed:
                faults.hit("bitmap_sync" if self.role == COW else "data_sync")
            os.fdatasync(self.fd)
        except OSError as error:
            self._sync_error = error
            # What the cache still shows is not what the disk holds: show the disk's.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            raise SyncError.of(self.path, "make its data durable", error) from error


def _received(path: str, duplicate: Any, writable: bool) -> File:
    return File(path, duplicate.detach(), writable=writable)


def ended_early() -> OSError:
    """The error for a file that is shorter than it was when it was opened."""
    return OSError(errno.EIO, "the file ends early; was it cut short meanwhile?")


def it_exists(path: str) -> ImageError:
    """The error for a path at which a new file should be made, and something is."""
    problem = "it exists already, and is never overwritten; name a new file"
    return ImageError(path=path, problem=problem)


def cannot_open(path: str, action: str, error: OSError | ValueError) -> FileError:
    """The error for a path that could not be opened; a NUL byte in it is a ValueError."""
    known = error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))
    return FileError.of(path, action, known)


#: No file system has this number.
_DEVICE = -1


def device_identity(device: int) -> tuple[int, int]:
    """The identity of the block device of this number."""
    return _DEVICE, device


def is_device(identity: tuple[int, int]) -> bool:
    """Whether this is the identity of a block device."""
    return identity[0] == _DEVICE


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """Device and inode of a file; for a block device, under any name, the device itself."""
    if stat.S_ISBLK(status.st_mode):
        return device_identity(status.st_rdev)
    return status.st_dev, status.st_ino


def identity_at(path: str) -> tuple[int, int] | None:
    """That of the file at ``path``; None when there is none to be seen."""
    try:
        return identity_of(os.stat(path))
    except OSError:
        return None


def free_bytes(status: os.statvfs_result) -> int:
    """Bytes that we can still write to a file system of this ``status``."""
    blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
    return blocks * status.f_frsize


def kind_of(mode: int) -> str:
    """What a file of this ``st_mode`` is, in words."""
    kinds = (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((words for test, words in kinds if test(mode)), "a special file")


def sync_directory(path: str) -> None:
    """Make the directory entry of the file at ``path`` durable."""
    directory = os.path.dirname(path) or "."
    try:
        if faults.armed:
            faults.hit("directory_sync")
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        path = os.path.abspath(directory)
        raise SyncError.of(path, "make the directory durable", error) from error


def sync_entry(path: str, action: str, otherwise: str) -> None:
    """Make durable what has become of the name of the file at ``path``, by ``action``.

    Raises :class:`FileError`, which says what may be ``otherwise``: it is done already.
    """
    try:
        sync_directory(path)
    except SyncError as error:
        reason = f"{error.fields['reason']}; {otherwise} after a power cut"
        raise FileError(path=path, action=action, reason=reason) from error


def cannot_lock(path: str, error: OSError) -> AddcowError:
    """The error for a file that could not be locked; where there are no locks, with the way out."""
    if error.errno in _NO_LOCKS:
        return NoLocksError(path=path, reason=error.strerror or str(error))
    return FileError.of(path, "lock it", error)


def claim_alone(path: str, fd: int, *, locking: bool = True) -> bool:
    """Hold an open file against others of this program that do the same, until it is closed.

    False when somebody holds it. Without ``locking`` a file system that has no locks will do.
    Raises :class:`NoLocksError`, :class:`FileError`.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if locking or error.errno not in _NO_LOCKS:
            raise cannot_lock(path, error) from error
    return True


def copy(source: File, target: File, start: int, stop: int, buffer: memoryview) -> None:
    """Copy the bytes ``[start, stop)`` between two files at the same offset."""
    preadv, here, there, size = os.preadv, source.fd, target.fd, len(buffer)
    while start < stop:
        part = buffer if stop - start >= size else buffer[: stop - start]
        try:
            if faults.armed:
                source.meet_read(start, len(part))
            done = preadv(here, [part], start)
            if done == 0:
                raise ended_early()
        except OSError as error:
            raise FileError.of(source.path, f"read at {start}", error) from error
        if done < len(part):
            part = part[:done]
        if faults.armed:
            target.write(part, start)
        else:
            _write_part(target, there, part, start)
        start += done


def _write_part(target: File, fd: int, part: memoryview, start: int) -> None:
    try:
        write_all(fd, part, start)
    except OSError as error:
        raise FileError.of(target.path, f"write at {start}", error) from error
