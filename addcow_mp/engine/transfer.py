"""Moves the clusters of one task from where they are to where they belong.

A selection says which clusters move and what they are made of, a target where they go. For each run
of clusters, data is copied, and holes and absent extents become zeros in the target. What is done
of a run is marked in the done map, in whole clusters, as the run progresses. A transfer publishes
nothing and knows neither other tasks nor other processes.

Between two steps of a few MiB it checks whether the job must stop and waits while too much is
unpublished. So a stop or a crash costs a step, not a task. Clusters that a worker process marked
before it died are not moved again: their old place may be freed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from addcow_mp.device.copying import CLONE_FROM, SHORT, Copier, CopyMethod, CopyOptions
from addcow_mp.device.extent import Extent, ExtentKind
from addcow_mp.device.files import File
from addcow_mp.engine.done_map import MOST_UNPUBLISHED, TOP, DoneMap
from addcow_mp.engine.run_marks import RunMarks
from addcow_mp.engine.selection import Selection
from addcow_mp.engine.targets import RawTarget, Target
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.throttle import SMALLEST_STEP
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.format.bits import Run, between
from addcow_mp.units import MiB, round_up

#: Bytes moved between two checks: a second on a disk that writes 4 MB/s.
STEP = 4 * MiB

#: Short runs moved between two checks, unless they are more than a step.
BATCH = 64

#: Bytes made zero between two checks; nearly always they are only freed.
ZERO_STEP = 64 * MiB

#: Seconds between two checks while the parent has too much to publish.
PUBLISHING_PAUSE = 0.005

#: The disk begins to write after so many bytes: it is not idle while processors copy, and the last
#: sync has little left to write.
EARLY_BYTES = 8 * MiB


class _EarlyWriting:
    """Makes the disk begin to write what lies in memory, before the sync."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._start = self._stop = self._length = 0

    def add(self, start: int, stop: int, length: int) -> None:
        """Enter ``length`` bytes that were written within ``[start, stop)``."""
        self._start = min(start, self._start) if self._length else start
        self._stop = max(stop, self._stop) if self._length else stop
        self._length += length
        if self._length >= EARLY_BYTES:
            self._file.start_writing(self._start, self._stop)
            self._length = 0


def _steps(start: int, stop: int, step: int) -> Iterator[Run]:
    """Cut ``[start, stop)`` into steps; the last one includes what would be a shorter rest.

    So no step of a long run is too short to be cloned. No step ends within a block, which would go
    through the page cache, or within a cluster of the usual size.
    """
    while stop - start >= 2 * step + SMALLEST_STEP:
        end = round_up(start + step, SMALLEST_STEP)
        yield start, end
        start = end
    if start < stop:
        yield start, stop


