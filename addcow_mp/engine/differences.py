"""Finds where two backing files differ, before a job moves anything.

When many overlays of a base get its new version, the differences are the same for all of them, and
are found once. They are kept as one bit for each unit of the view, in sparse memory: only parts
with differences take space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from addcow_mp.device.layer import Layer
from addcow_mp.engine.allocation import data_stretches
from addcow_mp.engine.compare import FINE, Views
from addcow_mp.engine.scan import ScanHooks, ScanOptions, scan
from addcow_mp.engine.tasks import Task, cut
from addcow_mp.engine.worker import Failed, WorkerContext
from addcow_mp.errors import WorkerError
from addcow_mp.format.bitmap import SparseBits
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry


@dataclass(frozen=True)
class KnownDifferences:
    """The differences of two views: one bit for each ``unit`` bytes, set where they differ."""

    unit: int
    bits: SparseBits

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The differing parts of the bytes ``[start, stop)``, in whole units, in order."""
        first, last = start // self.unit, -(-stop // self.unit)
        for run in self.bits.runs(first, last):
            yield run[0] * self.unit, run[1] * self.unit


class _Search:
    """Finds the differing units of one task. Picklable to a worker, which maps the files."""

    def __init__(
        self,
        sides: tuple[Layer | None, Layer | None],
        geometry: Geometry,
        *,
        shares: bool,
        maps: bool = False,
    ) -> None:
        self._sides = sides
        self._geometry = geometry
        self._shares = shares
        self._views = Views(*sides, shares=shares, maps=maps)

    def __reduce__(self) -> tuple[object, ...]:
        in_worker = partial(_Search, shares=self._shares, maps=True)
        return (in_worker, (self._sides, self._geometry))

    def __call__(self, task: Task, worker: WorkerContext) -> list[Run]:
        """The runs of differing units within ``task``."""
        geometry, check = self._geometry, partial(worker.check, "")
        span, unit = geometry.span(task.first, task.stop), geometry.cluster_size
        # Where a window differs, larger parts are compared first.
        parts = (FINE, unit) if unit < FINE else (unit,)
        differing = self._views.differing(*span, parts, check)
        return list(merged(geometry.touched(*run) for run in differing))


def find_differences(
    old: Layer | None,
    new: Layer | None,
    geometry: Geometry,
    options: ScanOptions,
    hooks: ScanHooks,
    *,
    shares: bool,
) -> KnownDifferences:
    """Compare two views, in the clusters of ``geometry``. None = a view of zeros.

    ``shares``: as in :class:`~addcow_mp.engine.compare.Views`. Raises what ``hooks`` raise, and
    :class:`RestartsError` when they stop the search.
    """
    files = [file for side in (old, new) if side is not None for file in side.files()]
    tasks = cut(data_stretches(files, geometry, 1), geometry.clusters)
    known = KnownDifferences(geometry.cluster_size, SparseBits())
    for _, runs in scan(_Search((old, new), geometry, shares=shares), tasks, options, hooks):
        for run in runs:
            known.bits.set(*run)
    return known


def cannot_compare(name: str, failure: Failed) -> WorkerError:
    """The error for a failed task of a comparison; ``name``: the image that it names."""
    task, cause = failure.task, str(failure.error)
    return WorkerError(path=name, first=task.first, last=task.stop - 1, cause=cause)
