"""Calls of the kernel that Python has no name for.

They are looked up at first use: most commands make none of them.
"""

from __future__ import annotations

import mmap
import os
from functools import cache
from typing import Any

_SYNC_FILE_RANGE_WRITE = 2
_MADV_POPULATE_READ = 22
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


def fallocate(fd: int, mode: int, start: int, stop: int) -> int:
    """Allocate or free ``[start, stop)`` as ``mode`` says; the error's number, 0 = done."""
    libc, get_errno = _libc()
    return 0 if libc.fallocate(fd, mode, start, stop - start) == 0 else int(get_errno())


def start_writing(fd: int, start: int, stop: int) -> None:
    """Let the disk begin to write what is dirty of ``[start, stop)``; waits for nothing.

    Makes nothing durable and takes no error away from the sync that follows.
    """
    libc, _ = _libc()
    libc.sync_file_range(fd, start, stop - start, _SYNC_FILE_RANGE_WRITE)


def has_in_memory(fd: int, start: int, stop: int) -> bool:
    """Whether the system has some page of ``[start, stop)`` of a file in its cache.

    ``start`` is a multiple of any page. Raises :class:`OSError`. A mapping is made for asking,
    and not looked into: that brings no page in.
    """
    libc, get_errno = _libc()
    length = stop - start
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    if address == -1:
        raise OSError(get_errno(), os.strerror(get_errno()))
    pages = bytearray(-(-length // mmap.PAGESIZE))
    try:
        if libc.mincore(address, length, _address_of(pages)):
            raise OSError(get_errno(), os.strerror(get_errno()))
    finally:
        libc.munmap(address, length)
    # Only the lowest bit of each byte is defined.
    return any(pages) and any(page & 1 for page in pages)


def peek(fd: int, view: memoryview, offset: int) -> bool:
    """Fill ``view`` from ``offset`` of a file through a mapping; false when it has to be read.

    A place that the disk does not give is a SIGBUS under a mapping: the pages are asked for
    first, which is an error where one is missing, and on systems that cannot ask like that.
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


def die_with_parent() -> None:
    """Let the system end this process at once when the one that started it ends."""
    libc, _ = _libc()
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def _address_of(buffer: bytearray) -> Any:
    import ctypes

    return ctypes.byref(ctypes.c_char.from_buffer(buffer))


@cache
def _libc() -> tuple[Any, Any]:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    place = ctypes.c_int64
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, place, place)
    libc.sync_file_range.argtypes = (ctypes.c_int, place, place, ctypes.c_uint)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.argtypes = (pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, place)
    libc.mmap.restype = ctypes.c_ssize_t
    libc.mincore.argtypes = (pointer, size, pointer)
    libc.munmap.argtypes = (pointer, size)
    return libc, ctypes.get_errno
