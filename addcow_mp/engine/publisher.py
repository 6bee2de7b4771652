"""What has become true on disk: the parent alone says so, and in this order.

Data, sync, bits, sync. A checkpoint takes a copy of what is done, makes the data of it
durable through a descriptor opened before the first write, publishes the bits of that
copy and no others, makes them durable, layer after layer from below, and only then frees
space that nothing refers to any more. A bit on disk therefore always has its data, and
freed space never had a reader, whatever instant the power fails at.

A sync that fails ends the job: nothing of that checkpoint is published.
"""

from __future__ import annotations

from bitarray import bitarray

from addcow_mp.device import faults
from addcow_mp.device.files import File
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.board import Board
from addcow_mp.engine.transfer import BELOW
from addcow_mp.format.bitmap import Run, merged, runs
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
        marked = [] if self._backing is None else self._marked(finished, source, self._backing)
        self._data.sync()
        if faults.armed:
            with self._data.doing("publish"):
                faults.hit("publish")
        if self._backing is not None:
            self._publish_marks(self._backing, marked)
        if self._overlay is not None:
            self._overlay.publish(finished, self._value)
            if self._frees:
                self._free(self._overlay, finished)

    def _marked(
        self, done: list[Run], source: Geometry, backing: Overlay
    ) -> list[tuple[int, bitarray]]:
        """A copy of the backing's marks behind ``done``: first cluster, bits from there on."""
        bits = self._board.bits(BELOW)
        copies = []
        for run in done:
            first, stop = backing.geometry.touched(*source.span(*run))
            copies.append((first, bits[first:stop]))
        return copies

    @staticmethod
    def _publish_marks(backing: Overlay, marked: list[tuple[int, bitarray]]) -> None:
        backing.publish(
            (
                (base + first, base + stop)
                for base, bits in marked
                for first, stop in runs(bits, 1, 0, len(bits))
            ),
            1,
        )

    @staticmethod
    def _free(overlay: Overlay, done: list[Run]) -> None:
        for first, stop in done:
            overlay.image.file.punch(*overlay.geometry.span(first, stop))
