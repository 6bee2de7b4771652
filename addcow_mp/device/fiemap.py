"""The extents of a file, many with one system call (FIEMAP).

``SEEK_DATA`` and ``SEEK_HOLE`` cost two calls for each run of data. FIEMAP lists the extents of a
file, and says more and less than they do:

- An *unwritten* extent has blocks that were allocated and not written, which read as zeros; but a
  page in memory may already hold data for it, and no flag says so. Within such an extent, SEEK
  decides.
- A hole in the list is only a hole if the file system looks at pages in memory for the list as it
  does for SEEK. ext4 answers both with the same code. XFS does not: data in memory that is to be
  written to a copy of shared blocks is missing in the list. So FIEMAP is used on ext4 only.
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
#: start, length, flags, extents that were listed, room for extents, nothing
_REQUEST = struct.Struct("QQIIII")
#: Of an extent: offset in the file, place on the disk, length, flags.
_EXTENT = struct.Struct("QQQ16xI12x")
_UNWRITTEN = 0x800
_LAST, _MERGED, _SHARED = 0x1, 0x1000, 0x2000

#: Of a request: what is in memory is written first, so that the list is complete.
_SYNC = 0x1

#: Extents in one call: their list has 56 KiB.
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
    """The bytes ``[start, stop)`` of a file in one piece of the disk; ``shift``: how far away.

    ``is_shared``: other files may have the same piece, and its bytes are those of the file.
    """

    start: int
    stop: int
    shift: int
    is_shared: bool


def places(fd: int, start: int, stop: int) -> Iterator[Place]:
    """Where the bytes ``[start, stop)`` lie on the disk, after all of them were written there.

    Extents are not cut at the borders of the range. Raises :class:`OSError`.
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
