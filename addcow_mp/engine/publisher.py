"""Publishes finished clusters: the order in which data and bits become durable.

Copy the marks, sync the data, write the bits, sync the bits. A checkpoint copies the marks of the
done map, makes the data durable through a descriptor that was opened before the first write,
publishes the bits of that copy and no others, and makes them durable, layer after layer from below.
Only then it frees space that nothing refers to any more. Workers mark more clusters meanwhile; a
mark that appears during the sync may have data that the sync has missed, so it waits for the next
checkpoint. A bit on disk therefore always has its data, and freed space has no reader, whenever the
power fails.

The overlay's marks are copied before those of the backing file that receives the clusters. A worker
sets them in the other order, so what is published of the overlay is published of its backing file.

Tasks that have ended are published and freed as a whole, with their holes. Of other tasks, the
marked clusters are published; their space is freed with the rest of the task, or at the last
checkpoint of a job that ends early. The process that replaces a dead worker does not read marked
clusters again, so it never reads freed space.

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
    """Publishes the finished clusters of one job.

    ``data``: the file that receives bytes. ``backing``: an add-cow backing file whose marked
    clusters become allocated first. ``overlay``: the bits of its finished clusters become
    ``value`` then, and their space in its image is freed if ``frees``. ``by_cluster``: only marked
    clusters are finished, also those of tasks that have ended.
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
        by_cluster: bool = False,
    ) -> None:
        self._by_cluster = by_cluster
        self._data = data
        self._done_map = done_map
        self._overlay = overlay
        self._value = value
        self._backing = backing
        self._frees = frees
        #: What is published of tasks that had not ended at the last checkpoint.
        self._parts = SparseBits()

    def checkpoint(self, finished: Finished, source: Geometry, *, last: bool = False) -> None:
        """Publish ``finished``, in clusters of ``source``, the overlay.

        The ``last`` checkpoint of a job also frees the published space of unfinished tasks.
        """
        if self._by_cluster:
            finished = Finished([], sorted((*finished.ended, *finished.under_way)))
        # The copies precede the sync, and the overlay's precedes the backing file's.
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
            left = "what it holds is committed, the same command frees its space"
            fields = error.fields | {"reason": f"{error.fields['reason']}; {left}"}
            raise FileError(**fields) from error
