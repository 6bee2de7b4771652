"""What has become true on disk: the parent alone says so, and in this order.

Data, sync, bits, sync. A checkpoint takes what is done, makes the data of it durable
through a descriptor opened before the first write, publishes the bits of that and no
others, makes them durable, layer after layer from below, and only then frees space that
nothing refers to any more. Marks are read behind the sync: they are those of tasks that
had ended before it, and no other task ever marks there. A bit on disk therefore always has
its data, and freed space never had a reader, whatever instant the power fails at.

A sync that fails ends the job: nothing of that checkpoint is published.
"""

from __future__ import annotations

from addcow_mp.device import faults
from addcow_mp.device.files import File
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.board import Board
from addcow_mp.engine.transfer import BELOW
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry


class Publisher:
    """Publishes finished clusters of one job.

    ``data`` is the file that receives bytes. ``backing`` is an add-cow backing whose
    marked clusters become local first; ``overlay`` then gets ``value`` for its finished
    clusters, and the space of those is freed in its image if ``frees``.
    """

    def __init__(
        self,
        data: File,
        board: Board,
        *,
        overlay: Overlay | None = None,
        value: int = 0,
        backing: Overlay | None = None,
        frees: bool = False,
    ) -> None:
        self._data = data
        self._board = board
        self._overlay = overlay
        self._value = value
        self._backing = backing
        self._frees = frees

    def checkpoint(self, done: list[Run], source: Geometry) -> None:
        """Publish the clusters ``done`` of the overlay whose geometry is ``source``."""
        finished = list(merged(sorted(done)))
        self._data.sync()
        if faults.armed:
            with self._data.doing("publish"):
                faults.hit("publish")
        if self._backing is not None:
            ranges = (self._backing.geometry.touched(*source.span(*run)) for run in finished)
            self._backing.publish_marked(ranges, self._board.marks(BELOW))
        if self._overlay is not None:
            self._overlay.publish(finished, self._value)
            if self._frees:
                self._free(self._overlay, finished)

    @staticmethod
    def _free(overlay: Overlay, done: list[Run]) -> None:
        for first, stop in done:
            overlay.image.file.punch(*overlay.geometry.span(first, stop))
