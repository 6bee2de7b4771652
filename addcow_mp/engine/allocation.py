"""Finds the stretches of an image that have data to move, from which tasks are cut.

The cost is that of the data, not of the virtual size: holes of the bitmap and of the files are
skipped in one step. Weights are estimates: only the spread of work and the progress bar use them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from addcow_mp.device.files import File
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.tasks import TASK_BYTES, Stretch
from addcow_mp.format.bits import BITS_PER_BYTE, Run
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import round_down, round_up

#: A stretch with so many runs of data counts as full: the worker walks through small runs anyway,
#: so they are not all counted here.
MAX_PROBES = 16


def alignment(cluster_size: int, other_cluster_size: int = 0) -> int:
    """Return the clusters between possible borders of tasks.

    Eight clusters share a byte of the bitmap; the other layer that is written may have larger ones.
    """
    return BITS_PER_BYTE * max(cluster_size, other_cluster_size) // cluster_size


def _step(geometry: Geometry, aligned: int) -> int:
    return round_up(max(1, TASK_BYTES // geometry.cluster_size), aligned)


def allocated_stretches(overlay: Overlay, aligned: int) -> Iterator[Stretch]:
    """Yield stretches with allocated clusters, weighed by their number."""
    geometry = overlay.geometry
    if overlay.all_allocated:
        yield from data_stretches([overlay.image.file], geometry, aligned)
        return
    step = _step(geometry, aligned)
    for first, count in overlay.bitmap.counts(step):
        yield Stretch(first, first + step, count * geometry.cluster_size)


def unallocated_stretches(
    overlay: Overlay, aligned: int, files: list[File] | None = None
) -> Iterator[Stretch]:
    """Yield stretches that have data in ``files`` and clusters that are not allocated.

    ``files``: those of the chain by default.
    """
    geometry = overlay.geometry
    files = list(overlay.files()) if files is None else files
    for stretch in data_stretches(files, geometry, aligned):
        stop = min(stretch.stop, geometry.clusters)
        missing = stop - stretch.first - overlay.bitmap.count(stretch.first, stop)
        if missing:
            weight = min(stretch.weight, missing * geometry.cluster_size)
            yield Stretch(stretch.first, stretch.stop, weight)


def stretches_of(runs: Iterable[Run], geometry: Geometry, aligned: int) -> Iterator[Stretch]:
    """Yield stretches with the clusters of ``runs``, in order, weighed by their number."""
    step = _step(geometry, aligned)
    counts: Counter[int] = Counter()
    for first, stop in runs:
        for base in range(round_down(first, step), stop, step):
            counts[base] += min(stop, base + step) - max(first, base)
    for base, count in sorted(counts.items()):
        yield Stretch(base, base + step, count * geometry.cluster_size)


def data_stretches(files: list[File], geometry: Geometry, aligned: int) -> Iterator[Stretch]:
    """Yield stretches where a file has data, weighed by the sum over all files."""
    step = _step(geometry, aligned)
    position = 0
    while (data := _next_data(files, position)) is not None and data < geometry.size:
        first = round_down(geometry.cluster_of(data), step)
        start, stop = geometry.span(first, first + step)
        weight = sum(_weight(file, start, stop) for file in files)
        yield Stretch(first, first + step, min(weight, stop - start))
        position = stop


def _next_data(files: list[File], position: int) -> int | None:
    found = (file.next_data(position) for file in files)
    return min((place for place in found if place is not None), default=None)


def _weight(file: File, start: int, stop: int) -> int:
    known = list(islice(file.data_runs(start, stop), MAX_PROBES))
    if len(known) == MAX_PROBES:
        return stop - start
    return sum(last - first for first, last in known)
