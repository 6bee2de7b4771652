"""One task of hashing: the digests of what a layer holds, leaf by leaf, for some groups of leaves.

Only what can be other than zero is read: data of the file, in clusters that are local. Whole
leaves are read in one go through a buffer that stays in the processor's cache and hashed from
there; a leaf of which only a part is local is put together in a buffer of zeros. What the guest
sees is read through the chain, and only where leaves alone do not say it: where a leaf mixes
layers, and where an overlay ends within a leaf that its backing file goes on with.

Header and bitmap of an overlay have a digest each, of all their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bitarray import bitarray
from blake3 import blake3

from addcow_mp.device import syscalls
from addcow_mp.device.files import File, new_buffer
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.format.bits import Run, between, merged, runs
from addcow_mp.format.manifest import (
    DIGEST,
    FAN,
    GROUP,
    LEAF,
    ZERO_BLOCK,
    Group,
    digest,
)


def file_of(layer: Layer) -> File:
    """The raw file that holds what ``layer`` itself holds."""
    return next(layer.files())


def raw_of(layer: Layer) -> RawLayer:
    """The same as a layer: it reads as zeros behind the last byte that the view has of it."""
    raw = layer.image if isinstance(layer, Overlay) else layer
    assert isinstance(raw, RawLayer)  # noqa: S101 - there is no other kind of layer
    return raw


def is_fully_allocated(layer: Layer) -> bool:
    """Whether nothing below ``layer`` decides what is seen."""
    return not isinstance(layer, Overlay) or layer.all_allocated


# What an .add-cow file holds


def cow_digests(overlay: Overlay, buffer: memoryview | None = None) -> tuple[str, str]:
    """The digests of header and bitmap, in hexadecimal; what is a hole is not looked at."""
    buffer = new_buffer() if buffer is None else buffer
    size, cow = overlay.header.header_size, overlay.cow
    stop = max(size, min(cow.length, size + overlay.geometry.bitmap_length))
    header, bitmap = blake3(), blake3()
    for first in range(0, stop, len(buffer)):
        view = buffer[: min(len(buffer), stop - first)]
        _look_at(cow, view, first)
        header.update(view[: max(0, size - first)])
        bitmap.update(view[max(0, size - first) :])
    return header.hexdigest(), bitmap.hexdigest()


def _look_at(file: File, view: memoryview, start: int) -> None:
    """Fill ``view`` with what stands from ``start`` on, where holes are zeros.

    It is looked at through a mapping, like every bitmap, and read where that cannot be.
    """
    stop = start + len(view)
    data = list(file.data_runs(start, stop))
    for first, last in between(data, start, stop):
        view[first - start : last - start] = bytes(last - first)
    for first, last in data:
        part = view[first - start : last - start]
        if not syscalls.read_mapped(file.fd, part, first):
            file.read_into(part, first)


# Leaf by leaf


def hash_leaves(
    block: bytearray,
    bits: bitarray,
    number: int,
    size: int,
    read: Callable[[memoryview, int], None],
    buffer: memoryview,
) -> None:
    """Put the digests of the leaves ``bits`` of a group into its ``block``.

    They are of the first ``size`` bytes of what ``read`` fills views from, several at a time.
    """
    step = len(buffer) // LEAF
    for first, stop in runs(bits, 1, 0, FAN):
        for leaf in range(first, stop, step):
            start, view = (number * FAN + leaf) * LEAF, buffer[: min(step, stop - leaf) * LEAF]
            length = min(len(view), size - start)
            read(view[:length], start)
            if length < len(view):
                view[length:] = bytes(len(view) - length)
            found = b"".join(digest(view[at : at + LEAF]) for at in range(0, len(view), LEAF))
            block[leaf * DIGEST : leaf * DIGEST + len(found)] = found


def _nobody(length: int) -> None:
    """Nobody wants to know what was read."""


class Hasher:
    """Hashes what ``layer`` holds in its raw file.

    Counts what it reads, and tells ``spend`` of the bytes of each reading.
    """

    def __init__(
        self,
        layer: Layer,
        spend: Callable[[int], None] = _nobody,
        buffer: memoryview | None = None,
    ) -> None:
        self._raw = raw_of(layer)
        self._spend = spend
        self._buffer = new_buffer() if buffer is None else buffer
        self.bytes_read = 0

    def held(self, number: int, spans: list[Run], mixed: bitarray) -> bytes:
        """The 256 digests of a group of which ``spans`` are the layer's own, in bytes.

        Leaves that are ``mixed`` are put together, all others read as a whole.
        """
        held = bytearray(ZERO_BLOCK)
        data = [part for span in spans for part in self._raw.file.data_runs(*span)]
        touched = leaves_touched(data, number)
        hash_leaves(held, touched & ~mixed, number, self._raw.size, self._read, self._buffer)
        for first, stop in runs(touched & mixed, 1, 0, FAN):
            for leaf in range(first, stop):
                held[leaf * DIGEST : (leaf + 1) * DIGEST] = self._part(number * FAN + leaf, data)
        return bytes(held)

    def _part(self, leaf: int, data: list[Run]) -> bytes:
        """The digest of a leaf of which only ``data`` counts."""
        view = self._buffer[:LEAF]
        view[:] = bytes(LEAF)
        for start, stop in _within(data, leaf * LEAF, (leaf + 1) * LEAF):
            self._read(view[start - leaf * LEAF : stop - leaf * LEAF], start)
        return digest(view)

    def _read(self, view: memoryview, start: int) -> None:
        self._raw.read_into(view, start)
        self.bytes_read += len(view)
        self._spend(len(view))


class LeafHasher:
    """Hashes the groups of a task. Picklable to a worker; returns records of a manifest."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._buffer = new_buffer()
        self._hasher = Hasher(layer, buffer=self._buffer)

    def __reduce__(self) -> tuple[object, ...]:
        return (LeafHasher, (self.layer,))

    def __call__(self, task: Task, worker: WorkerContext) -> bytes:
        """The records of the groups ``[first, stop)``."""
        packed = []
        for number in groups_of(self.layer, task.first, task.stop):
            worker.check(self.layer.path)
            packed.append(self.group(number).pack(number))
        return b"".join(packed)

    def group(self, number: int) -> Group:
        """What the layer says of one group."""
        group, spans = Group(), list(local_spans(self.layer, number))
        if not is_fully_allocated(self.layer):
            group.covered = leaves_touched(spans, number)
            whole = _whole_leaves(spans, number, self.layer.size)
            group.mixed = group.covered & ~whole | self._cut(number, group.covered)
            group.covered |= group.mixed
        group.held = self._hasher.held(number, spans, group.mixed)
        if group.mixed.any():
            group.seen = self._seen(number, group.mixed)
        return group

    def _cut(self, number: int, covered: bitarray) -> bitarray:
        """The last leaf, if it ends within and what lies below goes on behind that."""
        bits, size = bitarray(FAN, endian="little"), self.layer.size
        below = self.layer.backing if isinstance(self.layer, Overlay) else None
        leaf = size // LEAF - number * FAN
        if size % LEAF and below is not None and below.size > size and 0 <= leaf < FAN:
            bits[leaf] = not covered[leaf]
        return bits

    def _seen(self, number: int, mixed: bitarray) -> bytes:
        seen = bytearray(ZERO_BLOCK)
        hash_leaves(seen, mixed, number, self.layer.size, self.layer.read_into, self._buffer)
        return bytes(seen)


