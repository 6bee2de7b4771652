"""Tells the processes of a job to stop: one byte, shared once there are worker processes."""

from __future__ import annotations

import mmap
import os
from typing import Any


def never() -> bool:
    """Return that there is no reason to stop."""
    return False


class StopFlag:
    """Whether a job must stop. :meth:`share` makes it picklable to a process that is starting."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = fd
        self._byte: bytearray | mmap.mmap = bytearray(1) if fd is None else mmap.mmap(fd, 1)

    def share(self) -> None:
        """Move the byte to memory that other processes can map. Raises :class:`OSError`."""
        if self._fd is not None:
            return
        fd = os.memfd_create("addcow-stop")
        try:
            os.ftruncate(fd, 1)
            memory = mmap.mmap(fd, 1)
        except BaseException:
            os.close(fd)
            raise
        memory[0] = self._byte[0]
        self._fd, self._byte = fd, memory

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        assert self._fd is not None  # noqa: S101 - it is shared before it is sent
        return (_received, (DupFd(self._fd),))

    def set(self) -> None:
        """Tell all processes to stop."""
        self._byte[0] = 1

    @property
    def is_set(self) -> bool:
        """Whether the job must stop."""
        return self._byte[0] != 0

    def close(self) -> None:
        """Release the shared memory."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd, self._byte = None, bytearray(self._byte[:1])


def _received(duplicate: Any) -> StopFlag:
    return StopFlag(duplicate.detach())