def _batches(runs: list[Run], size: int) -> Iterator[list[Run]]:
    """Group ``runs`` of clusters of ``size`` bytes, so that no group is more than a step."""
    short = (stop - first for first, stop in runs if (stop - first) * size <= SHORT)
    count = max(1, min(BATCH, STEP // (max(short, default=1) * size)))
    return (runs[number : number + count] for number in range(0, len(runs), count))


class Transfer:
    """Moves the clusters of one task at a time. Picklable to a worker process."""

    def __init__(
        self, selection: Selection, target: Target, done_map: DoneMap, options: CopyOptions
    ) -> None:
        self.selection = selection
        self.target = target
        self.done_map = done_map
        self.options = options
        self._files = list(selection.layer.files())
        self._copier = Copier(target.file, options)
        self._early_writing = _EarlyWriting(target.file)

    def __reduce__(self) -> tuple[object, ...]:
        return (Transfer, (self.selection, self.target, self.done_map, self.options))

    def close(self) -> None:
        """Close what this process received for the work."""
        self.selection.close()
        self.done_map.close()

    def __call__(self, task: Task, worker: WorkerContext) -> None:
        """Move the clusters of ``task``. Raises :class:`StoppedError` when the job must stop.

        All that is marked until then is done.
        """
        self._copier.moved.clear()
        try:
            # All runs are listed first: later, the bitmap may be cut short.
            for run in self._move_short(self._searched(task, worker), worker):
                self._move_run(run, worker)
        finally:
            self._copier.release()
            ways = (self._copier.moved.get(way, 0) for way in CopyMethod)
            self.done_map.add(worker.slot, (0, 0, 0, 0, *ways))

    def _searched(self, task: Task, worker: WorkerContext) -> list[Run]:
        """The runs of ``task`` to be moved. What else was looked at for them is counted."""
        found = list(self._unmarked(task, partial(worker.check, self.selection.layer.path)))
        if self.selection.leaves_some:
            size = self.selection.geometry.cluster_size
            left = sum(stop - first for first, stop in found) * size
            self.done_map.add_passed(worker.slot, max(0, task.weight - left))
        return found

    def _unmarked(self, task: Task, check: Callable[[], None]) -> Iterator[Run]:
        """Yield the runs of ``task`` that no process has marked yet."""
        runs = self.selection.searched(task.first, task.stop, check)
        marks = self.done_map.marks(TOP)
        if not marks.any(task.first, task.stop):
            return runs
        return (left for run in runs for left in between(marks.runs(*run), *run))

    def _check(self, worker: WorkerContext) -> None:
        """Stop if the job must; wait while more is unpublished than a crash may cost."""
        path = self.selection.layer.path
        worker.check(path)
        while self.done_map.unpublished >= MOST_UNPUBLISHED:
            time.sleep(PUBLISHING_PAUSE)
            worker.check(path)

    # Short runs

    def _move_short(self, runs: list[Run], worker: WorkerContext) -> list[Run]:
        """Move the ``runs`` that are short copies from one raw file; return the others.

        An image may have many thousands of them. So each run costs one search for a hole, one read,
        one write and its mark.
        """
        source = self.selection.plain_source
        plain = isinstance(self.target, RawTarget) and self._copier.copies_plainly
        if source is None or not plain:
            return runs
        left: list[Run] = []
        geometry = self.selection.geometry
        size, end = geometry.cluster_size, min(source.held, geometry.size)
        move, mark = self._copier.move_short, self.done_map.marks(TOP).set
        for batch in _batches(runs, size):
            self._check(worker)
            clusters = 0
            for run in batch:
                first, stop = run
                if stop * size <= end and move(source.file, first * size, stop * size):
                    mark(first, stop)
                    clusters += stop - first
                else:
                    left.append(run)
            self.done_map.add(worker.slot, (clusters * size, clusters))
            self._early_writing.add(*geometry.span(batch[0][0], stop), clusters * size)
        return left

    # Other runs

    def _move_run(self, run: Run, worker: WorkerContext) -> None:
        geometry = self.selection.geometry
        every = self.selection.leaves_some
        marks = RunMarks(run, geometry, self.target, self.done_map, worker.slot, every=every)
        self.target.prepare(marks.start, marks.end, self._copier.buffer, self.done_map)
        for extent in self.selection.extents(marks.start, marks.end):
            self._check(worker)
            if extent.kind is ExtentKind.DATA:
                self._move_data(extent, marks, worker)
            else:
                self._make_zero(extent, marks, worker)

    def _move_data(self, extent: Extent, marks: RunMarks, worker: WorkerContext) -> None:
        source, start, step = self._files[extent.depth], extent.start, STEP
        if self.options.rate:
            step = max(worker.throttle.step, CLONE_FROM)
        else:
            # A clone takes no time, whatever its length.
            start = self._copier.clone(source, start, extent.stop)
            self._add_moved(extent.start, start, marks)
        self._copier.preallocate(start, extent.stop)
        for first, stop in _steps(start, extent.stop, step):
            if first > extent.start:
                self._check(worker)
            self._copier.move(source, first, stop)
            self._add_moved(first, stop, marks)
            worker.spend(stop - first, self.selection.layer.path)

    def _add_moved(self, start: int, stop: int, marks: RunMarks) -> None:
        if start < stop:
            marks.add_moved(start, stop)
            self._early_writing.add(start, stop, stop - start)

    def _make_zero(self, extent: Extent, marks: RunMarks, worker: WorkerContext) -> None:
        """Free what the target holds there; its holes are skipped in one step."""
        file, position = self.target.file, extent.start
        held = () if self.target.is_fresh else file.data_runs(extent.start, extent.stop)
        for first, last in held:
            marks.add_zero(position, first)
            for start, stop in _steps(first, last, ZERO_STEP):
                self._check(worker)
                file.make_zero(start, stop)
                marks.add_zero(start, stop)
            position = last
        marks.add_zero(position, extent.stop)
