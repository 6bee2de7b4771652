"""Open files, and the ways in which bytes are written to them.

A file is used through its descriptor from the moment it is opened, so the file that was checked is
the file that is written. Data is read and written by position (pread, pwrite), never through a
writable mapping: on a full disk, a store into a mapping is a SIGBUS, a pwrite is an ENOSPC.

A file remembers that a sync of it failed. After a failure the kernel forgets which pages did not
reach the disk, so a second sync would succeed and prove nothing: :meth:`File.sync` then always
fails.

Every operation is a fault point, named after the file's role.
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
from addcow_mp.device.permissions import EVERYBODY, Readers, set_readers
from addcow_mp.device.turns import waiting
from addcow_mp.errors import AddcowError, FileError, ImageError, NoLocksError, SyncError
from addcow_mp.format.bitmap import write_all
from addcow_mp.units import MAX_SIZE, KiB, MiB, round_up

#: One buffer to copy or hash through: it fits the processor's cache, and is a sixth faster than
#: 256 KiB, which needs four times as many calls.
BUFFER_SIZE = 1 * MiB

_ZEROS = bytes(64 * KiB)

#: Answers of a file system or a sandbox without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)

#: The role of a file in its chain: the first part of the names of its fault points.
COW, IMAGE, BACKING, TARGET, TWIN = "cow", "image", "backing", "target", "twin"


class _Doing:
    """A context of which an :class:`OSError` becomes a :class:`FileError`.

    A class, because a job enters a hundred of them: a generator takes three times as long.
    """

    __slots__ = ("_action", "_path")

    def __init__(self, path: str, action: str) -> None:
        self._path = path
        self._action = action

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, OSError):
            raise FileError.of(self._path, self._action, error) from error


def new_buffer(size: int = BUFFER_SIZE) -> memoryview:
    """A reusable buffer in whole pages.

    A bytearray of this size begins 16 bytes behind a page, which makes copying a quarter slower and
    hashing a sixth. Making a buffer costs more than a small copy, so callers keep it.
    """
    try:
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise MemoryError from error


class File:
    """An open file. Offsets and lengths are in bytes.

    A file can be pickled for a process that is being started, which receives a duplicate of the
    descriptor and does not open the path again. So locks are held until the last process that could
    write has ended.
    """

    def __init__(self, path: str, fd: int, *, writable: bool) -> None:
        self.path = path
        self.fd = fd
        self.writable = writable
        self.role = BACKING
        #: Whether syncs are carried out.
        self.durable = True
        #: Releases the locks before the file is closed; None in a worker's duplicate.
        self.release_locks: Callable[[], None] | None = None
        #: Whether locks keep other programs from writing the file; false in a worker's duplicate.
        self.excludes_writers = False
        #: Cluster size of the overlay in use: fault rules count in its clusters.
        self.cluster_size = 64 * KiB
        self._sync_error: OSError | None = None

    @classmethod
    def create(cls, path: str, readers: Readers = EVERYBODY) -> File:
        """Create a new file that only ``readers`` may read, and open it for writing."""
        try:
            if faults.armed:
                faults.hit("create")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, readers.mode)
            set_readers(fd, readers)
        except FileExistsError as error:
            raise it_exists(path) from error
        except (OSError, ValueError) as error:
            raise cannot_open(path, "create it", error) from error
        return cls(path, fd, writable=True)

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        state = {"role": self.role, "durable": self.durable, "cluster_size": self.cluster_size}
        return (_received, (self.path, DupFd(self.fd), self.writable), state)

    # Properties

    @property
    def status(self) -> os.stat_result:
        """The result of fstat. Raises :class:`FileError` if the file system has died."""
        with self.doing("look at it"):
            return os.fstat(self.fd)

    @cached_property
    def first_status(self) -> os.stat_result:
        """The first result of fstat. Kind, device and inode stay while the file is open."""
        return self.status

    @property
    def length(self) -> int:
        """The current length of the file, or the size of the device."""
        status = self.status
        if stat.S_ISBLK(status.st_mode):
            with self.doing("look at its size"):
                return os.lseek(self.fd, 0, os.SEEK_END)
        return status.st_size

    @cached_property
    def identity(self) -> tuple[int, int]:
        """The same for every name of one file: device and inode, or the device itself."""
        return identity_of(self.first_status)

    @cached_property
    def real(self) -> str:
        """The file's path without links."""
        return real_path(self.fd, self.path)

    @cached_property
    def base(self) -> str:
        """The path that names inside the file are relative to."""
        return base_path(self.path, self.real)

    @property
    def allocated(self) -> int:
        """Bytes of disk space that the file uses."""
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
        """Release the locks and close the descriptor; a second call does nothing."""
        if self.fd < 0:
            return
        if self.release_locks is not None:
            # A mapping of the file has a duplicate of the descriptor, which would keep the locks.
            with contextlib.suppress(OSError):
                self.release_locks()
        fd, self.fd = self.fd, -1
        with self.doing("close it"):
            os.close(fd)

    def doing(self, action: str) -> _Doing:
        """Turn an :class:`OSError` of the block into a :class:`FileError` that names this file."""
        return _Doing(self.path, action)

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self.cluster_size, -(-(offset + length) // self.cluster_size)

    # Reading and writing

    def fault_point(self, verb: str, offset: int, length: int, *, partial: bool = False) -> int:
        """Apply the fault rules for ``verb``; returns how many bytes to process before failing.

        Raises :class:`OSError`. The result is below ``length`` only with ``partial``.
        """
        role = "header" if self.role == COW else self.role
        allowed = faults.cut(f"{role}_{verb}", length, self._clusters(offset, length))
        if allowed < length and not partial:
            raise faults.failure()
        return allowed

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on; the file must be that long."""
        length, start = len(view), offset
        try:
            if faults.armed:
                self.fault_point("read", offset, length)
            while (done := os.preadv(self.fd, [view], offset)) < len(view):
                if done == 0:
                    raise ended_early()
                view, offset = view[done:], offset + done
        except OSError as error:
            raise FileError.of(self.path, f"read {length} bytes at {start}", error) from error

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        length = allowed = len(data)
        try:
            if faults.armed:
                allowed = self.fault_point("write", offset, length, partial=True)
                data = memoryview(data)[:allowed]
            write_all(self.fd, data, offset)
            if allowed < length:
                raise faults.failure()
        except OSError as error:
            raise FileError.of(self.path, f"write {length} bytes at {offset}", error) from error

    def make_zero(self, start: int, stop: int) -> None:
        """Make the bytes ``[start, stop)`` read as zeros, freeing their space if possible.

        Holes are left alone. The length never changes.
        """
        for first, last in self.data_runs(start, stop):
            if not self._punched(first, last):
                for offset in range(first, last, len(_ZEROS)):
                    self.write(memoryview(_ZEROS)[: last - offset], offset)

    def next_data(self, position: int) -> int | None:
        """The first byte at or behind ``position`` that is not in a hole, if any."""
        with self.doing(f"look for data from {position} on"):
            return holes.next_data(self.fd, position)

    def data_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of ``[start, stop)`` that are not in a hole, in order."""
        try:
            yield from holes.data_runs(self.fd, start, stop)
        except OSError as error:
            raise FileError.of(self.path, f"look for data from {start} on", error) from error

    def punch(self, start: int, stop: int) -> None:
        """Free the space of ``[start, stop)`` if the file system can; the length stays."""
        if start < stop and next(self.data_runs(start, stop), None):
            # Only whole blocks are freed: the range has to include all of the file's last block.
            end = round_up(stop, self.block_size) if stop == self.length else stop
            self._punched(start, min(end, MAX_SIZE))

    def _punched(self, start: int, stop: int) -> bool:
        with self.doing(f"free {stop - start} bytes at {start}"):
            if faults.armed:
                faults.hit("punch", self._clusters(start, stop - start))
            with waiting():
                return holes.punch(self.fd, start, stop)

    def grow(self, length: int) -> None:
        """Lengthen the file to ``length`` with zeros; never shorten it."""
        with self.doing(f"grow it to {length} bytes"):
            if self.length < length:
                if faults.armed and self.role == COW:
                    faults.hit("bitmap_grow")
                with waiting():
                    os.ftruncate(self.fd, length)

    def cut(self, length: int) -> None:
        """Set the length, which is not above the present one."""
        with self.doing(f"cut it to {length} bytes"):
            if faults.armed:
                faults.hit("bitmap_cut" if self.role == COW else "image_cut")
            with waiting():
                os.ftruncate(self.fd, length)

    def set_length(self, length: int) -> None:
        """Lengthen the file with zeros, or cut it."""
        with self.doing(f"set its length to {length} bytes"):
            if faults.armed:
                faults.hit("resize")
            os.ftruncate(self.fd, length)

    def start_writing(self, start: int, stop: int) -> None:
        """Start writing ``[start, stop)`` to disk, if the file will be synced."""
        if self.durable:
            syscalls.start_writing(self.fd, start, stop)

    def sync(self, *, attributes: bool = False) -> None:
        """Make the file's data durable. Raises :class:`SyncError`, and then at every call.

        With ``attributes``: mode and flags as well.
        """
        if not self.durable:
            return
        try:
            if self._sync_error is not None:
                raise self._sync_error
            if faults.armed:
                faults.hit("bitmap_sync" if self.role == COW else "data_sync")
            with waiting():
                (os.fsync if attributes else os.fdatasync)(self.fd)
        except OSError as error:
            self._sync_error = error
            # The cache still shows data that the disk does not have: drop it.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            raise SyncError.of(self.path, "make its data durable", error) from error


def _received(path: str, duplicate: Any, writable: bool) -> File:
    return File(path, duplicate.detach(), writable=writable)


def ended_early() -> OSError:
    """The error for a file that has become shorter since it was opened."""
    return OSError(errno.EIO, "the file ends early; was it cut short meanwhile?")


def it_exists(path: str) -> ImageError:
    """The error for a new file whose path is already in use."""
    problem = "it exists already, and is never overwritten; name a new file"
    return ImageError(path=path, problem=problem)


def cannot_open(path: str, action: str, error: OSError | ValueError) -> FileError:
    """The error for a path that could not be opened; a NUL byte in it is a ValueError."""
    known = error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))
    return FileError.of(path, action, known)


