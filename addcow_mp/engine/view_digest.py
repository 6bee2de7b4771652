"""One task of looking with a guest's eyes: digests of what is seen, whichever layer holds it.

For the first ``size`` bytes of a layer's view each group of leaves becomes one node of the tree
that docs/manifest.md tells of. Only data is read, leaf by leaf and through the chain; groups
without any are left out. Nothing is remembered, so two looks at the same view share nothing
but the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import groupby

from addcow_mp.device.extent import ExtentKind
from addcow_mp.device.files import new_buffer
from addcow_mp.device.layer import Layer
from addcow_mp.engine.done_map import DoneMap
from addcow_mp.engine.layer_digest import hash_leaves, leaves_touched
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.throttle import Throttle
from addcow_mp.engine.transfer import end_orphan
from addcow_mp.errors import StoppedError
from addcow_mp.format.bits import Run
from addcow_mp.format.manifest import GROUP, ZERO_BLOCK, digest


class View:
    """Hashes groups of the first ``size`` bytes of a view. Picklable to a worker.

    ``done_map`` says when to stop; ``rate``: bytes per second for this process, 0 = no limit.
    """

    def __init__(self, layer: Layer, size: int, done_map: DoneMap, rate: int = 0) -> None:
        self.layer = layer
        self.size = size
        self.done_map = done_map
        self.rate = rate
        self.parent: int | None = None
        #: Asked by the process that hands out the work, beside the board.
        self.stopping: Callable[[], bool] = lambda: False
        self._buffer = new_buffer()
        self._throttle = Throttle(rate)

    def __reduce__(self) -> tuple[object, ...]:
        return (View, (self.layer, self.size, self.done_map, self.rate), {"parent": os.getpid()})

    def __call__(self, task: Task, slot: int) -> dict[int, bytes]:  # noqa: ARG002
        """The nodes of the groups ``[first, stop)`` that have data, by their numbers."""
        start, stop = task.first * GROUP, min(task.stop * GROUP, self.size)
        return dict(self._nodes(start, stop))

    def _nodes(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        for number, spans in groupby(self._data(start, stop), key=lambda span: span[0] // GROUP):
            self._look_up()
            yield number, digest(self._block(number, list(spans)))

    def _look_up(self) -> None:
        """See whether to go on. Raises :class:`StoppedError`."""
        end_orphan(self.parent)
        if self.done_map.stopped or self.stopping():
            raise StoppedError(path=self.layer.path)

    def _data(self, start: int, stop: int) -> Iterator[Run]:
        """What of ``[start, stop)`` is data, cut where groups begin."""
        for piece in self.layer.walk(start, stop):
            if piece.kind is ExtentKind.DATA:
                for first in range(piece.start // GROUP * GROUP, piece.stop, GROUP):
                    yield max(piece.start, first), min(piece.stop, first + GROUP)

    def _block(self, number: int, spans: list[Run]) -> bytearray:
        """The 256 digests of a group that has data in ``spans``."""
        block, leaves = bytearray(ZERO_BLOCK), leaves_touched(spans, number)
        hash_leaves(block, leaves, number, self.size, self._read, self._buffer)
        return block

    def _read(self, view: memoryview, start: int) -> None:
        self.layer.read_into(view, start)
        self._throttle.spend(len(view), self._look_up)
