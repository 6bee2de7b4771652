"""Selects the clusters of a commit through several layers.

Each byte of the view of ``top`` comes from the layer at some depth. The view *covers* a byte of the
layer at ``depth`` if the byte comes from a layer above: from an allocated cluster, or as a zero
because a layer above has ended. All other bytes *fall through*: they come from the layer at
``depth`` or from below it.

- :class:`ViewAbove` selects the covered bytes of the view: a commit writes them into the layer at
  ``depth``, which then shows what ``top`` shows.
- :class:`CoveredClusters` selects the missing clusters of the layer at ``depth`` with a covered
  byte. The view of ``top`` does not need them. Other views may need them, because the commit will
  change the layers below.

Layers may differ in cluster size and in virtual size. The clusters of :class:`ViewAbove` are so
small that each is covered as a whole or not at all. So no byte that falls through is written to
the file from which it is read.
"""

from __future__ import annotations

from collections.abc import Iterator

from addcow_mp.device.extent import Extent
from addcow_mp.device.layer import Layer
from addcow_mp.device.layers import overlays_above
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.engine.allocation import data_stretches
from addcow_mp.engine.selection import Selection
from addcow_mp.engine.tasks import Stretch
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import round_down


def covered(top: Overlay, depth: int, start: int, stop: int) -> Iterator[Run]:
    """The bytes of ``[start, stop)`` that the view of ``top`` covers of the layer at ``depth``."""
    return merged(_covered(top, depth, start, min(stop, top.size)))


def _covered(layer: Layer | None, depth: int, start: int, stop: int) -> Iterator[Run]:
    if depth == 0 or not isinstance(layer, Overlay) or start >= stop:
        return
    for first, last, allocated in layer.layout(start, stop):
        if allocated:
            yield first, last
        elif depth > 1:
            below = 0 if layer.backing is None else layer.backing.size
            held = min(max(first, below), last)
            yield from _covered(layer.backing, depth - 1, first, held)
            if held < last:
                yield held, last


class ViewAbove(Selection):
    """What the view of ``top`` covers of the layer at ``depth``."""

    def __init__(self, top: Overlay, depth: int) -> None:
        self._overlays = overlays_above(top, depth)
        super().__init__(top, Geometry(top.size, _unit(self._overlays)), top)
        self._top, self.depths = top, depth

    def __reduce__(self) -> tuple[object, ...]:
        return (ViewAbove, (self._top, len(self._overlays)))

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield the runs of covered clusters."""
        _refuse_short(self._overlays)
        spans = covered(self._top, len(self._overlays), *self.geometry.span(first, stop))
        return merged(self.geometry.touched(*span) for span in spans)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield what the guest sees."""
        return self._top.walk(start, stop)

    def stretches(self, aligned: int) -> Iterator[Stretch]:
        """Yield stretches of clusters with data, weighed by what is allocated."""
        files = [overlay.image.file for overlay in self._overlays]
        for stretch in data_stretches(files, self.geometry, aligned):
            start, stop = self.geometry.span(stretch.first, stretch.stop)
            weight = min(stretch.weight, _allocated_bytes(self._overlays, start, stop))
            if weight:
                yield Stretch(stretch.first, stretch.stop, weight)


class CoveredClusters(Selection):
    """The missing clusters of the overlay at ``depth`` in which the view of ``top`` covers a byte.

    They are read from below that overlay.
    """

    leaves_some = True

    def __init__(self, top: Overlay, depth: int) -> None:
        self._above = overlays_above(top, depth)
        self._overlay = overlays_above(top, depth + 1)[-1]
        super().__init__(self._overlay, self._overlay.geometry, self._overlay.backing)
        self._top = top

    def close(self) -> None:
        """Close the files of the layers above as well."""
        self._top.abandon()

    def __reduce__(self) -> tuple[object, ...]:
        return (CoveredClusters, (self._top, len(self._above)))

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield the runs of these clusters."""
        _refuse_short([*self._above, self._overlay])
        missing = self._overlay.runs_by_allocation(0, first, stop)
        return merged(run for one in missing for run in self._covered(one))

    def _covered(self, missing: Run) -> Iterator[Run]:
        spans = covered(self._top, len(self._above), *self.geometry.span(*missing))
        return (self.geometry.touched(*span) for span in spans)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield what the layers below show."""
        return self._overlay.walk_below(start, stop)

    def stretches(self, aligned: int) -> Iterator[Stretch]:
        """Yield stretches of clusters with data below; a weight is the most that is moved."""
        size, below = self.geometry.cluster_size, self._overlay.backing
        files = [] if below is None else list(below.files())
        for stretch in data_stretches(files, self.geometry, aligned):
            stop = min(stretch.stop, self.geometry.clusters)
            held = _allocated(self._overlay, stretch.first, stop)
            span = self.geometry.span(stretch.first, stop)
            most = _allocated_bytes(self._above, *span, unit=size) + self._ended_bytes(*span)
            weight = min(stretch.weight, most, (stop - stretch.first - held) * size)
            if weight:
                yield Stretch(stretch.first, stretch.stop, weight)

    def _ended_bytes(self, start: int, stop: int) -> int:
        """The most bytes in clusters that are covered because a layer above has ended."""
        end = min(overlay.size for overlay in self._above)
        return max(
            0, min(stop, self._top.size) - round_down(max(start, end), self._overlay.cluster_size)
        )


def _unit(overlays: list[Overlay]) -> int:
    """The largest size of clusters that are covered as a whole or not at all."""
    ends = (overlay.size for overlay in overlays if 0 < overlay.size < overlays[0].size)
    # ``end & -end`` is the lowest bit of a number: the largest power of two that divides it.
    units = (end & -end for end in ends)
    return min(*(overlay.cluster_size for overlay in overlays), *units)


def _allocated_bytes(overlays: list[Overlay], start: int, stop: int, unit: int = 0) -> int:
    """The bytes in allocated clusters of all ``overlays``; a cluster counts ``unit`` or more."""
    total = 0
    for overlay in overlays:
        first, last = overlay.geometry.touched(start, min(stop, overlay.size))
        if first < last:
            total += _allocated(overlay, first, last) * max(unit, overlay.cluster_size)
    return total


def _allocated(overlay: Overlay, first: int, stop: int) -> int:
    return stop - first if overlay.all_allocated else overlay.bitmap.count(first, stop)


def _refuse_short(overlays: list[Overlay]) -> None:
    # In a bitmap that was cut short since it was opened, clusters would seem to be missing.
    for overlay in overlays:
        refuse_short(overlay)
