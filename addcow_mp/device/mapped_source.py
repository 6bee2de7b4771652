"""A window of a file, mapped so that its bytes can be written to another file from there.

The window is only handed to system calls, and never looked at from here. So a page that is gone,
because the file has become shorter or a sector is bad, makes a write fail with EFAULT. A look at it
would end the process with a SIGBUS.
"""

from __future__ import annotations

import contextlib
import mmap
import os

from addcow_mp.device.files import File
from addcow_mp.units import MiB, round_down

#: Bytes mapped at a time: resident memory does not grow with the image.
WINDOW = 16 * MiB


class MappedSource:
    """At most one window of one file. It is kept for the next bytes, until :meth:`close`."""

    def __init__(self) -> None:
        self._fd = -1
        self._start = 0
        self._window: mmap.mmap | None = None
        self._view = memoryview(b"")

    def view(self, file: File, start: int, stop: int) -> memoryview | None:
        """The bytes ``[start, stop)`` of ``file``, which lie between two multiples of the window.

        None if the file is too short. Raises :class:`OSError` where it cannot be mapped.
        """
        base = round_down(start, WINDOW)
        if (self._fd, self._start) != (file.fd, base) or stop - base > len(self._view):
            self.close()
            length = min(file.length - base, WINDOW)
            if length < stop - base:
                return None
            self._map(file.fd, base, length)
        os.posix_fadvise(file.fd, start, stop - start, os.POSIX_FADV_WILLNEED)
        return self._view[start - base : stop - base]

    def _map(self, fd: int, base: int, length: int) -> None:
        try:
            self._window = mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=base)
        except ValueError as error:  # it has just become shorter
            raise OSError(str(error)) from error
        # Otherwise each first touch reads megabytes around it, also of holes.
        self._window.madvise(mmap.MADV_RANDOM)
        self._view = memoryview(self._window)
        self._fd, self._start = fd, base

    def close(self) -> None:
        """Unmap the window. Its pages would stay in the page cache, and the file open."""
        self._view.release()
        self._view = memoryview(b"")
        window, self._window, self._fd = self._window, None, -1
        if window is not None:
            # The error of a write that failed still refers to the view that it wrote. The window
            # is unmapped with that error, at the end of the task.
            with contextlib.suppress(BufferError):
                window.close()
