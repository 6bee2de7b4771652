"""Selects the clusters that a job moves, and says where their bytes are read from.

Each class is one answer: commit moves the allocated clusters, flatten the missing ones, convert the
whole view. A job with another answer adds a class. A selection is picklable to a worker process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from addcow_mp.device.extent import Extent
from addcow_mp.device.files import File
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.raw import RawLayer
from addcow_mp.format.bits import Run
from addcow_mp.format.geometry import Geometry


class Selection(ABC):
    """Clusters of ``layer``, in units of ``geometry``, and the extents that they are made of."""

    layer: Layer
    geometry: Geometry

    @abstractmethod
    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield the runs of selected clusters in ``[first, stop)``."""

    @abstractmethod
    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield the extents of the bytes ``[start, stop)`` of a run; depth 0 is ``layer``."""

    @property
    def nearest(self) -> File | None:
        """The first file that bytes may come from."""
        return next(self.layer.files())

    @property
    def plain_source(self) -> RawLayer | None:
        """The raw layer that all bytes come from, if there is only one."""
        return None


@dataclass(frozen=True)
class AllocatedClusters(Selection):
    """The allocated clusters of an overlay, read from its image file."""

    layer: Overlay

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        """The overlay's."""
        return self.layer.geometry

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield runs of clusters whose bits are set. Refuses a bitmap that was cut short."""
        refuse_short(self.layer)
        return self.layer.runs_by_allocation(1, first, stop)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield what the image file holds."""
        return self.layer.image.walk(start, stop)

    @property
    def plain_source(self) -> RawLayer | None:
        """The image file."""
        return self.layer.image


@dataclass(frozen=True)
class MissingClusters(Selection):
    """The clusters of an overlay that are not allocated, read from its backing chain."""

    layer: Overlay

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        """The overlay's."""
        return self.layer.geometry

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield runs of clusters whose bits are clear. Refuses a bitmap that was cut short."""
        refuse_short(self.layer)
        return self.layer.runs_by_allocation(0, first, stop)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield what the backing chain shows."""
        return self.layer.walk_below(start, stop)

    @property
    def nearest(self) -> File | None:
        """The raw file of the backing file, if there is one."""
        return None if self.layer.backing is None else next(self.layer.backing.files())

    @property
    def plain_source(self) -> RawLayer | None:
        """The backing file, if it is raw."""
        backing = self.layer.backing
        return backing if isinstance(backing, RawLayer) else None


@dataclass(frozen=True)
class WholeView(Selection):
    """Every cluster of the guest's view, whichever file holds it."""

    layer: Layer
    geometry: Geometry

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """Yield all clusters as one run."""
        yield first, stop

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield what the guest sees."""
        return self.layer.walk(start, stop)
