"""One task of looking with a guest's eyes: digests of what is seen, whichever layer holds it.

For the first ``size`` bytes of a layer's view each group of leaves becomes one node of the tree
that docs/manifest.md tells of. Only data is read, leaf by leaf and through the chain; groups
without any are left out. Nothing is remembered, so two looks at the same view share nothing
but the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

from addcow_mp.device.extent import ExtentKind
from addcow_mp.device.files import new_buffer
from addcow_mp.device.layer import Layer
from addcow_mp.engine.layer_digest import hash_leaves, leaves_touched
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.format.bits import Run
from addcow_mp.format.manifest import GROUP, ZERO_BLOCK, digest


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
        read, nodes = partial(self._read, worker), dict[int, bytes]()
        for number, spans in groupby(self._data(start, stop), key=lambda span: span[0] // GROUP):
            worker.check(self.layer.path)
            nodes[number] = digest(self._block(number, list(spans), read))
        return nodes

    def _data(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the data of ``[start, stop)``, cut where groups begin."""
        for piece in self.layer.walk(start, stop):
            if piece.kind is ExtentKind.DATA:
                for first in range(piece.start // GROUP * GROUP, piece.stop, GROUP):
                    yield max(piece.start, first), min(piece.stop, first + GROUP)

    def _block(
        self, number: int, spans: list[Run], read: Callable[[memoryview, int], None]
    ) -> bytearray:
        """Return the 256 digests of a group that has data in ``spans``."""
        block, leaves = bytearray(ZERO_BLOCK), leaves_touched(spans, number)
        hash_leaves(block, leaves, number, self.size, read, self._buffer)
        return block

    def _read(self, worker: WorkerContext, view: memoryview, start: int) -> None:
        self.layer.read_into(view, start)
        worker.spend(len(view), self.layer.path)
