"""One task of moving: get clusters from where they are now to where they shall be.

A transfer says in three words what a job moves: *which* clusters of the overlay,
*from* what they are read, and into which *target*. For each run of such clusters
it walks what the source is made of: data is copied, holes and absent parts are made
zero in the target, and what is done of the run is marked on the board, in whole clusters,
as it goes. It knows neither other tasks nor other processes, and publishes nothing.

Between two pieces of a few MiB it looks around: whether the job shall stop, whether the process
that publishes is still there and keeps up. So whatever ends a task costs a piece, not the task.
What is marked already, by a worker that died, is not moved again: its old place may be freed.

Commit moves the local clusters from the image into the backing file; flatten moves
the missing ones from below into the image; convert moves everything into a new file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from addcow_mp.device.copying import CLONE_FROM, SHORT, Copier, CopyMethod, CopyOptions, clonable
from addcow_mp.device.extent import Extent, ExtentKind
from addcow_mp.device.files import File
from addcow_mp.device.filesystem import can_share
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.done_map import MOST_UNPUBLISHED, DoneMap
from addcow_mp.engine.tasks import TASK_BYTES, Task
from addcow_mp.engine.throttle import SMALLEST_STEP, Throttle
from addcow_mp.errors import StoppedError
from addcow_mp.format.bits import Run, between
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import MiB, round_down, round_up

#: Bytes moved between two looks at what else there is: a second on a disk that does 4 MB/s.
PIECE = 4 * MiB

#: Short runs between two such looks, if they are no more than that.
BATCH = 64

#: Bytes made zero between two looks; nearly always they are merely freed.
ZERO_PIECE = 64 * MiB

#: Seconds between two looks while the parent has too much to publish.
PUBLISHING_PAUSE = 0.005

#: The disk is told to begin after so many bytes: it is never idle while processors copy, and
#: the last sync finds little left to do.
EARLY_BYTES = 8 * MiB

#: The layers of a board: the overlay whose clusters move, and a backing that receives them.
TOP, BELOW = 0, 1


class Which(Enum):
    """The clusters that a transfer moves, and with them where they are read from."""

    LOCAL = "local clusters, from the image file"
    MISSING = "clusters that are not local, from below"
    ALL = "every cluster, from the guest's view"


@dataclass(frozen=True)
class Totals:
    """Bytes and clusters that were moved, and that were made zero instead.

    ``ways`` says how many bytes went which way, in the order of :class:`CopyMethod`.
    """

    bytes_moved: int = 0
    clusters_moved: int = 0
    bytes_zeroed: int = 0
    clusters_zeroed: int = 0
    ways: tuple[int, ...] = (0,) * len(CopyMethod)

    @classmethod
    def on(cls, done_map: DoneMap) -> Totals:
        """What all workers have counted on ``done_map``, in tasks that ended and in others."""
        moved, clusters, zeroed, clusters_zeroed, *ways = done_map.totals
        return cls(moved, clusters, zeroed, clusters_zeroed, tuple(ways))


class Target(Protocol):
    """Where a transfer writes."""

    @property
    def file(self) -> File:
        """The raw file that receives the bytes."""

    def prepare(self, start: int, stop: int, buffer: memoryview, done_map: DoneMap) -> None:
        """Make ready to receive ``[start, stop)``."""

    def finish(self, start: int, stop: int, done_map: DoneMap) -> None:
        """Take note that ``[start, stop)`` has been written."""

    def make_zero(self, start: int, stop: int) -> None:
        """Make ``[start, stop)`` read as zeros."""

    @property
    def unit(self) -> int:
        """Bytes that its own bits speak of; 1 where it has none."""


class RawTarget(NamedTuple):
    """A raw file; ``fresh`` when it is new and all of it already reads as zeros."""

    file: File
    fresh: bool = False

    @property
    def unit(self) -> int:
        """Any range can be done by itself."""
        return 1

    def prepare(self, start: int, stop: int, buffer: memoryview, done_map: DoneMap) -> None:
        """Nothing: a raw file takes any range."""

    def finish(self, start: int, stop: int, done_map: DoneMap) -> None:
        """Nothing: a raw file has no bits."""

    def make_zero(self, start: int, stop: int) -> None:
        """Make a hole, unless there is nothing but a hole."""
        if not self.fresh:
            self.file.make_zero(start, stop)


class OverlayTarget(NamedTuple):
    """An add-cow backing: its clusters become local, partly covered ones by copying up.

    What is local is what its bitmap says or the board has marked: the marks of a worker
    that died count, so that a second try does not copy up over what the first one wrote.
    """

    overlay: Overlay

    @property
    def file(self) -> File:
        """The backing's own image file."""
        return self.overlay.image.file

    @property
    def unit(self) -> int:
        """A cluster of the backing is local as a whole."""
        return self.overlay.cluster_size

    def prepare(self, start: int, stop: int, buffer: memoryview, done_map: DoneMap) -> None:
        """Copy up the rest of the clusters that ``[start, stop)`` covers only in part."""
        if self.overlay.all_allocated:
            return
        geometry = self.overlay.geometry
        first, last = geometry.touched(start, stop)
        head, tail = geometry.span(first, last)
        for edge_start, edge_stop, cluster in ((head, start, first), (stop, tail, last - 1)):
            if edge_start < edge_stop and not self._is_local(cluster, done_map):
                self.overlay.copy_up(edge_start, edge_stop, buffer)

    def _is_local(self, cluster: int, done_map: DoneMap) -> bool:
        return done_map.marks(BELOW).any(cluster, cluster + 1) or self.overlay.bitmap.any(
            cluster, cluster + 1
        )

    def finish(self, start: int, stop: int, done_map: DoneMap) -> None:
        """Mark the clusters as local, to be published."""
        if not self.overlay.all_allocated:
            first, last = self.overlay.geometry.touched(start, stop)
            done_map.marks(BELOW).set(first, last)

    def make_zero(self, start: int, stop: int) -> None:
        """Make a hole in the image file; the cluster is local all the same."""
        self.file.make_zero(start, stop)


