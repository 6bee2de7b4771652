"""System calls that Python does not offer.

libc is loaded at the first call, because most commands make none.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from functools import cache
from typing import Any

#: The answers of a file system that cannot allocate or free a part of a file.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)

_SYNC_FILE_RANGE_WRITE = 2
_MADV_POPULATE_READ = 22
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9

_AT_EMPTY_PATH, _STATX_BTIME = 0x1000, 0x800
#: The size of struct statx, and the offsets of its mask and of the time of birth.
_STATX_SIZE, _MASK_AT, _BIRTH_AT = 256, 0, 80

_OPENAT2 = 437  # the same number on every architecture
_AT_FDCWD = -100
_RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x04, 0x08


def openat2(directory: int, relative: str, flags: int) -> int | None:
    """Open ``relative`` beneath ``directory`` without following any link.

    None if the system does not have the call. Raises :class:`OSError`.
    """
    try:
        return _openat2(directory, relative, flags, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM) and not _has_openat2():
            return None
        raise


def _openat2(directory: int, relative: str, flags: int, resolve: int) -> int:
    libc, ctypes = _libc()
    how = (ctypes.c_uint64 * 3)(flags, 0, resolve)
    size = ctypes.sizeof(how)
    fd: int = libc.syscall(_OPENAT2, directory, os.fsencode(relative), how, size)
    if fd < 0:
        raise _error()
    return fd


@cache
def _has_openat2() -> bool:
    """Whether the call works: a sandbox answers EPERM to calls that it does not know."""
    try:
        os.close(_openat2(_AT_FDCWD, "/", os.O_PATH | os.O_CLOEXEC, 0))
    except OSError:
        return False
    return True


def fallocate(fd: int, mode: int, start: int, stop: int) -> bool:
    """Allocate or free ``[start, stop)`` as ``mode`` says; False if that is not supported.

    Raises :class:`OSError`.
    """
    libc, _ = _libc()
    if libc.fallocate(fd, mode, start, stop - start) == 0:
        return True
    error = _error()
    if error.errno not in _UNSUPPORTED:
        raise error
    return False


def start_writing(fd: int, start: int, stop: int) -> None:
    """Start writing the dirty pages of ``[start, stop)`` to disk; does not wait.

    It makes nothing durable and hides no error from the sync that follows.
    """
    libc, _ = _libc()
    libc.sync_file_range(fd, start, stop - start, _SYNC_FILE_RANGE_WRITE)


def is_cached(fd: int, start: int, stop: int) -> bool:
    """Whether the page cache holds a page of ``[start, stop)`` of a file; ``start`` begins a page.

    Raises :class:`OSError`. The mapping that it makes is not read, which would load pages.
    """
    libc, ctypes = _libc()
    length = stop - start
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    if address == -1:
        raise _error()
    pages = bytearray(-(-length // mmap.PAGESIZE))
    try:
        if libc.mincore(address, length, ctypes.byref(ctypes.c_char.from_buffer(pages))):
            raise _error()
    finally:
        libc.munmap(address, length)
    # Only the lowest bit of each byte is defined.
    return any(pages) and any(page & 1 for page in pages)


def read_mapped(fd: int, view: memoryview, offset: int) -> bool:
    """Fill ``view`` from ``offset`` of a file through a mapping; False if that is impossible.

    The pages are populated first. A bad sector is then an error, and not a SIGBUS; systems that
    cannot populate return an error too.
    """
    base = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - base + len(view)
    try:
        window = mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=base)
        window.madvise(_MADV_POPULATE_READ)
    except (OSError, ValueError):
        return False
    view[:] = memoryview(window)[offset - base :]
    return True


def populate(window: mmap.mmap) -> None:
    """Read all pages of a mapping. Raises :class:`OSError` for one that cannot be read.

    Older systems (before Linux 5.14) do nothing.
    """
    try:
        window.madvise(_MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def birth_time(fd: int) -> int:
    """The time at which the file was created, in nanoseconds; 0 if it is not recorded."""
    libc, ctypes = _libc()
    answer = bytearray(_STATX_SIZE)
    place = ctypes.byref(ctypes.c_char.from_buffer(answer))
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, place):
        return 0
    (mask,) = struct.unpack_from("I", answer, _MASK_AT)
    seconds, nanoseconds = struct.unpack_from("qI", answer, _BIRTH_AT)
    return int(seconds * 10**9 + nanoseconds) if mask & _STATX_BTIME else 0


def die_with_parent() -> None:
    """Make the system kill this process when its parent process ends."""
    libc, _ = _libc()
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def _error() -> OSError:
    """The error of the call that has just failed."""
    number = _libc()[1].get_errno()
    return OSError(number, os.strerror(number))


@cache
def _libc() -> tuple[Any, Any]:
    """The C library, and the module ctypes."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    number, offset = ctypes.c_int, ctypes.c_int64
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    libc.syscall.argtypes = (ctypes.c_long, number, ctypes.c_char_p, pointer, size)
    libc.syscall.restype = ctypes.c_long
    libc.fallocate.argtypes = (number, number, offset, offset)
    libc.sync_file_range.argtypes = (number, offset, offset, ctypes.c_uint)
    libc.mmap.argtypes = (pointer, size, number, number, number, offset)
    libc.mmap.restype = ctypes.c_ssize_t
    libc.mincore.argtypes = (pointer, size, pointer)
    libc.munmap.argtypes = (pointer, size)
    return libc, ctypes
