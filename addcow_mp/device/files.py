"""Open files, and the few ways in which bytes reach them.

Every image file is opened here, once, without ever hanging or following a device,
and is used by its descriptor from then on: what was checked is what is written.
Data is read and written by position (pread, pwrite), never through a writable
mapping: a store into a mapping of a full disk is a SIGBUS, a pwrite is an ENOSPC.

A file remembers when a sync of it failed. After one failure the kernel forgets
which pages did not reach the disk, so a second sync would succeed and prove
nothing: :meth:`File.sync` then refuses for good.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Any

from addcow_mp.device import holes
from addcow_mp.errors import FileError, ImageError, SyncError
from addcow_mp.format.bitmap import write_all
from addcow_mp.units import KiB

#: One copy buffer: small enough to stay in the processor's cache between read and write.
BUFFER_SIZE = 256 * KiB

_ZEROS = bytes(64 * KiB)


class File:
    """An open regular file. Offsets and lengths are in bytes.

    Picklable to a process that is being started, which receives a duplicate of
    the descriptor, not the path to open again: locks stay held until the last
    process that could write has ended.
    """

    def __init__(self, path: str, fd: int, *, writable: bool) -> None:
        self.path = path
        self.fd = fd
        self.writable = writable
        self._sync_error: OSError | None = None

    @classmethod
    def open(cls, path: str, *, writable: bool = False) -> File:
        """Open an existing regular file; anything else is refused without waiting on it."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its other end.
            fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise FileError.of(path, "open it", error) from error
        file = cls(path, fd, writable=writable)
        try:
            file._refuse_unless_regular()
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def create(cls, path: str) -> File:
        """Create a file that must not exist yet, and open it for writing."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError as error:
            raise ImageError(
                path=path, problem="it exists already, and is never overwritten; name a new file"
            ) from error
        except OSError as error:
            raise FileError.of(path, "create it", error) from error
        return cls(path, fd, writable=True)

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return (_received, (self.path, DupFd(self.fd), self.writable))

    def _refuse_unless_regular(self) -> None:
        mode = os.fstat(self.fd).st_mode
        if not stat.S_ISREG(mode):
            raise ImageError(path=self.path, problem=f"it is {kind_of(mode)}, not a regular file")

    @property
    def length(self) -> int:
        """The file's length at this moment."""
        return os.fstat(self.fd).st_size

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: the same for every name of one file."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    @property
    def allocated(self) -> int:
        """Bytes of disk that the file takes."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor; calling it twice does no harm."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    @contextlib.contextmanager
    def doing(self, action: str) -> Iterator[None]:
        """Turn an :class:`OSError` of the block into a :class:`FileError` naming this file."""
        try:
            yield
        except OSError as error:
            raise FileError.of(self.path, action, error) from error

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on; the file must be that long."""
        with self.doing(f"read {len(view)} bytes at {offset}"):
            while view:
                done = os.preadv(self.fd, [view], offset)
                if done == 0:
                    raise OSError(errno.EIO, "the file ends early; was it cut short meanwhile?")
                view, offset = view[done:], offset + done

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        with self.doing(f"write {len(data)} bytes at {offset}"):
            write_all(self.fd, data, offset)

    def make_zero(self, start: int, stop: int) -> None:
        """Make the bytes ``[start, stop)`` read as zeros, freeing their space where possible.

        A hole already reads as zeros and is left alone. The length never changes.
        """
        for first, last in holes.data_runs(self.fd, start, stop):
            if not self._punched(first, last):
                self._write_zeros(first, last)

    def punch(self, start: int, stop: int) -> None:
        """Free the space of ``[start, stop)`` where the file system can; the length stays."""
        if start < stop and next(holes.data_runs(self.fd, start, stop), None):
            self._punched(start, stop)

    def _punched(self, start: int, stop: int) -> bool:
        with self.doing(f"free {stop - start} bytes at {start}"):
            return holes.punch(self.fd, start, stop)

    def _write_zeros(self, start: int, stop: int) -> None:
        for offset in range(start, stop, len(_ZEROS)):
            self.write(memoryview(_ZEROS)[: stop - offset], offset)

    def grow(self, length: int, *, seen: int) -> None:
        """Lengthen the file to ``length`` with zeros from byte ``seen`` on.

        The bytes between ``seen``, the old virtual size, and the old end were in
        nobody's view and may hold anything: they are zeroed before they come into it.
        """
        with self.doing(f"grow it to {length} bytes"):
            self._write_zeros(seen, min(self.length, length))
            if self.length < length:
                os.ftruncate(self.fd, length)

    def sync(self) -> None:
        """Make the file's data durable. Final when it fails: see :class:`SyncError`."""
        try:
            if self._sync_error is not None:
                raise self._sync_error
            os.fdatasync(self.fd)
        except OSError as error:
            self._sync_error = error
            # What the cache still shows is not what the disk holds: show the disk's.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            raise SyncError.of(self.path, "make its data durable", error) from error


def _received(path: str, duplicate: Any, writable: bool) -> File:
    return File(path, duplicate.detach(), writable=writable)


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
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise SyncError.of(directory, "make the directory durable", error) from error


def copy(source: File, target: File, start: int, stop: int, buffer: memoryview) -> None:
    """Copy the bytes ``[start, stop)`` between two files at the same offset."""
    preadv, pwrite, here, there = os.preadv, os.pwrite, source.fd, target.fd
    size = len(buffer)
    while start < stop:
        part = buffer if stop - start >= size else buffer[: stop - start]
        try:
            done = preadv(here, [part], start)
        except OSError as error:
            raise FileError.of(source.path, f"read at {start}", error) from error
        if done == 0:
            shrunk = OSError(errno.EIO, "the file ends early; was it cut short meanwhile?")
            raise FileError.of(source.path, f"read at {start}", shrunk)
        try:
            if pwrite(there, part[:done] if done < len(part) else part, start) != done:
                write_all(there, part[:done], start)
        except OSError as error:
            raise FileError.of(target.path, f"write at {start}", error) from error
        start += done
