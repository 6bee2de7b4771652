"""What of a file is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

from support.command import PATIENCE

WHOLE = slice(0, None)


def resident(path: Path, start: int = 0, stop: int | None = None) -> int:
    """Return how many bytes of ``[start, stop)`` of a file are in the page cache."""
    length = (path.stat().st_size if stop is None else stop) - start
    with path.open("rb") as file:
        # Private and never stored to; ctypes asks for a writable one.
        window = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    view = (ctypes.c_char * length).from_buffer(window)
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(length), pages)
    del view
    assert failed == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def was_read(*paths: Path, size: int, within: slice = WHOLE) -> bool:
    """Whether ``size`` bytes came into the page cache, which may drop some at any moment."""
    return sum(resident(path, within.start, within.stop) for path in paths) > size // 2


def uncache(*paths: Path) -> None:
    """Let the page cache forget files; pages that are busy just then need another try."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        deadline = time.monotonic() + PATIENCE
        while resident(path):
            assert time.monotonic() < deadline, path
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
