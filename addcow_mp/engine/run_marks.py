"""Marks and counts what is done of one run of clusters while a transfer moves it.

A transfer walks through a run in order. Clusters are marked once all of their bytes are done, in
whole clusters of every layer whose bits change; the target marks its own clusters first. Holes that
are longer than all data of a task are not marked: skipping them again takes no time, and marks
would cost memory.
"""

from __future__ import annotations

from addcow_mp.engine.done_map import TOP, DoneMap
from addcow_mp.engine.targets import Target
from addcow_mp.engine.tasks import TASK_BYTES
from addcow_mp.format.bits import Run
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import round_down, round_up


class RunMarks:
    """How much of one run of clusters is done. ``slot`` selects the counters of the process.

    ``every``: the clusters of long holes are marked as well.
    """

    def __init__(
        self,
        run: Run,
        geometry: Geometry,
        target: Target,
        done_map: DoneMap,
        slot: int,
        *,
        every: bool = False,
    ) -> None:
        self._every = every
        self._geometry, self._done_map, self._slot = geometry, done_map, slot
        self._target = target
        first, self._stop = run
        self.start, self.end = geometry.span(*run)
        self._unit = max(geometry.cluster_size, target.unit)
        #: Clusters before these are done, and have been counted as clusters with data.
        self._done = self._counted = first
        self._pending = [0, 0, 0]

    def add_moved(self, start: int, stop: int) -> None:
        """Enter that ``[start, stop)`` was moved."""
        first, last = self._geometry.touched(start, stop)
        self._pending[0] += stop - start
        self._pending[1] += max(0, last - max(first, self._counted))
        self._counted = max(last, self._counted)
        self._finish(self._clusters_before(stop))

    def add_zero(self, start: int, stop: int) -> None:
        """Enter that ``[start, stop)`` reads as zeros in the target."""
        if start == stop:
            return
        self._pending[2] += stop - start
        if stop - start > 2 * TASK_BYTES and not self._every:
            self._finish(self._clusters_before(min(stop, round_up(start, self._unit))))
            self._finish(self._clusters_before(stop), marks=False)
        else:
            self._finish(self._clusters_before(stop))

    def _clusters_before(self, position: int) -> int:
        """Return the end of the clusters that are done when all bytes before ``position`` are."""
        if position >= self.end:
            return self._stop
        return round_down(position, self._unit) // self._geometry.cluster_size

    def _finish(self, stop: int, *, marks: bool = True) -> None:
        if stop <= self._done:
            return
        self._target.finish(*self._geometry.span(self._done, stop), self._done_map)
        if marks:
            self._done_map.marks(TOP).set(self._done, stop)
        moved, clusters, zeroed = self._pending
        # A cluster with data that is not done yet is counted when it is.
        early = max(0, self._counted - stop)
        clusters -= early
        self._done_map.add(self._slot, (moved, clusters, zeroed, stop - self._done - clusters))
        self._pending = [0, early, 0]
        self._done = stop
