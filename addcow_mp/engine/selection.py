"""Selects the clusters that a job moves, and says where their bytes are read from.

Commit moves the allocated clusters, flatten the missing ones, and convert the whole view. Rebase
moves the missing clusters in which two backing files differ. A job that moves other clusters adds a
class. A selection is picklable to a worker process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from addcow_mp.device.extent import Extent
from addcow_mp.device.files import File
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.raw import RawLayer
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry

if TYPE_CHECKING:
    from addcow_mp.engine.differences import KnownDifferences


class Selection(ABC):
    """Clusters of ``layer``, in units of ``geometry``. ``source``: the layer that is read.

    ``leaves_some``: a task may leave out clusters, whose bits stay as they are, so moved clusters
    are marked one by one. ``depths``: how many layers the bytes of a selected cluster may come
    from, ``layer`` included.
    """

    leaves_some = False
    depths = 1

    def __init__(self, layer: Layer, geometry: Geometry, source: Layer | None) -> None:
        self.layer = layer
        self.geometry = geometry
        self.source = source

    @abstractmethod
    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield the runs of selected clusters in ``[first, stop)``."""

    def searched(self, first: int, stop: int, check: Callable[[], None]) -> Iterator[Run]:  # noqa: ARG002
        """Yield the same runs as :meth:`runs`; ``check`` is called during a long search."""
        return self.runs(first, stop)

    @abstractmethod
    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield the extents of the bytes ``[start, stop)`` of a run; depth 0 is ``layer``."""

    def close(self) -> None:
        """Close the files that a worker process received."""
        self.layer.abandon()

    @property
    def nearest(self) -> File | None:
        """The first file that bytes may come from."""
        return None if self.source is None else next(self.source.files())

    @property
    def plain_source(self) -> RawLayer | None:
        """The raw layer that all bytes come from, if there is only one."""
        return self.source if isinstance(self.source, RawLayer) else None


class _ClustersByBit(Selection):
    """The clusters of an overlay whose bits have one value."""

    def __init__(self, overlay: Overlay, bit: int, source: Layer | None) -> None:
        super().__init__(overlay, overlay.geometry, source)
        self._overlay = overlay
        self._bit = bit

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self._overlay,))

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        # A worker that replaces a dead one reads the bitmap again, which may have been cut short.
        refuse_short(self._overlay)
        return self._overlay.runs_by_allocation(self._bit, first, stop)


class AllocatedClusters(_ClustersByBit):
    """The allocated clusters of an overlay, read from its image file."""

    def __init__(self, overlay: Overlay) -> None:
        super().__init__(overlay, 1, overlay.image)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield what the image file holds."""
        return self._overlay.image.walk(start, stop)


class MissingClusters(_ClustersByBit):
    """The clusters of an overlay that are not allocated, read from its backing chain."""

    def __init__(self, overlay: Overlay) -> None:
        super().__init__(overlay, 0, overlay.backing)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield what the backing chain shows."""
        return self._overlay.walk_below(start, stop)


class DifferingClusters(MissingClusters):
    """The clusters that are not allocated and differ between the backing file and ``new``.

    ``known``: where the two differ; None = they are compared. ``new``: None = zeros. ``shares`` and
    ``maps``: as in :class:`~addcow_mp.engine.compare.Views`.
    """

    leaves_some = True

    def __init__(
        self,
        overlay: Overlay,
        new: Layer | None,
        known: KnownDifferences | None = None,
        *,
        shares: bool = False,
        maps: bool = False,
    ) -> None:
        super().__init__(overlay)
        self._new = new
        self._known = known
        self._shares = shares
        # Only a rebase compares: other jobs start faster without this import.
        from addcow_mp.engine.compare import Views

        self._views = Views(overlay.backing, new, shares=shares, maps=maps)

    def __reduce__(self) -> tuple[object, ...]:
        in_worker = partial(DifferingClusters, shares=self._shares, maps=True)
        return (in_worker, (self._overlay, self._new, self._known))

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield the runs of differing clusters in ``[first, stop)``."""
        return self.searched(first, stop, lambda: None)

    def searched(self, first: int, stop: int, check: Callable[[], None]) -> Iterator[Run]:
        """Yield the same runs, calling ``check`` between two extents."""
        if self._known is not None:
            return self._known_to_differ(self._known, first, stop)
        return merged(self._compared(first, stop, check))

    def _known_to_differ(self, known: KnownDifferences, first: int, stop: int) -> Iterator[Run]:
        geometry = self.geometry
        # A unit may be larger than a cluster, and may reach behind the last cluster.
        units = (geometry.touched(*one) for one in known.runs(*geometry.span(first, stop)))
        for start, end in merged((max(first, one[0]), min(stop, one[1])) for one in units):
            yield from super().runs(start, end)

    def _compared(self, first: int, stop: int, check: Callable[[], None]) -> Iterator[Run]:
        geometry = self.geometry
        for run in super().runs(first, stop):
            parts = (geometry.cluster_size,)
            for differing in self._views.differing(*geometry.span(*run), parts, check):
                yield geometry.touched(*differing)

    def close(self) -> None:
        """Close the files of both backing files as well."""
        super().close()
        if self._new is not None:
            self._new.abandon()


class WholeView(Selection):
    """Every cluster of the guest's view, in whatever file it lies."""

    def __init__(self, layer: Layer, geometry: Geometry) -> None:
        super().__init__(layer, geometry, layer)

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield all clusters as one run."""
        yield first, stop

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield what the guest sees."""
        return self.layer.walk(start, stop)

    @property
    def plain_source(self) -> None:
        """None: a raw disk is read extent by extent, to find its holes."""
        return
