"""How much free space a transfer needs, known before its first byte.

Bytes that go into holes of the target need space; commit gives space back behind itself,
checkpoint by checkpoint, when image and target share a file system. What counts is the
peak in between. The sum of what tasks weigh is an upper bound that costs nothing; only
when that does not fit is every extent looked at. What is cloned takes nothing and gives nothing
back: its blocks are shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from addcow_mp.device.copying import clonable
from addcow_mp.device.extent import Extent, ExtentKind
from addcow_mp.device.files import File
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.pool import AHEAD
from addcow_mp.engine.tasks import TASK_BYTES, Task
from addcow_mp.engine.transfer import OverlayTarget, Transfer
from addcow_mp.engine.transfer_run import CHECKPOINT_BYTES
from addcow_mp.errors import SpaceError
from addcow_mp.format.bits import Run, merged


@dataclass(frozen=True)
class SpaceNeeded:
    """The space that a transfer takes in the target's file system, in bytes.

    ``peak`` is the most of it at any time, ``kept`` what of it remains, ``freed`` what the old
    place gives back by then.
    """

    peak: int = 0
    kept: int = 0
    freed: int = 0


def refuse_without_space(work: Transfer, tasks: list[Task], jobs: int, *, frees: bool) -> None:
    """Raise :class:`SpaceError` when the target's file system cannot take what is moved.

    ``frees`` says that what was moved is freed at its old place.
    """
    free = work.target.file.free_space
    if sum(task.weight for task in tasks) * _stretch(work) <= free:
        return
    needed = space_for(work, tasks, jobs, frees=frees).peak
    if needed > free:
        raise SpaceError(path=work.target.file.path, needed=needed, free=free)


def space_for(work: Transfer, tasks: list[Task], jobs: int, *, frees: bool) -> SpaceNeeded:
    """The space that ``tasks`` take and give back; every extent is looked at."""
    frees = frees and isinstance(work.layer, Overlay)
    frees = frees and _device(work.layer.image.file) == _device(work.target.file)  # type: ignore[attr-defined]
    steps = [(task.weight, growth(work, task), freed(work, task) if frees else 0) for task in tasks]
    lag = 2 * CHECKPOINT_BYTES + max(1, jobs) * AHEAD * TASK_BYTES
    return SpaceNeeded(
        peak(steps, lag), sum(step[1] for step in steps), sum(step[2] for step in steps)
    )


def _device(file: File) -> int:
    return file.status.st_dev


def peak(steps: Iterable[tuple[int, int, int]], lag: int) -> int:
    """The most that is taken at any time by ``steps`` of (weight, taken, given back).

    What a step gives back comes only when ``lag`` bytes of weight have followed it.
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


def _stretch(work: Transfer) -> int:
    """By how much copying up can multiply what is written."""
    if not isinstance(work.target, OverlayTarget):
        return 1
    return max(1, work.target.overlay.cluster_size // work.geometry.cluster_size)


def _arriving(work: Transfer, task: Task) -> Iterator[Extent]:
    """What the target will hold of ``task``, with what is copied up around it."""
    if not isinstance(work.target, OverlayTarget):
        yield from work.extents_of(task)
        return
    backing, top = work.target.overlay, work.layer
    runs = work.runs_of(task)
    touched = merged(backing.geometry.touched(*work.geometry.span(*run)) for run in runs)
    for run in touched:
        start, stop = backing.geometry.span(*run)
        if start < top.size:
            yield from top.walk(start, min(stop, top.size))
        if top.size < stop:
            yield from backing.walk(max(start, top.size), stop)


def growth(work: Transfer, task: Task) -> int:
    """Bytes of ``task`` that go into holes of the target."""
    target = work.target.file
    walk = (piece for piece in _arriving(work, task) if piece.kind is ExtentKind.DATA)
    return sum(
        stop - start - _held(target, start, stop)
        for piece in walk
        for start, stop in _copied(work, piece)
    )


def _held(file: File, start: int, stop: int) -> int:
    return sum(last - first for first, last in file.data_runs(start, stop))


def _copied(work: Transfer, piece: Extent) -> Iterator[Run]:
    """The parts of ``piece`` that are not cloned; what is copied up never is."""
    first = last = piece.start
    moved = piece.depth == 0 or not isinstance(work.target, OverlayTarget)
    if moved and work.shares(piece.depth):
        first, last = clonable(
            work.copy_options, piece.start, piece.stop, work.target.file.block_size
        )
    if last <= first:
        yield piece.start, piece.stop
    else:
        yield piece.start, first
        yield last, piece.stop


def freed(work: Transfer, task: Task) -> int:
    """Bytes of ``task`` that its old place gives back."""
    source = next(work.layer.files())
    held = source.data_runs(*work.geometry.span(task.first, task.stop))
    walk = (Extent(first, last, 0, ExtentKind.DATA) for first, last in held)
    return sum(stop - start for piece in walk for start, stop in _copied(work, piece))
