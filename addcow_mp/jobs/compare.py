"""Compare: whether two images show their guests the same disk.

Sizes may differ: what one has beyond the other must be zeros. With ``strict``, sizes must be
equal too, and both must hold data in the same places, so that one is a copy of the other in
what it takes of the disk as well. Of all that differs the first by offset is what counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from addcow_mp.device.chain import open_layer
from addcow_mp.device.extent import Extent, ExtentKind, joined
from addcow_mp.device.layer import Layer
from addcow_mp.engine.allocation import alignment, data_stretches
from addcow_mp.engine.compare import Comparison, Differences, overlapping
from addcow_mp.engine.scan import ScanHooks, ScanOptions, scan
from addcow_mp.engine.tasks import Task, cut
from addcow_mp.engine.worker import Failed, WorkerContext, attempt
from addcow_mp.errors import AddcowError, StoppedError, WorkerError
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.units import KiB

#: Tasks and surveys are in units of this size, whatever the clusters of either side.
UNIT = 64 * KiB


@dataclass
class Compared:
    """What came of it. ``differing``: runs of bytes; ``complete``: whether all were looked for.

    ``sizes``: both virtual sizes. ``allocation``: with ``strict``, the first place where only
    one side holds data.
    """

    sizes: tuple[int, int]
    differing: list[Run] = field(default_factory=list)
    complete: bool = True
    strict: bool = False
    allocation: int | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether they are equal in the sense asked for."""
        if self.strict and (self.sizes[0] != self.sizes[1] or self.allocation is not None):
            return False
        return not self.differing


class CompareError(AddcowError):
    """The images could not be compared: qemu-img's status for it is not that of a difference."""

    exit_code = 2


def compare(
    one: str,
    other: str,
    formats: tuple[str, str],
    *,
    strict: bool = False,
    every: bool = False,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
) -> Compared:
    """Compare the guest's views of two images of the given formats.

    ``every``: find all differing extents, not only the first. Raises
    :class:`CompareError` when either cannot be looked at.
    """
    with ExitStack() as opened:
        try:
            sides = [
                opened.enter_context(closing(open_layer(path, format_, access=options.access)))
                for path, format_ in zip((one, other), formats, strict=True)
            ]
            return _compare(sides[0], sides[1], options.jobs, hooks, strict=strict, every=every)
        except StoppedError:
            raise
        except AddcowError as error:
            raise CompareError(message=str(error)) from error


def _compare(
    one: Layer, other: Layer, jobs: int | None, hooks: Hooks, *, strict: bool, every: bool
) -> Compared:
    result = Compared((one.size, other.size), strict=strict)
    for side in (one, other):
        result.warnings += side.warnings()
    stop = max(one.size, other.size)
    if strict:
        if one.size != other.size and not every:
            return result
        result.allocation = _first_unequal_allocation(one, other)
        if result.allocation is not None and not every:
            stop = result.allocation
    geometry = Geometry(stop, UNIT)
    files = [*one.files(), *other.files()]
    tasks = cut(data_stretches(files, geometry, alignment(UNIT)), geometry.clusters)
    _look(one, other, geometry, tasks, jobs, hooks, result, every=every)
    return result


def _look(
    one: Layer,
    other: Layer,
    geometry: Geometry,
    tasks: list[Task],
    jobs: int | None,
    hooks: Hooks,
    result: Compared,
    *,
    every: bool,
) -> None:
    work = Comparison(one, other, geometry, first_only=not every)
    found: list[Run] = []
    finished = 0

    def failed(result: Failed) -> Differences:
        """What kills a process that maps it is named by one that reads it."""
        again = attempt(work, result.task, WorkerContext())
        if isinstance(again, Failed):
            raise _failed(one, other, again)
        differences: Differences = again.result
        return differences

    scan_hooks = ScanHooks(
        one.path, failed, hooks.stopping, lambda: bool(found and not every), hooks.progress
    )
    for _, differences in scan(work, tasks, ScanOptions(jobs, maps=True), scan_hooks):
        finished += 1
        found += differences.runs
        result.complete &= differences.complete
    result.differing = list(merged(sorted(found)))
    result.complete &= finished == len(tasks)
    total = sum(task.weight for task in tasks)
    hooks.progress(total, total)


def _failed(one: Layer, other: Layer, answer: Failed) -> AddcowError:
    return WorkerError(
        path=f"{one.path} and {other.path}",
        first=answer.task.first,
        last=answer.task.stop - 1,
        cause=str(answer.error),
    )


def _first_unequal_allocation(one: Layer, other: Layer) -> int | None:
    """Where only one side holds data, within the size that both have."""
    stop = min(one.size, other.size)
    sides = (joined(_presence(side, stop)) for side in (one, other))
    pairs = overlapping(*sides)
    return next((here.start for here, there in pairs if here.kind is not there.kind), None)


def _presence(side: Layer, stop: int) -> Iterator[Extent]:
    """What holds data and what does not, whichever file it is in."""
    for piece in side.walk(0, stop):
        yield piece._replace(
            depth=0, kind=ExtentKind.DATA if piece.kind is ExtentKind.DATA else ExtentKind.ZERO
        )
