"""Compare: whether two images show their guests the same disk.

Sizes may differ: what one image has beyond the other must be zeros. With ``strict``, sizes must be
equal, and both images must hold data in the same places. The difference with the lowest offset is
the one that counts.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import ClassVar

from addcow_mp.device.chain import open_layer
from addcow_mp.device.extent import joined
from addcow_mp.device.layer import Layer
from addcow_mp.engine.allocation import alignment, data_stretches
from addcow_mp.engine.compare import Comparison, Differences, overlapping
from addcow_mp.engine.scan import ScanHooks, ScanOptions, scan
from addcow_mp.engine.tasks import cut
from addcow_mp.engine.worker import Failed, WorkerContext, attempt
from addcow_mp.errors import AddcowError, StoppedError, WorkerError
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.units import KiB

#: Tasks are in units of this size, whatever the clusters of either image.
UNIT = 64 * KiB


@dataclass
class Compared:
    """The result. ``differing``: runs of bytes, as their start and their stop.

    ``complete``: all differences were looked for. ``sizes``: both virtual sizes in bytes.
    ``allocation``: with ``strict``, the offset of the first place where only one image holds data.
    """

    exit_statuses: ClassVar = {
        0: "the images are identical",
        1: "the images differ",
        2: "the images could not be compared",
    }

    sizes: tuple[int, int]
    differing: list[Run] = field(default_factory=list)
    complete: bool = True
    strict: bool = False
    allocation: int | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether the images are equal in the sense asked for."""
        if self.strict and (self.sizes[0] != self.sizes[1] or self.allocation is not None):
            return False
        return not self.differing

    @property
    def exit_code(self) -> int:
        """0 the same, 1 different."""
        return int(not self.same)


class CompareError(AddcowError):
    """The images could not be compared; qemu-img ends with this status too."""

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

    ``every``: find all differing extents, not only the first. Raises :class:`CompareError` when an
    image cannot be read.
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
    warnings = [*one.warnings(), *other.warnings()]
    result = Compared((one.size, other.size), strict=strict, warnings=warnings)
    stop = max(one.size, other.size)
    if strict:
        if one.size != other.size and not every:
            return result
        result.allocation = _first_unequal_allocation(one, other)
        if result.allocation is not None and not every:
            stop = result.allocation
    work = Comparison(one, other, Geometry(stop, UNIT), first_only=not every)
    _scan(work, ScanOptions(jobs, maps=True), hooks, result)
    return result


def _scan(work: Comparison, options: ScanOptions, hooks: Hooks, result: Compared) -> None:
    """Compare everything, or until the first difference, and enter it into ``result``."""
    one, other = work.sides
    geometry, files = work.geometry, [*one.files(), *other.files()]
    tasks = cut(data_stretches(files, geometry, alignment(UNIT)), geometry.clusters)
    found: list[Run] = []
    finished = 0

    def failed(failure: Failed) -> Differences:
        """Repeat a task by reading: what ends a process that maps the file is then an error."""
        again = attempt(work, failure.task, WorkerContext())
        if isinstance(again, Failed):
            path, cause = f"{one.path} and {other.path}", str(again.error)
            task = again.task
            raise WorkerError(path=path, first=task.first, last=task.stop - 1, cause=cause)
        differences: Differences = again.result
        return differences

    def enough() -> bool:
        return bool(found) and work.first_only

    scan_hooks = ScanHooks(one.path, failed, hooks.stopping, enough, hooks.progress)
    for _, differences in scan(work, tasks, options, scan_hooks):
        finished += 1
        found += differences.runs
        result.complete &= differences.complete
    result.differing = list(merged(sorted(found)))
    result.complete &= finished == len(tasks)
    total = sum(task.weight for task in tasks)
    hooks.progress(total, total)


def _first_unequal_allocation(one: Layer, other: Layer) -> int | None:
    """Where only one image holds data, within the size that both have."""
    stop = min(one.size, other.size)
    # Which file holds the data, and whether zeros are in a file, does not matter.
    pairs = overlapping(joined(one.walk(0, stop)), joined(other.walk(0, stop)))
    return next((here.start for here, there in pairs if here.data is not there.data), None)
