"""Where a transfer writes: a raw file, or an add-cow backing file whose clusters it allocates."""

from __future__ import annotations

from addcow_mp.device.files import File
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.done_map import BELOW, DoneMap


class Target:
    """A raw file that receives bytes.

    ``is_fresh``: it is new, so what is not written reads as zeros. ``published``: the overlay whose
    bits are set for what was written. ``unit``: the bytes of one of its clusters, 1 without any.
    """

    published: Overlay | None = None
    unit = 1

    def __init__(self, file: File, *, is_fresh: bool = False) -> None:
        self.file = file
        self.is_fresh = is_fresh

    def prepare(self, start: int, stop: int, buffer: memoryview, done_map: DoneMap) -> None:
        """Prepare to receive ``[start, stop)``."""

    def finish(self, start: int, stop: int, done_map: DoneMap) -> None:
        """Mark that ``[start, stop)`` has been written."""


class RawTarget(Target):
    """A raw disk: any range can be written by itself, and there are no bits."""


class OverlayTarget(Target):
    """An add-cow backing file: its clusters become allocated.

    Of a cluster that is covered in part, the rest is copied up. A cluster is allocated if its bit
    or the done map says so: a second try must not copy up over what a worker process that died has
    written.
    """

    def __init__(self, overlay: Overlay) -> None:
        super().__init__(overlay.image.file)
        self.overlay = overlay
        self.unit = overlay.cluster_size
        self.published = None if overlay.all_allocated else overlay

    def prepare(self, start: int, stop: int, buffer: memoryview, done_map: DoneMap) -> None:
        """Copy up the rest of the clusters that ``[start, stop)`` covers only in part."""
        if self.published is None:
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
        if self.published is not None:
            done_map.marks(BELOW).set(*self.overlay.geometry.touched(start, stop))
