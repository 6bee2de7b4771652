"""Making the system forget what it holds of a file in memory, so that reading asks the disk.

What was just written is read from the page cache, which proves nothing of the disk. The cache is
told to drop the file, and then asked whether it did: advice is only advice, and pages that some
program has mapped stay. A file system that lives in memory stores nothing elsewhere; of files on
one what is there is all there is.
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

#: Bytes that are asked after at a time: the answer takes a byte for each page of them.
STEP = 1 * GiB

#: Times that the system is told: pages on their way somewhere stay at first.
TRIES = 5

_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")


def drop_cached(file: File) -> None:
    """Make what is read of ``file`` from now on what is stored. No mapping of it may be left here.

    Syncs it first, whatever else was asked for: only what is stored can be forgotten. Raises
    :class:`FileError` when something of it stays in memory.
    """
    with file.doing("make its data durable"):
        os.fsync(file.fd)
    with file.doing("drop it from memory"):
        if not _is_dropped(file) and filesystem_of(file) not in _IN_MEMORY:
            raise OSError(errno.EBUSY, "another program holds some of it there")


def refuse_unknowable(file: File) -> None:
    """Raise when the system does not say what it holds of a file: then nothing could be proved."""
    if file.length == 0:
        return
    try:
        syscalls.has_in_memory(file.fd, 0, min(file.length, mmap.PAGESIZE))
    except OSError as error:
        raise ImageError(
            path=file.path,
            problem=f"its file system does not say what is in memory ({error.strerror}), and "
            "reading back would prove nothing; leave out --verify",
        ) from error


def _is_dropped(file: File) -> bool:
    for _ in range(TRIES):
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not any(syscalls.has_in_memory(file.fd, *part) for part in _parts(file)):
            return True
    return False


def _parts(file: File) -> Iterator[Run]:
    """What of the file can be in memory, in steps that begin with a page."""
    for start, stop in file.data_runs(0, file.length):
        for first in range(round_down(start, mmap.PAGESIZE), stop, STEP):
            yield first, min(first + STEP, stop)
