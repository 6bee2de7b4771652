"""Where a file has data, where it has holes, and how a hole is made.

``SEEK_DATA`` is a hint in one direction only: a hole certainly reads as zeros,
but data may be zeros too. Where a file system knows no holes, all is data.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from addcow_mp.device.syscalls import fallocate

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

#: The answers of a file system that cannot do such things.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)


def next_data(fd: int, position: int) -> int | None:
    """The first byte at or behind ``position`` that is not in a hole; None when none is."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno != errno.EINVAL:  # a device, or a file system that knows no holes
            raise
        return position if position < os.lseek(fd, 0, os.SEEK_END) else None


def next_hole(fd: int, position: int) -> int:
    """The first byte at or behind ``position``, which is data, that is in a hole or the end."""
    try:
        return os.lseek(fd, position, os.SEEK_HOLE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.lseek(fd, 0, os.SEEK_END)


def data_runs(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of ``[start, stop)`` that are not in a hole, in order."""
    while start < stop:
        data = next_data(fd, start)
        if data is None or data >= stop:
            return
        start = min(next_hole(fd, data), stop)
        yield data, start


def allocate(fd: int, start: int, stop: int) -> bool:
    """Give ``[start, stop)``, a hole within the file, its blocks; False where it cannot be."""
    return _fallocate(fd, 0, start, stop)


def punch(fd: int, start: int, stop: int) -> bool:
    """Turn ``[start, stop)`` into a hole; False where the file system cannot."""
    return _fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, start, stop)


def _fallocate(fd: int, mode: int, start: int, stop: int) -> bool:
    error = fallocate(fd, mode, start, stop)
    if error and error not in _CANNOT:
        raise OSError(error, os.strerror(error))
    return not error
