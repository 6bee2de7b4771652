"""Keeping back: no more bytes per second than allowed, and no more disk than others leave."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from addcow_mp.units import KiB

#: How many steps a limited worker makes a second: what it moves between two pauses.
STEPS_PER_SECOND = 8

#: Steps are never smaller: a limit below it is kept by longer pauses.
SMALLEST_STEP = 64 * KiB

#: Seconds that a worker sleeps without looking whether its parent is still there.
LONGEST_PAUSE = 0.5

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "ppc64le": 273, "s390x": 282, "riscv64": 30}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13


class Throttle:
    """A limit of ``rate`` bytes per second for one worker; 0 = none."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self.step = max(SMALLEST_STEP, rate // STEPS_PER_SECOND)
        self._free_at = time.monotonic()

    def spend(self, length: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until ``length`` bytes, already moved, have had their time.

        ``meanwhile`` is called again and again: what else has to be kept an eye on.
        """
        if not self._rate:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - 1 / STEPS_PER_SECOND) + length / self._rate
        while (left := self._free_at - time.monotonic()) > 0:
            time.sleep(min(left, LONGEST_PAUSE))
            meanwhile()


def use_idle_priority() -> None:
    """Let this process wait for the disk until nobody else wants it, where that can be said.

    So do the threads and processes that it starts from then on.
    """
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        import ctypes

        ctypes.CDLL(None).syscall(number, _WHO_PROCESS, 0, _CLASS_IDLE)
