"""What has become true on disk: the parent alone says so, and in this order.

Copy the marks, data, sync, bits, sync. A checkpoint first takes a copy of what is marked as done
on the board, then makes the data durable through a descriptor opened before the first write,
publishes the bits of that copy and no others, makes them durable, layer after layer from below,
and only then frees space that nothing refers to any more. Workers go on marking meanwhile: a mark
that appears during the sync speaks of data that the sync may have missed, so it waits for the
next checkpoint. A bit on disk therefore always has its data, and freed space never had a reader,
whatever instant the power fails at.

The overlay's marks are copied before those of the backing that receives the clusters: a worker
makes them in the other order, so whatever is announced of the overlay is announced of its backing.

Tasks that have ended are published and freed as a whole, with their holes. Of tasks under way
the marked clusters are published; their space is freed with the rest of the task, or at the last
checkpoint of a job that ends early. A worker that replaces one that died does not read again what
is marked, so it never meets freed space.

A sync that fails ends the job: nothing of that checkpoint is published.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from addcow_mp.device import faults
from addcow_mp.device.files import File
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.done_map import BELOW, TOP, DoneMap
from addcow_mp.errors import FileError
from addcow_mp.format.bitmap import SparseBits
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.geometry import Geometry


class Finished(NamedTuple):
    """Clusters of the overlay: those of tasks that have ended, and those of all others."""

    ended: list[Run]
    under_way: list[Run]


class Publisher:
    """Publishes finished clusters of one job.

    ``data`` is the file that receives bytes. ``backing`` is an add-cow backing whose
    marked clusters become local first; ``overlay`` then gets ``value`` for its finished
    clusters, and the space of those is freed in its image if ``frees``.
    """

    def __init__(
        self,
        data: File,
        done_map: DoneMap,
        *,
        overlay: Overlay | None = None,
        value: int = 0,
        backing: Overlay | None = None,
        frees: bool = False,
    ) -> None:
        self._data = data
        self._done_map = done_map
        self._overlay = overlay
        self._value = value
        self._backing = backing
        self._frees = frees
        #: What is published of tasks that were under way at the last checkpoint.
        self._parts = SparseBits()

    def checkpoint(self, finished: Finished, source: Geometry, *, last: bool = False) -> None:
        """Publish what ``finished`` has come to, in clusters of ``source``, the overlay.

        The ``last`` one of a job also frees the space of what is published of unfinished tasks.
        """
        # Before the sync, and the overlay's before the backing's.
        parts = self._marked(TOP, finished.under_way) if self._overlay else SparseBits()
        below = self._marked_below(finished, source)
        self._data.sync()
        if faults.armed:
            with self._data.doing("publish"):
                faults.hit("publish")
        if self._backing is not None:
            self._backing.publish((), 1, below)
        if self._overlay is not None:
            self._publish(self._overlay, finished.ended, parts, last=last)

    def _marked(self, layer: int, ranges: Iterable[Run]) -> SparseBits:
        return SparseBits.of(self._done_map.marks(layer), ranges)

    def _marked_below(self, finished: Finished, source: Geometry) -> SparseBits:
        if self._backing is None:
            return SparseBits()
        geometry = self._backing.geometry
        ranges = sorted((*finished.ended, *finished.under_way))
        return self._marked(BELOW, merged(geometry.touched(*source.span(*one)) for one in ranges))

    def _publish(
        self, overlay: Overlay, ended: list[Run], parts: SparseBits, *, last: bool
    ) -> None:
        new = parts.copy()
        new.drop(self._parts)
        overlay.publish(ended, self._value, new)
        self._parts = parts
        if self._frees:
            self._free(overlay, ended)
            if last:
                self._free(overlay, parts.runs())

    @staticmethod
    def _free(overlay: Overlay, done: Iterable[Run]) -> None:
        try:
            for first, stop in done:
                overlay.image.file.punch(*overlay.geometry.span(first, stop))
        except FileError as error:
            told = "what it holds is committed, the same command frees its space"
            fields = error.fields | {"reason": f"{error.fields['reason']}; {told}"}
            raise FileError(**fields) from error
