"""Counts the free space that a transfer needs, before its first byte.

Bytes that go into holes of the target need space. Commit gives space back, checkpoint by
checkpoint, when image and target share a file system: the peak counts. The weight of all tasks is
an upper bound that costs nothing; only when it does not fit, every extent is examined. Cloned
extents share their blocks: they take no space and give none back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from addcow_mp.device.copying import CopyOptions, clonable
from addcow_mp.device.extent import Extent, ExtentKind
from addcow_mp.device.files import File
from addcow_mp.device.filesystem import can_share
from addcow_mp.engine.checkpoints import CHECKPOINT_BYTES
from addcow_mp.engine.pool import AHEAD
from addcow_mp.engine.targets import OverlayTarget
from addcow_mp.engine.tasks import TASK_BYTES, Task
from addcow_mp.engine.transfer_plan import TransferPlan
from addcow_mp.errors import SpaceError
from addcow_mp.format.bits import Run, merged


@dataclass(frozen=True)
class SpaceNeeded:
    """The space that a transfer takes in the target's file system, in bytes.

    ``peak``: the most at any time. ``kept``: what remains taken. ``freed``: what the old place
    gives back until the end.
    """

    peak: int = 0
    kept: int = 0
    freed: int = 0


def refuse_without_space(plans: Sequence[TransferPlan], options: CopyOptions, jobs: int) -> None:
    """Raise :class:`SpaceError` when the file systems of the targets have too little space.

    The plans are carried out one after the other.
    """
    devices = dict.fromkeys(plan.target.file.first_status.st_dev for plan in plans)
    for device in devices:
        here = [plan for plan in plans if plan.target.file.first_status.st_dev == device]
        file = here[0].target.file
        free = file.free_space
        if sum(plan.weight * _copy_up_factor(plan) for plan in here) <= free:
            continue
        needed = sum(space_for(plan, options, jobs).peak for plan in here)
        if needed > free:
            raise SpaceError(path=file.path, needed=needed, free=free)


def _copy_up_factor(plan: TransferPlan) -> int:
    """Return by how much copying up can multiply what is written."""
    return max(1, plan.target.unit // plan.selection.geometry.cluster_size)


def space_for(plan: TransferPlan, options: CopyOptions, jobs: int = 1) -> SpaceNeeded:
    """Return the space that ``plan`` takes and gives back; examines every extent."""
    count = _Counting(plan, options)
    source = plan.selection.nearest if plan.gives_back else None
    steps = [
        (task.weight, count.taken(task), 0 if source is None else count.freed(source, task))
        for task in plan.tasks
    ]
    lag = 2 * CHECKPOINT_BYTES + max(1, jobs) * AHEAD * TASK_BYTES
    return SpaceNeeded(
        peak(steps, lag), sum(step[1] for step in steps), sum(step[2] for step in steps)
    )


def peak(steps: Iterable[tuple[int, int, int]], lag: int) -> int:
    """Return the most that ``steps`` of (weight, taken, given back) take at any time.

    A step gives space back only when ``lag`` bytes of weight have followed it.
    """
    taken = highest = waiting_weight = 0
    waiting: deque[tuple[int, int]] = deque()
    for weight, takes, gives in steps:
        taken += takes
        highest = max(highest, taken)
        waiting.append((weight, gives))
        waiting_weight += weight
        while waiting and waiting_weight - waiting[0][0] >= lag:
            old_weight, given = waiting.popleft()
            waiting_weight -= old_weight
            taken -= given
    return highest


class _Counting:
    """Counts the bytes that a plan writes into holes and frees."""

    def __init__(self, plan: TransferPlan, options: CopyOptions) -> None:
        self._plan = plan
        self._options = options
        self._target = plan.target.file
        files = list(plan.selection.layer.files())
        self._can_share = cache(lambda depth: can_share(files[depth], self._target))

    def taken(self, task: Task) -> int:
        """Return the bytes of ``task`` that go into holes of the target."""
        return sum(
            stop - start - sum(last - first for first, last in self._target.data_runs(start, stop))
            for extent in self._written(task)
            if extent.kind is ExtentKind.DATA
            for start, stop in self._copied(extent)
        )

    def freed(self, source: File, task: Task) -> int:
        """Return the bytes of ``task`` that their old place, ``source``, gives back."""
        held = source.data_runs(*self._plan.selection.geometry.span(task.first, task.stop))
        walk = (Extent(first, last, 0, ExtentKind.DATA) for first, last in held)
        return sum(stop - start for extent in walk for start, stop in self._copied(extent))

    def _written(self, task: Task) -> Iterator[Extent]:
        """Yield what the target gets from ``task``, copied up bytes included."""
        selection = self._plan.selection
        spans = (selection.geometry.span(*run) for run in selection.runs(task.first, task.stop))
        if not isinstance(self._plan.target, OverlayTarget):
            for span in spans:
                yield from selection.extents(*span)
            return
        backing, top = self._plan.target.overlay, selection.layer
        for run in merged(backing.geometry.touched(*span) for span in spans):
            start, stop = backing.geometry.span(*run)
            if start < top.size:
                yield from top.walk(start, min(stop, top.size))
            if top.size < stop:
                yield from backing.walk(max(start, top.size), stop)

    def _copied(self, extent: Extent) -> Iterator[Run]:
        """Yield the parts of ``extent`` that are not cloned; copied up bytes never are."""
        depths = self._plan.selection.depths
        moved = extent.depth < depths or not isinstance(self._plan.target, OverlayTarget)
        block = self._target.block_size if moved and self._can_share(extent.depth) else None
        return copied_parts(extent.start, extent.stop, self._options, block)


def copied_parts(start: int, stop: int, options: CopyOptions, block: int | None) -> Iterator[Run]:
    """Yield the parts of a run that are not cloned; ``block`` is None where none is."""
    first, last = (start, start) if block is None else clonable(options, start, stop, block)
    if last <= first:
        yield start, stop
    else:
        yield start, first
        yield last, stop
