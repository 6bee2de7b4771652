"""Dropping a file from the page cache, so that reading it asks the disk.

Written data is read back from the page cache, which proves nothing about the disk. The kernel may
ignore the request to drop a file, and keeps pages that a program has mapped, so the cache is
checked afterwards. Files on a file system in memory are stored nowhere else and are accepted.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

from addcow_mp.device import syscalls
from addcow_mp.device.files import File
from addcow_mp.device.filesystem import filesystem_of
from addcow_mp.errors import ImageError
from addcow_mp.format.bits import Run
from addcow_mp.units import GiB, round_down

#: Bytes checked by one call, whose answer takes a byte for each page.
STEP = 1 * GiB

#: Attempts to drop a file: pages that are being written stay at first.
TRIES = 5

_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")


def drop_cached(file: File) -> None:
    """Make later reads of ``file`` return what is stored. This process must have no mapping of it.

    The file is synced first, even if it is not ``durable``: only stored data can be dropped. Raises
    :class:`FileError` if pages stay in the cache.
    """
    with file.doing("make its data durable"):
        os.fsync(file.fd)
    with file.doing("drop it from memory"):
        if not _is_dropped(file) and filesystem_of(file) not in _IN_MEMORY:
            raise OSError(errno.EBUSY, "another program holds some of it there")


def refuse_unknowable(file: File) -> None:
    """Raise if the system does not say what the page cache holds of a file."""
    if file.length == 0:
        return
    try:
        syscalls.is_cached(file.fd, 0, min(file.length, mmap.PAGESIZE))
    except OSError as error:
        raise ImageError(
            path=file.path,
            problem=f"its file system does not say what is in memory ({error.strerror}), and "
            "reading back would prove nothing; leave out --verify",
        ) from error


def _is_dropped(file: File) -> bool:
    for _ in range(TRIES):
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not any(syscalls.is_cached(file.fd, *part) for part in _parts(file)):
            return True
    return False


def _parts(file: File) -> Iterator[Run]:
    """The parts of the file that can be cached, in steps that begin with a page."""
    for start, stop in file.data_runs(0, file.length):
        for first in range(round_down(start, mmap.PAGESIZE), stop, STEP):
            yield first, min(first + STEP, stop)
