"""One task of hashing what a guest sees, whichever layer holds it.

Each group of leaves in the first ``size`` bytes of a view becomes one node of the tree that
docs/manifest.md defines. Only data is read, through the chain; groups without data are left out.
Nothing is kept, so that two digests of the same view share nothing but the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from addcow_mp.device.extent import ExtentKind
from addcow_mp.device.files import new_buffer
from addcow_mp.device.layer import Layer
from addcow_mp.engine.layer_digest import hash_leaves, leaves_touched
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.format.bits import Run
from addcow_mp.format.leaves import GROUP, ZERO_BLOCK, digest


class View:
    """Hashes groups of the first ``size`` bytes of a view. Picklable to a worker process."""

    def __init__(self, layer: Layer, size: int) -> None:
        self.layer = layer
        self.size = size
        self._buffer = new_buffer()

    def __reduce__(self) -> tuple[object, ...]:
        return (View, (self.layer, self.size))

    def __call__(self, task: Task, worker: WorkerContext) -> dict[int, bytes]:
        """Return the nodes of the groups ``[first, stop)`` that have data, by their numbers."""
        start, stop = task.first * GROUP, min(task.stop * GROUP, self.size)
        nodes = dict[int, bytes]()

        def read(view: memoryview, start: int) -> None:
            self.layer.read_into(view, start)
            worker.spend(len(view), self.layer.path)

        for number, spans in groupby(self._data(start, stop), key=lambda span: span[0] // GROUP):
            worker.check(self.layer.path)
            block, leaves = bytearray(ZERO_BLOCK), leaves_touched(list(spans), number)
            hash_leaves(block, leaves, number, self.size, read, self._buffer)
            nodes[number] = digest(block)
        return nodes

    def _data(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the data in ``[start, stop)``, cut at the borders of groups."""
        for extent in self.layer.walk(start, stop):
            if extent.kind is ExtentKind.DATA:
                for first in range(extent.start // GROUP * GROUP, extent.stop, GROUP):
                    yield max(extent.start, first), min(extent.stop, first + GROUP)
