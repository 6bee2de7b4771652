"""Data and holes of files: find them, punch them, fill them.

A hole always reads as zeros; data may be zeros too. On a file system without holes, all is data.
Of a file with many runs of data, the file system lists its extents where that is reliable
(:mod:`addcow_mp.device.fiemap`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import islice

from addcow_mp.device.syscalls import fallocate

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

#: Runs that are searched for one by one. Most files have fewer; a list of extents costs more calls.
FEW = 16


def next_data(fd: int, position: int) -> int | None:
    """The first byte at or behind ``position`` that is not in a hole, if any."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno != errno.EINVAL:  # a device, or a file system without holes
            raise
        return position if position < os.lseek(fd, 0, os.SEEK_END) else None


def next_hole(fd: int, position: int) -> int:
    """The first byte behind ``position``, which is data, that is in a hole, or the end."""
    try:
        return os.lseek(fd, position, os.SEEK_HOLE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.lseek(fd, 0, os.SEEK_END)


def data_runs(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of ``[start, stop)`` that are not in a hole, in order."""
    position, found = start, 0
    for run in islice(_seek_runs(fd, start, stop), FEW):
        yield run
        position, found = run[1], found + 1
    if found == FEW and position < stop:
        yield from _further_runs(fd, position, stop)


def _further_runs(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    if next_data(fd, start) is None:
        return
    from addcow_mp.device import fiemap

    if fiemap.is_reliable(fd):
        yield from fiemap.data_runs(fd, start, stop, _seek_runs)
    else:
        yield from _seek_runs(fd, start, stop)


def _seek_runs(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        data = next_data(fd, start)
        if data is None or data >= stop:
            return
        start = min(next_hole(fd, data), stop)
        yield data, start


def allocate(fd: int, start: int, stop: int) -> bool:
    """Allocate blocks for ``[start, stop)``, a hole within the file; False if unsupported."""
    return fallocate(fd, 0, start, stop)


def punch(fd: int, start: int, stop: int) -> bool:
    """Turn ``[start, stop)`` into a hole; False if the file system does not support it."""
    return fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, start, stop)
