"""The job's board: shared memory in which workers write what they have finished.

It holds one bitmap for every layer whose bits the job will publish, and one counter
of bytes per worker. Each byte of a bitmap belongs to one task and each counter to one
worker, so nothing is ever locked; the parent only reads. A mark is made when the data
it speaks of has been written, so marks of a worker that died are as good as any.

The memory is sparse: it costs what is marked, not what the image could hold.
"""

from __future__ import annotations

import mmap
from typing import Any

from bitarray import bitarray

from addcow_mp.format.geometry import BITS_PER_BYTE

#: One processor cache line per counter, so that workers do not slow each other.
_SLOT = 64


class Board:
    """Marks and counters of one job, for ``layers`` bitmaps of so many clusters each."""

    def __init__(self, layers: tuple[int, ...], slots: int, memory: Any, shared: Any) -> None:
        self._layout = (layers, slots)
        self._shared = shared
        self._memory = memoryview(memory)
        self._counters = self._memory[: slots * _SLOT].cast("Q")
        self._bits: list[bitarray] = []
        start = slots * _SLOT
        for clusters in layers:
            stop = start + -(-clusters // BITS_PER_BYTE)
            self._bits.append(bitarray(buffer=self._memory[start:stop], endian="little"))
            start = stop

    @classmethod
    def create(cls, layers: tuple[int, ...], workers: int) -> Board:
        """A new board; with no ``workers`` its memory is private to this process.

        There is a counter for each worker and one for this process.
        """
        slots = workers + 1
        size = slots * _SLOT + sum(-(-clusters // BITS_PER_BYTE) for clusters in layers)
        if workers == 0:
            return cls(layers, slots, mmap.mmap(-1, size), None)
        from multiprocessing.shared_memory import SharedMemory

        shared = SharedMemory(create=True, size=size)
        return cls(layers, slots, shared.buf, shared)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attached, (self._shared.name, *self._layout))

    def bits(self, layer: int) -> bitarray:
        """The bitmap of finished clusters of ``layer``."""
        return self._bits[layer]

    def count(self, slot: int, amount: int) -> None:
        """Add ``amount`` bytes to the counter of the worker in ``slot``."""
        self._counters[slot * _SLOT // 8] += amount

    @property
    def total(self) -> int:
        """Bytes that all workers have moved so far."""
        return sum(self._counters)

    def close(self) -> None:
        """Give the memory back to the system."""
        self._bits.clear()
        self._counters.release()
        self._memory.release()
        if self._shared is not None:
            self._shared.close()
            self._shared.unlink()


def _attached(name: str, layers: tuple[int, ...], slots: int) -> Board:
    from multiprocessing.shared_memory import SharedMemory

    shared = SharedMemory(name=name)
    return Board(layers, slots, shared.buf, shared)
