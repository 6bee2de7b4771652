"""Finds blocks that two files share on the disk: their bytes are equal, and need not be read.

A cloned copy (``cp --reflink``) shares its blocks with the original until one of the two is
written. The list of extents (FIEMAP) gives the place of each extent on the disk. Equal places prove
equal bytes only under these conditions:

- Both lists are made with FIEMAP_FLAG_SYNC. Otherwise bytes in memory that will be written to
  another place would be missing, and two files with one place could have different contents.
- No program writes the files: the caller holds locks on both.
- Both files are on one file system, whose files can share blocks.
- Both extents have the flag *shared*, and no other flag: they are not unwritten, compressed,
  inline, or without a place yet.
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
    except OSError:  # the file system has no such lists
        yield start, stop
        return
    shared = ((max(first, start), min(last, stop)) for first, last in _shared(here, there))
    yield from between(merged(shared), start, stop)


def _shared(here: list[Place], there: list[Place]) -> Iterator[Run]:
    """The bytes that have the same place on the disk in both lists."""
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