def end_orphan(parent: int | None) -> None:
    """End this process, at once, when the one that started it is gone.

    Nobody will publish what an orphan writes, while its locks keep the next try away.
    """
    if parent is not None and os.getppid() != parent:
        os._exit(1)


class _Written:
    """What has been written and lies in memory: the disk begins with it before the sync."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._start = self._stop = self._length = 0

    def add(self, start: int, stop: int, length: int) -> None:
        """Take note of ``length`` bytes written within ``[start, stop)``."""
        self._start = min(start, self._start) if self._length else start
        self._stop = max(stop, self._stop) if self._length else stop
        self._length += length
        if self._length >= EARLY_BYTES:
            self._file.start_writing(self._start, self._stop)
            self._length = 0


def _steps(start: int, stop: int, step: int) -> Iterator[Run]:
    """``[start, stop)`` in steps; what would be left at the end belongs to the last one.

    So none is shorter than ``step``, and what is long enough to be cloned stays so. Nor does one
    end within a block, which would go through the page cache, or within a usual cluster.
    """
    while stop - start >= 2 * step + SMALLEST_STEP:
        end = round_up(start + step, SMALLEST_STEP)
        yield start, end
        start = end
    if start < stop:
        yield start, stop


def _batches(runs: list[Run], size: int) -> Iterator[list[Run]]:
    """``runs`` of clusters of ``size`` bytes, so many at a time that it is no more than a piece."""
    short = (stop - first for first, stop in runs if (stop - first) * size <= SHORT)
    count = max(1, min(BATCH, PIECE // (max(short, default=1) * size)))
    return (runs[number : number + count] for number in range(0, len(runs), count))


class RunMarks:
    """How far one run of clusters has come: what is done of it is marked and counted.

    All of the run is gone through in order. Marks are made of whole clusters of every layer
    whose bits change, as soon as all of their bytes are done; a target's own mark comes first.
    Holes longer than all data of a task are not marked: they are soon gone through again, and
    marking them would cost memory for what costs no time.
    """

    def __init__(self, work: Transfer, first: int, stop: int, slot: int) -> None:
        self._geometry, self._board, self._slot = work.geometry, work.done_map, slot
        self._target = work.target
        self.start, self.end = work.geometry.span(first, stop)
        self._stop = stop
        self._unit = max(work.geometry.cluster_size, work.target.unit)
        #: Clusters before these are done, and are known to have had data.
        self._done = self._counted = first
        self._pending = [0, 0, 0]

    def move(self, start: int, stop: int) -> None:
        """Take note that ``[start, stop)`` was moved."""
        first, last = self._geometry.touched(start, stop)
        self._pending[0] += stop - start
        self._pending[1] += max(0, last - max(first, self._counted))
        self._counted = max(last, self._counted)
        self._reach(stop)

    def pass_over(self, start: int, stop: int) -> None:
        """Take note that ``[start, stop)`` reads as zeros in the target."""
        if start == stop:
            return
        self._pending[2] += stop - start
        if stop - start > 2 * TASK_BYTES:
            self._reach(min(stop, round_up(start, self._unit)))
            self._finish(self._clusters_until(stop), marks=False)
        else:
            self._reach(stop)

    def _clusters_until(self, position: int) -> int:
        """The cluster before which all are done when all bytes before ``position`` are."""
        if position >= self.end:
            return self._stop
        return round_down(position, self._unit) // self._geometry.cluster_size

    def _reach(self, position: int) -> None:
        self._finish(self._clusters_until(position), marks=True)

    def _finish(self, stop: int, *, marks: bool) -> None:
        if stop <= self._done:
            return
        self._target.finish(*self._geometry.span(self._done, stop), self._board)
        if marks:
            self._board.marks(TOP).set(self._done, stop)
        self._count(stop)
        self._done = stop

    def _count(self, stop: int) -> None:
        moved, clusters, zeroed = self._pending
        # A cluster with data that is not done yet is counted when it is.
        early = max(0, self._counted - stop)
        clusters -= early
        amounts = (moved, clusters, zeroed, stop - self._done - clusters)
        self._board.add(self._slot, amounts)
        self._pending = [0, early, 0]


class Transfer:
    """Moves the clusters of one task at a time. Picklable to a worker that is starting.

    ``workers`` is how many do so side by side: they share the manner's rate.
    """

    def __init__(
        self,
        layer: Layer,
        geometry: Geometry,
        which: Which,
        target: Target,
        done_map: DoneMap,
        copy_options: CopyOptions = CopyOptions(),  # noqa: B008 - frozen
        workers: int = 1,
    ) -> None:
        self.layer = layer
        self.geometry = geometry
        self.which = which
        self.target = target
        self.done_map = done_map
        self.copy_options = copy_options
        self.workers = workers
        self._files = list(layer.files())
        self._copier = Copier(target.file, copy_options)
        # Less than a byte a second for each is still a limit, not none.
        self._throttle = Throttle(copy_options.rate_of_each(workers))
        self._written = _Written(target.file)
        self._shares: dict[int, bool] = {}
        #: In a worker, the process that started it.
        self.parent: int | None = None
        #: Called between pieces in the process that publishes, for what it has to attend to
        #: meanwhile; returns whether the job shall stop.
        self.attend: Callable[[], bool] = lambda: False

    def __reduce__(self) -> tuple[object, ...]:
        parts = (self.layer, self.geometry, self.which, self.target, self.done_map)
        return (Transfer, (*parts, self.copy_options, self.workers), {"parent": os.getpid()})

    def close(self) -> None:
        """Close what was opened for this process alone."""
        self.layer.abandon()
        self.done_map.close()

    def __call__(self, task: Task, slot: int) -> None:
        """Move the clusters of ``task``, counting what is done in ``slot`` of the board.

        Raises :class:`StoppedError` when the job shall stop; what was marked until then is done.
        """
        self._copier.moved.clear()
        if self.which is not Which.ALL and isinstance(self.layer, Overlay):
            # A worker that replaces a dead one opens the bitmap anew, and what killed that
            # one may have been its being cut short: bits that are gone are not 0.
            refuse_short(self.layer)
        try:
            # All runs at once: later, the bitmap might have been cut short.
            for run in self._move_short(list(self._left(task)), slot):
                self._move_run(RunMarks(self, *run, slot))
        finally:
            ways = (self._copier.moved.get(way, 0) for way in CopyMethod)
            self.done_map.add(slot, (0, 0, 0, 0, *ways))

    def _left(self, task: Task) -> Iterator[Run]:
        """What of ``task`` no worker has marked yet."""
        runs, marks = self.runs_of(task), self.done_map.marks(TOP)
        if not marks.any(task.first, task.stop):
            return runs
        return (left for run in runs for left in between(marks.runs(*run), *run))

    def _move_short(self, runs: list[Run], slot: int) -> list[Run]:
        """Move those of ``runs`` that are short copies from one raw file; returns the others.

        Images with many thousands of them are the hard case: all that is done for each run,
        beside reading and writing it, is to look whether it has a hole, and to mark it.
        """
        source = self._plain_source()
        if source is None:
            return runs
        left: list[Run] = []
        move, mark = self._copier.move_short, self.done_map.marks(TOP).set
        file, end, size = (
            source.file,
            min(source.held, self.geometry.size),
            self.geometry.cluster_size,
        )
        for batch in _batches(runs, size):
            self._look_around()
            clusters = 0
            for run in batch:
                first, stop = run
                if stop * size <= end and move(file, first * size, stop * size):
                    mark(first, stop)
                    clusters += stop - first
                else:
                    left.append(run)
            self.done_map.add(slot, (clusters * size, clusters))
            self._written.add(*self.geometry.span(batch[0][0], stop), clusters * size)
        return left

    def _plain_source(self) -> RawLayer | None:
        """The raw layer that all clusters come from, where moving them is a mere copy."""
        plain = isinstance(self.target, RawTarget) and self._copier.copies_plainly
        if not plain or not isinstance(self.layer, Overlay) or self.which is Which.ALL:
            return None
        source = self.layer.image if self.which is Which.LOCAL else self.layer.backing
        return source if isinstance(source, RawLayer) else None

    def _look_around(self) -> None:
        """Between two pieces: go on, or not.

        Waits while more is moved than published: what a crash costs shall not grow without end.
        """
        self._refuse_to_go_on()
        while self.done_map.unpublished >= MOST_UNPUBLISHED:
            time.sleep(PUBLISHING_PAUSE)
            self._refuse_to_go_on()

    def _refuse_to_go_on(self) -> None:
        """End when the parent is gone; raise when the job shall stop."""
        end_orphan(self.parent)
        if self.attend() or self.done_map.stopped:
            raise StoppedError(path=self.layer.path)

    def shares(self, depth: int) -> bool:
        """Whether blocks of the file at ``depth`` can be shared with the target."""
        known = self._shares.get(depth)
        if known is None:
            known = self._shares[depth] = can_share(self._files[depth], self.target.file)
        return known

    @property
    def is_fresh(self) -> bool:
        """Whether all of the target that is not written reads as zeros."""
        return isinstance(self.target, RawTarget) and self.target.fresh

    @property
    def may_clone(self) -> bool:
        """Whether long runs of the nearest file they come from are cloned."""
        depth = int(self.which is Which.MISSING)
        longest = clonable(self.copy_options, 0, TASK_BYTES, self.target.file.block_size)
        return depth < len(self._files) and longest[0] < longest[1] and self.shares(depth)

    def extents_of(self, task: Task) -> Iterator[Extent]:
        """What the source of ``task`` is made of, run by run."""
        for run in self.runs_of(task):
            yield from self._walk(*self.geometry.span(*run))

    def runs_of(self, task: Task) -> Iterator[Run]:
        """The runs of clusters of ``task`` that are moved."""
        if self.which is Which.ALL or not isinstance(self.layer, Overlay):
            return iter([(task.first, task.stop)])
        return self.layer.runs_by_allocation(int(self.which is Which.LOCAL), task.first, task.stop)

    def _walk(self, start: int, stop: int) -> Iterator[Extent]:
        if self.which is Which.ALL or not isinstance(self.layer, Overlay):
            return self.layer.walk(start, stop)
        if self.which is Which.LOCAL:
            return self.layer.image.walk(start, stop)
        return self.layer.walk_below(start, stop)

    def _move_run(self, run: RunMarks) -> None:
        """Move one run of clusters."""
        self.target.prepare(run.start, run.end, self._copier.buffer, self.done_map)
        for piece in self._walk(run.start, run.end):
            self._look_around()
            if piece.kind is ExtentKind.DATA:
                self._move_data(piece, run)
            else:
                self._make_zero(piece, run)

    def _move_data(self, piece: Extent, run: RunMarks) -> None:
        source, start = self._files[piece.depth], piece.start
        step = PIECE
        if self.copy_options.rate:
            step = max(self._throttle.step, CLONE_FROM)
        else:
            # What is cloned is done at once, however long it is.
            start = self._copier.clone(source, start, piece.stop)
            self._moved(piece.start, start, run)
        self._copier.announce(start, piece.stop)
        for first, stop in _steps(start, piece.stop, step):
            if first > piece.start:
                self._look_around()
            self._copier.move(source, first, stop)
            self._moved(first, stop, run)
            self._throttle.spend(stop - first, self._refuse_to_go_on)

    def _moved(self, start: int, stop: int, run: RunMarks) -> None:
        if start < stop:
            run.move(start, stop)
            self._written.add(start, stop, stop - start)

    def _make_zero(self, piece: Extent, run: RunMarks) -> None:
        """Empty what the target holds there; holes of it are passed over in one step."""
        held = () if self.is_fresh else self.target.file.data_runs(piece.start, piece.stop)
        position = piece.start
        for first, last in held:
            run.pass_over(position, first)
            for start, stop in _steps(first, last, ZERO_PIECE):
                self._look_around()
                self.target.make_zero(start, stop)
                run.pass_over(start, stop)
            position = last
        run.pass_over(position, piece.stop)
