"""Blocks that two files share on the disk: equal bytes of which none is read.

A copy made by cloning (``cp --reflink``) shares its blocks with the original until one of the two
is written. The list of extents (FIEMAP) gives the place of each one on the disk. Two equal places
are proof of equal bytes only under these conditions:

- Both lists are made with FIEMAP_FLAG_SYNC. Bytes in memory that are to be written elsewhere would
  else be missing: one place and two contents.
- No program writes either file: the caller holds locks on both.
- Both files are on one file system, whose files can share blocks.
- Both extents are said to be shared, and nothing else is said of them: not unwritten, not
  compressed, not inline, not without a place yet.
"""

from __future__ import annotations

from collections.abc import Iterator

from addcow_mp.device.fiemap import Place, places
from addcow_mp.device.files import File
from addcow_mp.device.filesystem import can_share
from addcow_mp.format.bits import Run, between, merged


def unshared_runs(one: File, other: File, start: int, stop: int) -> Iterator[Run]:
    """The bytes of ``[start, stop)`` that the files do not share on the disk, in order."""
    if not can_share(one, other):
        yield start, stop
        return
    try:
        here, there = (list(places(file.fd, start, stop)) for file in (one, other))
    except OSError:  # a file system without such lists
        yield start, stop
        return
    shared = ((max(first, start), min(last, stop)) for first, last in _shared(here, there))
    yield from between(merged(shared), start, stop)


def _shared(here: list[Place], there: list[Place]) -> Iterator[Run]:
    """The bytes at which both lists have the same place."""
    at = other = 0
    while at < len(here) and other < len(there):
        one, two = here[at], there[other]
        first, last = max(one.start, two.start), min(one.stop, two.stop)
        if first < last and one.is_shared and two.is_shared and one.shift == two.shift:
            yield first, last
        if one.stop <= two.stop:
            at += 1
        else:
            other += 1