# Which leaves


def groups_of(layer: Layer, first: int, stop: int) -> Iterator[int]:
    """The groups in ``[first, stop)`` of which there is something to say."""
    start, end = first * GROUP, min(stop * GROUP, layer.size)
    last = -1
    for span_start, span_stop in _inhabited(layer, start, end):
        for number in range(max(last + 1, span_start // GROUP), -(-span_stop // GROUP)):
            yield number
            last = number
    # The leaf that is cut by the end of the view.
    final = (layer.size - 1) // GROUP
    if layer.size % LEAF and first <= final < stop and last < final:
        yield final


def _inhabited(layer: Layer, start: int, end: int) -> Iterator[Run]:
    if isinstance(layer, Overlay) and not layer.all_allocated:
        first, stop = layer.geometry.touched(start, end)
        return (layer.geometry.span(*run) for run in layer.runs_by_allocation(1, first, stop))
    return file_of(layer).data_runs(start, end)


def local_spans(layer: Layer, number: int) -> Iterator[Run]:
    """The bytes of a group that are the layer's own."""
    start, stop = number * GROUP, min((number + 1) * GROUP, layer.size)
    if not isinstance(layer, Overlay) or layer.all_allocated:
        yield start, stop
        return
    first, last = layer.geometry.touched(start, stop)
    for run in layer.runs_by_allocation(1, first, last):
        here, there = layer.geometry.span(*run)
        yield max(here, start), min(there, stop)


def leaves_touched(spans: list[Run], number: int) -> bitarray:
    """The leaves of a group that ``spans`` touch."""
    bits = bitarray(FAN, endian="little")
    for start, stop in spans:
        bits[start // LEAF - number * FAN : -(-stop // LEAF) - number * FAN] = 1
    return bits


def _whole_leaves(spans: list[Run], number: int, size: int) -> bitarray:
    """The leaves of a group that lie in ``spans`` with all bytes that the view has of them."""
    bits, base = bitarray(FAN, endian="little"), number * FAN
    for start, stop in merged(spans):
        end = -(-stop // LEAF) if stop == size else stop // LEAF
        first = -(-start // LEAF)
        if first < end:
            bits[first - base : end - base] = 1
    return bits


def _within(spans: list[Run], start: int, stop: int) -> Iterator[Run]:
    for first, last in spans:
        if first < stop and start < last:
            yield max(first, start), min(last, stop)