#: Stands for the file system in the identity of a device; no file system has this number.
_DEVICE = -1


def device_identity(device: int) -> tuple[int, int]:
    """The identity of the block device with this number."""
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
    """The identity of the file at ``path``; None if stat fails."""
    try:
        return identity_of(os.stat(path))
    except (OSError, ValueError):
        return None


def free_bytes(status: os.statvfs_result) -> int:
    """Bytes that this user can still write to the file system of ``status``."""
    blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
    return blocks * status.f_frsize


def kind_of(mode: int) -> str:
    """The kind of file that ``st_mode`` describes, in words."""
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
    """Make the directory entry of the file at ``path`` durable. Raises :class:`SyncError`."""
    directory = os.path.dirname(path) or "."
    try:
        if faults.armed:
            faults.hit("directory_sync")
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with waiting():
                os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        path = os.path.abspath(directory)
        raise SyncError.of(path, "make the directory durable", error) from error


def sync_entry(path: str, action: str, otherwise: str) -> None:
    """Make durable that ``action`` has changed the name of the file at ``path``.

    Raises :class:`FileError`, which says what may be true ``otherwise`` after a power cut: the
    change itself is done already.
    """
    try:
        sync_directory(path)
    except SyncError as error:
        reason = f"{error.fields['reason']}; {otherwise} after a power cut"
        raise FileError(path=path, action=action, reason=reason) from error


def cannot_lock(path: str, error: OSError) -> AddcowError:
    """The error for a file that could not be locked, because of ``error``."""
    if error.errno in _NO_LOCKS:
        return NoLocksError(path=path, reason=error.strerror or str(error))
    return FileError.of(path, "lock it", error)


def claim_alone(path: str, fd: int, *, locking: bool = True) -> bool:
    """Lock an open file against other processes of this program, until it is closed.

    False if another process holds the lock. Without ``locking``, a file system without locks is
    accepted. Raises :class:`NoLocksError`, :class:`FileError`.
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
    """Copy the bytes ``[start, stop)`` to the same offset of ``target`` through ``buffer``."""
    for offset in range(start, stop, len(buffer)):
        part = buffer[: stop - offset]
        source.read_into(part, offset)
        target.write(part, offset)
