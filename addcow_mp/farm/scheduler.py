"""The scheduler: decides which steps of a plan may begin. It runs nothing itself.

A step waits for earlier ones that use a file it writes, or write a file it uses. So chains are
worked off from the top, and no job meets a lock of another job of the farm. A step also waits until
the space that it needs is free beside what running steps may still take. A step that does not fit
although no other one is running begins all the same, and its own job refuses it.

Small images run side by side. A large image is split, so there is one of them at a time. Where
images are read back, it also has the disk to itself: nothing else runs.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import TopologicalSorter
from heapq import heappop, heappush

from addcow_mp.device.discovery import Identity
from addcow_mp.device.files import free_bytes
from addcow_mp.farm.plan import Step
from addcow_mp.units import MiB

#: Images with more bytes to move are split: that takes longer than to involve other processes.
LARGE = 256 * MiB

#: Steps that are examined for one that fits: a full disk with thousands waiting costs no more.
MOST_EXAMINED = 64


class Scheduler:
    """The order of ``steps``, by their numbers in the plan.

    ``capacity``: small images that run or wait in the executor at most. ``verifies``: images are
    read back. ``stops_at_error``: after a failure nothing more begins.
    """

    def __init__(
        self,
        steps: Mapping[int, Step],
        capacity: int,
        *,
        verifies: bool = False,
        stops_at_error: bool = False,
    ) -> None:
        self._steps = steps
        self._capacity = capacity
        self._verifies = verifies
        self._stops_at_error = stops_at_error
        self._stopped = False
        self._sorter = TopologicalSorter(dict(_predecessors(steps)))
        self._sorter.prepare()
        #: Steps whose predecessors are finished, small and large ones, as heaps.
        self._ready: tuple[list[int], list[int]] = ([], [])
        self._running: set[int] = set()
        #: Bytes that running steps may still take, for each device.
        self._reserved: Counter[int] = Counter()

    @property
    def is_active(self) -> bool:
        """Whether there are steps left, and they may begin."""
        return self._sorter.is_active() and not self._stopped

    def startable(self) -> list[int]:
        """The steps that begin now."""
        for number in self._sorter.get_ready():
            heappush(self._ready[self._is_large(number)], number)
        large_runs = any(map(self._is_large, self._running))
        if not self._verifies:
            return self._start_small() + ([] if large_runs else self._start(large=True))
        if large_runs:
            return []
        alone = [] if self._running else self._start(large=True)
        return alone or self._start_small()

    @property
    def is_running(self) -> bool:
        """Whether steps are running."""
        return bool(self._running)

    def drop(self, numbers: Iterable[int]) -> None:
        """Steps that were started never ran."""
        self._running.difference_update(numbers)

    def finish(self, number: int, *, failed: bool = False) -> None:
        """A step has ended: others may have waited for it."""
        self._running.discard(number)
        self._reserve(self._steps[number], -1)
        self._sorter.done(number)
        if failed:
            self.fail()

    def fail(self) -> None:
        """An image was refused or has failed."""
        self._stopped = self._stops_at_error

    def _is_large(self, number: int) -> bool:
        return self._steps[number].weight > LARGE

    def _start_small(self) -> list[int]:
        started: list[int] = []
        while len(self._running) < self._capacity and (more := self._start(large=False)):
            started += more
        return started

    def _start(self, *, large: bool) -> list[int]:
        """Start the first step that fits; returns its number, or nothing."""
        ready = self._ready[large]
        too_big: list[int] = []
        started: list[int] = []
        while ready and not started and len(too_big) < MOST_EXAMINED:
            number = heappop(ready)
            (started if self._fits(self._steps[number]) else too_big).append(number)
        for number in too_big:
            heappush(ready, number)
        for number in started:
            self._running.add(number)
            self._reserve(self._steps[number])
        return started

    # Space

    def _fits(self, step: Step) -> bool:
        """Whether the space that ``step`` needs is free beside what running steps may take."""
        if step.estimate is None or not step.space.peak or not +self._reserved:
            return True
        try:
            free = free_bytes(os.statvfs(os.path.dirname(step.estimate.target) or "."))
        except OSError:
            return True  # its job reports the error
        return step.space.peak <= free - self._reserved[step.estimate.device]

    def _reserve(self, step: Step, times: int = 1) -> None:
        if step.estimate is not None:
            self._reserved[step.estimate.device] += times * step.space.peak


def _predecessors(steps: Mapping[int, Step]) -> Iterator[tuple[int, set[int]]]:
    """For each step the earlier ones that write what it uses, or use what it writes."""
    writer: dict[Identity, int] = {}
    readers: defaultdict[Identity, set[int]] = defaultdict(set)
    for number, step in steps.items():
        earlier = {writer[file] for file in step.chain if file in writer}
        earlier = earlier.union(*(readers[file] for file in step.written))
        yield number, earlier
        for file in step.chain[len(step.written) :]:
            readers[file].add(number)
        for file in step.written:
            writer[file] = number
            readers[file].clear()
