"""Where a transfer writes: a raw file, or an add-cow backing file whose clusters it allocates."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from addcow_mp.device.files import File
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.done_map import BELOW, DoneMap


class Target(Protocol):
    """Where a transfer writes."""

    @property
    def file(self) -> File:
        """The raw file that receives the bytes."""

    @property
    def published(self) -> Overlay | None:
        """The overlay whose bits are set for what was written, if there is one."""

    @property
    def unit(self) -> int:
        """The bytes of one of its clusters; 1 without clusters."""

    @property
    def is_fresh(self) -> bool:
        """Whether all that is not written reads as zeros."""

    def prepare(self, start: int, stop: int, buffer: memoryview, done_map: DoneMap) -> None:
        """Prepare to receive ``[start, stop)``."""

    def finish(self, start: int, stop: int, done_map: DoneMap) -> None:
        """Mark that ``[start, stop)`` has been written."""


class RawTarget(NamedTuple):
    """A raw file; ``is_fresh`` when it is new and all of it reads as zeros."""

    file: File
    is_fresh: bool = False

    @property
    def published(self) -> Overlay | None:
        """None: a raw file has no bits."""
        return None

    @property
    def unit(self) -> int:
        """1: any range can be written by itself."""
        return 1

    def prepare(self, start: int, stop: int, buffer: memoryview, done_map: DoneMap) -> None:
        """Do nothing: a raw file accepts any range."""

    def finish(self, start: int, stop: int, done_map: DoneMap) -> None:
        """Do nothing: a raw file has no bits."""


class OverlayTarget(NamedTuple):
    """An add-cow backing file: its clusters become allocated.

    Of a cluster that is covered in part, the rest is copied up. A cluster is allocated if its
    bitmap or the done map says so: a second try must not copy up over what a worker process
    that died has written.
    """

    overlay: Overlay

    @property
    def file(self) -> File:
        """The image file of the backing file."""
        return self.overlay.image.file

    @property
    def published(self) -> Overlay | None:
        """The backing file, unless all its clusters count as allocated already."""
        return None if self.overlay.all_allocated else self.overlay

    @property
    def unit(self) -> int:
        """A cluster of the backing file is allocated as a whole."""
        return self.overlay.cluster_size

    @property
    def is_fresh(self) -> bool:
        """False: its clusters may hold anything."""
        return False

    def prepare(self, start: int, stop: int, buffer: memoryview, done_map: DoneMap) -> None:
        """Copy up the rest of the clusters that ``[start, stop)`` covers only in part."""
        if self.overlay.all_allocated:
            return
        geometry = self.overlay.geometry
        first, last = geometry.touched(start, stop)
        head, tail = geometry.span(first, last)
        for edge_start, edge_stop, cluster in ((head, start, first), (stop, tail, last - 1)):
            if edge_start < edge_stop and not self._is_allocated(cluster, done_map):
                self.overlay.copy_up(edge_start, edge_stop, buffer)

    def _is_allocated(self, cluster: int, done_map: DoneMap) -> bool:
        marks, bitmap = done_map.marks(BELOW), self.overlay.bitmap
        return marks.any(cluster, cluster + 1) or bitmap.any(cluster, cluster + 1)

    def finish(self, start: int, stop: int, done_map: DoneMap) -> None:
        """Mark the clusters as allocated, to be published."""
        if not self.overlay.all_allocated:
            done_map.marks(BELOW).set(*self.overlay.geometry.touched(start, stop))
