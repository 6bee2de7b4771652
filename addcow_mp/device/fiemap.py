"""The extents of a file, many with one system call (FIEMAP).

``SEEK_DATA`` and ``SEEK_HOLE`` cost two calls for each run of data. FIEMAP lists many extents with
one call, but its list differs from theirs:

- An *unwritten* extent has blocks that were allocated and not written. They read as zeros, unless a
  page in memory already holds data for them, and no flag tells this. So SEEK is asked within such
  an extent.
- A gap in the list is a hole only if the file system considers pages in memory for the list as it
  does for SEEK. ext4 answers both with the same code. XFS does not: data in memory that will be
  written to a copy of shared blocks is missing in the list. So FIEMAP finds holes on ext4 only.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from addcow_mp.device.mounts import filesystem_type
from addcow_mp.format.bits import Run

# _IOWR('f', 11, struct fiemap)
_FS_IOC_FIEMAP = 0xC020660B
#: Of a request: start, length, flags, number of listed extents, room for extents, reserved.
_REQUEST = struct.Struct("QQIIII")
#: Of an extent: offset in the file, place on the disk, length, flags.
_EXTENT = struct.Struct("QQQ16xI12x")
_UNWRITTEN = 0x800
_LAST, _MERGED, _SHARED = 0x1, 0x1000, 0x2000

#: Of a request: what is in memory is written first, so that the list is complete.
_SYNC = 0x1

#: Extents in one call; their list takes 56 KiB.
BATCH = 1024

SeekRuns = Callable[[int, int, int], Iterator[Run]]
"""``seek_runs(fd, start, stop)`` gives the runs of data, with two calls for each."""


def is_reliable(fd: int) -> bool:
    """Whether the list of extents of an open file can replace SEEK."""
    return filesystem_type(os.fstat(fd).st_dev) == "ext4"


def data_runs(fd: int, start: int, stop: int, seek_runs: SeekRuns) -> Iterator[Run]:
    """The parts of ``[start, stop)`` that are not in a hole, in order; runs do not touch.

    Raises :class:`OSError`.
    """
    stop = min(stop, os.fstat(fd).st_size)
    first = last = start
    for listed in _lists(fd, start, stop):
        for offset, _, length, flags in listed:
            if flags & _UNWRITTEN:
                parts = list(seek_runs(fd, max(offset, start), min(offset + length, stop)))
            else:
                parts = [(offset, offset + length)]
            for begin, end in parts:
                if begin > last:
                    if first < last:
                        yield first, last
                    first = begin
                last = end
    if first < min(last, stop):
        yield first, min(last, stop)


class Place(NamedTuple):
    """The bytes ``[start, stop)`` of a file, which lie in one range of the disk.

    ``shift``: the offset on the disk minus the offset in the file. ``is_shared``: other files may
    use the same range, and the range holds exactly the bytes of the file.
    """

    start: int
    stop: int
    shift: int
    is_shared: bool


def places(fd: int, start: int, stop: int) -> Iterator[Place]:
    """Where the bytes ``[start, stop)`` lie on the disk. The system writes them there first.

    Extents are not cut at the ends of the range. Raises :class:`OSError`.
    """
    for listed in _lists(fd, start, stop, _SYNC):
        for offset, place, length, flags in listed:
            is_shared = flags & ~(_LAST | _MERGED) == _SHARED
            yield Place(offset, offset + length, place - offset, is_shared)


def _lists(
    fd: int, start: int, stop: int, wanted: int = 0
) -> Iterator[Iterator[tuple[int, int, int, int]]]:
    """The extents that touch ``[start, stop)``, in lists: offset, place, length, flags."""
    answer = bytearray(_REQUEST.size + BATCH * _EXTENT.size)
    while start < stop:
        _REQUEST.pack_into(answer, 0, start, stop - start, wanted, 0, BATCH, 0)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, answer)
        count = _REQUEST.unpack_from(answer)[3]
        end = _REQUEST.size + count * _EXTENT.size
        yield _EXTENT.iter_unpack(memoryview(answer)[_REQUEST.size : end])
        if count < BATCH:
            return
        offset, _, length, _ = _EXTENT.unpack_from(answer, end - _EXTENT.size)
        start = offset + length
