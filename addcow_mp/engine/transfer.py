"""One task of moving: get clusters from where they are now to where they shall be.

A transfer says in three words what a job moves: *which* clusters of the overlay,
*from* what they are read, and into which *target*. For each run of such clusters
it walks what the source is made of: data is copied, holes and absent parts are made
zero in the target, and then the run is marked on the board. It knows neither other
tasks nor other processes, and publishes nothing.

Commit moves the local clusters from the image into the backing file; flatten moves
the missing ones from below into the image; convert moves everything into a new file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from operator import add
from typing import NamedTuple, Protocol

from addcow_mp.device.files import File
from addcow_mp.device.filesystem import can_share
from addcow_mp.device.layer import Kind, Layer, Piece
from addcow_mp.device.moving import CLONE_FROM, Manner, Mover, Way, clonable
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.board import Board
from addcow_mp.engine.pace import Pace
from addcow_mp.engine.plan import TASK_BYTES, Task
from addcow_mp.errors import StoppedError
from addcow_mp.format.bits import Run
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import MiB

#: Short runs between two looks at what else there is, such as whether the parent is there.
BATCH = 64

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
class Amount:
    """Bytes and clusters that were moved, and that were made zero instead.

    ``ways`` says how many bytes went which way, in the order of :class:`Way`.
    """

    bytes_moved: int = 0
    clusters_moved: int = 0
    bytes_zeroed: int = 0
    clusters_zeroed: int = 0
    ways: tuple[int, ...] = (0,) * len(Way)

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.bytes_moved + other.bytes_moved,
            self.clusters_moved + other.clusters_moved,
            self.bytes_zeroed + other.bytes_zeroed,
            self.clusters_zeroed + other.clusters_zeroed,
            tuple(map(add, self.ways, other.ways)),
        )


class Target(Protocol):
    """Where a transfer writes."""

    @property
    def file(self) -> File:
        """The raw file that receives the bytes."""

    def prepare(self, start: int, stop: int, buffer: memoryview, board: Board) -> None:
        """Make ready to receive ``[start, stop)``."""

    def finish(self, start: int, stop: int, board: Board) -> None:
        """Take note that ``[start, stop)`` has been written."""

    def make_zero(self, start: int, stop: int) -> None:
        """Make ``[start, stop)`` read as zeros."""


class RawTarget(NamedTuple):
    """A raw file; ``fresh`` when it is new and all of it already reads as zeros."""

    file: File
    fresh: bool = False

    def prepare(self, start: int, stop: int, buffer: memoryview, board: Board) -> None:
        """Nothing: a raw file takes any range."""

    def finish(self, start: int, stop: int, board: Board) -> None:
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

    def prepare(self, start: int, stop: int, buffer: memoryview, board: Board) -> None:
        """Copy up the rest of the clusters that ``[start, stop)`` covers only in part."""
        if self.overlay.all_allocated:
            return
        geometry = self.overlay.geometry
        first, last = geometry.touched(start, stop)
        head, tail = geometry.span(first, last)
        for edge_start, edge_stop, cluster in ((head, start, first), (stop, tail, last - 1)):
            if edge_start < edge_stop and not self._is_local(cluster, board):
                self.overlay.copy_up(edge_start, edge_stop, buffer)

    def _is_local(self, cluster: int, board: Board) -> bool:
        return board.marks(BELOW).any(cluster, cluster + 1) or self.overlay.bitmap.any(
            cluster, cluster + 1
        )

    def finish(self, start: int, stop: int, board: Board) -> None:
        """Mark the clusters as local, to be published."""
        if not self.overlay.all_allocated:
            first, last = self.overlay.geometry.touched(start, stop)
            board.marks(BELOW).set(first, last)

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

    So none is shorter than ``step``, and what is long enough to be cloned stays so.
    """
    while stop - start >= 2 * step:
        yield start, start + step
        start += step
    if start < stop:
        yield start, stop


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
        board: Board,
        manner: Manner = Manner(),  # noqa: B008 - frozen
        workers: int = 1,
    ) -> None:
        self.layer = layer
        self.geometry = geometry
        self.which = which
        self.target = target
        self.board = board
        self.manner = manner
        self.workers = workers
        self._files = list(layer.files())
        self._mover = Mover(target.file, manner)
        # Less than a byte a second for each is still a limit, not none.
        self._pace = Pace(manner.rate_of_each(workers))
        self._written = _Written(target.file)
        self._shares: dict[int, bool] = {}
        #: In a worker, the process that started it.
        self.parent: int | None = None
        #: Asked where no worker is: whether the job shall stop.
        self.stopping: Callable[[], bool] = lambda: False

    def __reduce__(self) -> tuple[object, ...]:
        parts = (self.layer, self.geometry, self.which, self.target, self.board)
        return (Transfer, (*parts, self.manner, self.workers), {"parent": os.getpid()})

    def close(self) -> None:
        """Close what was opened for this process alone."""
        self.layer.abandon()
        self.board.close()

    def __call__(self, task: Task, slot: int) -> Amount:
        """Move the clusters of ``task``, counting bytes in ``slot`` of the board.

        A run that is longer than all data of a task is mostly holes, soon done again if the
        task fails: marking it would cost memory for what costs no time.
        """
        self._mover.moved.clear()
        totals = [0, 0, 0, 0]
        most_marked = 2 * TASK_BYTES // self.geometry.cluster_size
        mark, prepare, finish = self.board.marks(TOP).set, self.target.prepare, self.target.finish
        if self.which is not Which.ALL and isinstance(self.layer, Overlay):
            # A worker that replaces a dead one opens the bitmap anew, and what killed that
            # one may have been its being cut short: bits that are gone are not 0.
            refuse_short(self.layer)
        # All runs at once: later, the bitmap might have been cut short.
        left = self._move_short(list(self.runs_of(task)), slot, totals)
        for first, stop in left:
            self._end_orphan()
            start, end = self.geometry.span(first, stop)
            prepare(start, end, self._mover.buffer, self.board)
            self._move(first, stop, self._pieces(start, end), slot, totals)
            finish(start, end, self.board)
            if stop - first <= most_marked:
                mark(first, stop)
        ways = tuple(self._mover.moved.get(way, 0) for way in Way)
        return Amount(totals[0], totals[1], totals[2], totals[3], ways)

    def _move_short(self, runs: list[Run], slot: int, totals: list[int]) -> list[Run]:
        """Move those of ``runs`` that are short copies from one raw file; returns the others.

        Images with many thousands of them are the hard case: all that is done for each run,
        beside reading and writing it, is to look whether it has a hole, and to mark it.
        """
        source = self._plain_source()
        if source is None:
            return runs
        left: list[Run] = []
        move, mark = self._mover.move_short, self.board.marks(TOP).set
        file, end, size = (
            source.file,
            min(source.held, self.geometry.size),
            self.geometry.cluster_size,
        )
        for number in range(0, len(runs), BATCH):
            self._end_orphan()
            clusters = 0
            for run in runs[number : number + BATCH]:
                first, stop = run
                if stop * size <= end and move(file, first * size, stop * size):
                    mark(first, stop)
                    clusters += stop - first
                else:
                    left.append(run)
            self.board.count(slot, clusters * size)
            self._written.add(*self.geometry.span(runs[number][0], stop), clusters * size)
            totals[0] += clusters * size
            totals[1] += clusters
        return left

    def _plain_source(self) -> RawLayer | None:
        """The raw layer that all clusters come from, where moving them is a mere copy."""
        plain = isinstance(self.target, RawTarget) and self._mover.copies_plainly
        if not plain or not isinstance(self.layer, Overlay) or self.which is Which.ALL:
            return None
        source = self.layer.image if self.which is Which.LOCAL else self.layer.backing
        return source if isinstance(source, RawLayer) else None

    def _end_orphan(self) -> None:
        end_orphan(self.parent)

    def _end_wait(self) -> None:
        """Waiting for a rate is in vain when the parent is gone or the job shall stop."""
        self._end_orphan()
        if self.board.stopped or self.stopping():
            raise StoppedError(path=self.layer.path)

    def shares(self, depth: int) -> bool:
        """Whether blocks of the file at ``depth`` can be shared with the target."""
        known = self._shares.get(depth)
        if known is None:
            known = self._shares[depth] = can_share(self._files[depth], self.target.file)
        return known

    @property
    def may_clone(self) -> bool:
        """Whether long runs of the nearest file they come from are cloned."""
        depth = int(self.which is Which.MISSING)
        longest = clonable(self.manner, 0, TASK_BYTES, self.target.file.block_size)
        return depth < len(self._files) and longest[0] < longest[1] and self.shares(depth)

    def pieces_of(self, task: Task) -> Iterator[Piece]:
        """What the source of ``task`` is made of, run by run."""
        for run in self.runs_of(task):
            yield from self._pieces(*self.geometry.span(*run))

    def runs_of(self, task: Task) -> Iterator[Run]:
        """The runs of clusters of ``task`` that are moved."""
        if self.which is Which.ALL or not isinstance(self.layer, Overlay):
            return iter([(task.first, task.stop)])
        return self.layer.local_runs(int(self.which is Which.LOCAL), task.first, task.stop)

    def _pieces(self, start: int, stop: int) -> Iterator[Piece]:
        if self.which is Which.ALL or not isinstance(self.layer, Overlay):
            return self.layer.pieces(start, stop)
        if self.which is Which.LOCAL:
            return self.layer.image.pieces(start, stop)
        return self.layer.pieces_below(start, stop)

    def _move(
        self, first: int, stop: int, pieces: Iterator[Piece], slot: int, totals: list[int]
    ) -> None:
        """Move one run of clusters, adding to ``totals`` in the order of an :class:`Amount`."""
        clusters = 0
        counted = first  # clusters before this one are known to have had data
        for piece in pieces:
            if piece.kind is Kind.DATA:
                self._move_data(piece, slot)
                here, there = self.geometry.touched(piece.start, piece.stop)
                clusters += there - max(here, counted)
                counted = there
                totals[0] += piece.stop - piece.start
            else:
                self.target.make_zero(piece.start, piece.stop)
                totals[2] += piece.stop - piece.start
        totals[1] += clusters
        totals[3] += stop - first - clusters

    def _move_data(self, piece: Piece, slot: int) -> None:
        step = max(self._pace.step, CLONE_FROM) if self.manner.rate else piece.stop - piece.start
        for start, stop in _steps(piece.start, piece.stop, step):
            self._mover.move(self._files[piece.depth], start, stop)
            self.board.count(slot, stop - start)
            self._written.add(start, stop, stop - start)
            self._pace.spend(stop - start, self._end_wait)
