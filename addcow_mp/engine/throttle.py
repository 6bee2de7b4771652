"""Limits what a process takes of a disk: bytes per second, and its input/output priority."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from addcow_mp.units import KiB

#: Steps of a limited process in one second: it moves that much between two pauses.
STEPS_PER_SECOND = 8

#: The smallest step: a limit below it makes the pauses longer.
SMALLEST_STEP = 64 * KiB

#: The longest sleep in seconds: after it, a process checks whether it must end.
LONGEST_PAUSE = 0.5

#: The number of the system call ioprio_set; that of ioprio_get is the next one.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "ppc64le": 273, "s390x": 282, "riscv64": 30}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13


def share_of(rate: int, processes: int) -> int:
    """Return the limit of each of ``processes`` under a common ``rate``; 0 = no limit."""
    # Less than one byte a second is still a limit, not none.
    return max(1, rate // max(1, processes)) if rate else 0


class Throttle:
    """A limit of ``rate`` bytes per second for one process; 0 = no limit."""

    def __init__(self, rate: int = 0) -> None:
        self.rate = rate
        self.step = max(SMALLEST_STEP, rate // STEPS_PER_SECOND)
        self._free_at = time.monotonic()

    def spend(self, length: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Sleep as long as ``length`` bytes, already moved, may take.

        ``meanwhile`` is called after each sleep.
        """
        if not self.rate:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - 1 / STEPS_PER_SECOND) + length / self.rate
        while (left := self._free_at - time.monotonic()) > 0:
            time.sleep(min(left, LONGEST_PAUSE))
            meanwhile()


@contextmanager
def idle_priority(*, wanted: bool = True) -> Iterator[None]:
    """A block in which this thread uses the disk only when no other process does.

    Threads and processes that it starts in the block inherit this. Nothing changes where the system
    has no such priority, or it is not ``wanted``.
    """
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is None or not wanted:
        yield
        return
    import ctypes

    system_call = ctypes.CDLL(None).syscall
    before = system_call(number + 1, _WHO_PROCESS, 0)
    system_call(number, _WHO_PROCESS, 0, _CLASS_IDLE)
    try:
        yield
    finally:
        if before >= 0:
            system_call(number, _WHO_PROCESS, 0, before)
