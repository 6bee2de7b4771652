"""One task of hashing: the digests of what a layer holds, for some groups of leaves.

Only what can differ from zeros is read: data of the file, in allocated clusters. Whole leaves are
read through a buffer that stays in the processor's cache and hashed from there. A leaf of which
only a part is allocated is assembled in a buffer of zeros. What the guest sees is read through the
chain, and only where leaves alone do not say it: where a leaf mixes layers, and where an overlay
ends within a leaf that its backing file continues.

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
from addcow_mp.format.header import without_reading_mark
from addcow_mp.format.leaves import DIGEST, FAN, GROUP, LEAF, ZERO_BLOCK, Group, digest, no_leaves
from addcow_mp.format.manifest import pack_group
from addcow_mp.units import KiB


def file_of(layer: Layer) -> File:
    """The raw file that holds what ``layer`` itself holds."""
    return next(layer.files())


def is_fully_allocated(layer: Layer) -> bool:
    """Whether no layer below ``layer`` is visible."""
    return not isinstance(layer, Overlay) or layer.all_allocated


# Header and bitmap

#: Bytes that are read sooner than mapped; a header alone can take 64 KiB.
FEW = 128 * KiB


def cow_digests(overlay: Overlay, buffer: memoryview | None = None) -> tuple[str, str]:
    """The digests of header and bitmap, in hexadecimal; large holes are not read."""
    buffer = new_buffer() if buffer is None else buffer
    size, cow = overlay.header.header_size, overlay.cow
    stop = max(size, min(cow.length, size + overlay.geometry.bitmap_length))
    header, bitmap = blake3(), blake3()
    for first in range(0, stop, len(buffer)):
        view = buffer[: min(len(buffer), stop - first)]
        _read_mapped(cow, view, first)
        if first == 0:
            without_reading_mark(view)
        header.update(view[: max(0, size - first)])
        bitmap.update(view[max(0, size - first) :])
    return header.hexdigest(), bitmap.hexdigest()


def _read_mapped(file: File, view: memoryview, start: int) -> None:
    """Fill ``view`` with the bytes from ``start`` on, through a mapping where that is possible.

    A few bytes, as of most overlays, are read: that is one call, and a mapping takes six.
    """
    stop = start + len(view)
    if len(view) <= FEW and stop <= file.length:
        file.read_into(view, start)
        return
    data = list(file.data_runs(start, stop))
    for first, last in between(data, start, stop):
        view[first - start : last - start] = bytes(last - first)
    for first, last in data:
        part = view[first - start : last - start]
        if not syscalls.read_mapped(file.fd, part, first):
            file.read_into(part, first)


# Leaves


def hash_leaves(
    block: bytearray,
    bits: bitarray,
    number: int,
    size: int,
    read: Callable[[memoryview, int], None],
    buffer: memoryview,
) -> None:
    """Put the digests of the leaves ``bits`` of a group into its ``block``.

    ``read`` fills parts of ``buffer`` from a view of ``size`` bytes.
    """
    step = len(buffer) // LEAF
    for first, stop in runs(bits, 1, 0, FAN):
        for leaf in range(first, stop, step):
            start, view = (number * FAN + leaf) * LEAF, buffer[: min(step, stop - leaf) * LEAF]
            length = min(len(view), size - start)
            read(view[:length], start)
            view[length:] = bytes(len(view) - length)
            found = b"".join(digest(view[at : at + LEAF]) for at in range(0, len(view), LEAF))
            block[leaf * DIGEST : leaf * DIGEST + len(found)] = found


class Hasher:
    """Hashes what ``layer`` holds in its raw file.

    Counts the bytes that it reads, and calls ``spend`` with the bytes of each read.
    """

    def __init__(
        self,
        layer: Layer,
        spend: Callable[[int], None] = lambda _: None,
        buffer: memoryview | None = None,
    ) -> None:
        raw = layer.image if isinstance(layer, Overlay) else layer
        assert isinstance(raw, RawLayer)  # noqa: S101 - there is no other kind of layer
        self._raw = raw
        self._spend = spend
        self._buffer = new_buffer() if buffer is None else buffer
        self.bytes_read = 0

    def held(self, number: int, spans: list[Run], mixed: bitarray) -> bytes:
        """The 256 digests of a group in which the bytes ``spans`` belong to the layer.

        ``mixed`` leaves are assembled from parts, all others are read as a whole.
        """
        held = bytearray(ZERO_BLOCK)
        data = [part for span in spans for part in self._raw.file.data_runs(*span)]
        touched = leaves_touched(data, number)
        hash_leaves(held, touched & ~mixed, number, self._raw.size, self._read, self._buffer)
        for leaf in (touched & mixed).search(1):
            held[leaf * DIGEST : (leaf + 1) * DIGEST] = self._assembled(number * FAN + leaf, data)
        return bytes(held)

    def _assembled(self, leaf: int, data: list[Run]) -> bytes:
        """The digest of a leaf of which only ``data`` counts."""
        view, base = self._buffer[:LEAF], leaf * LEAF
        view[:] = bytes(LEAF)
        for first, last in data:
            start, stop = max(first, base), min(last, base + LEAF)
            if start < stop:
                self._read(view[start - base : stop - base], start)
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
        for number in self._groups(task.first, task.stop):
            worker.check(self.layer.path)
            packed.append(pack_group(number, self._group(number)))
        return b"".join(packed)

    def _groups(self, first: int, stop: int) -> Iterator[int]:
        """The groups in ``[first, stop)`` that may need a record."""
        size, last = self.layer.size, -1
        for start, end in self._own_runs(first * GROUP, min(stop * GROUP, size)):
            for number in range(max(last + 1, start // GROUP), -(-end // GROUP)):
                yield number
                last = number
        # The group of the leaf in which the view ends.
        final = (size - 1) // GROUP
        if size % LEAF and first <= final < stop and last < final:
            yield final

    def _own_runs(self, start: int, end: int) -> Iterator[Run]:
        """The bytes that belong to the layer, holes of a fully allocated one left out."""
        if is_fully_allocated(self.layer):
            return file_of(self.layer).data_runs(start, end)
        return self._allocated(start, end)

    def _allocated(self, start: int, end: int) -> Iterator[Run]:
        assert isinstance(self.layer, Overlay)  # noqa: S101 - others are fully allocated
        geometry = self.layer.geometry
        first, stop = geometry.touched(start, end)
        return (geometry.span(*run) for run in self.layer.runs_by_allocation(1, first, stop))

    def _group(self, number: int) -> Group:
        """What the layer holds in one group."""
        group, spans = self._outline(number)
        self._fill(number, group, spans)
        return group

    def _outline(self, number: int) -> tuple[Group, list[Run]]:
        """A group without digests, and the bytes of it that belong to the layer."""
        layer, group = self.layer, Group()
        start, stop = number * GROUP, min((number + 1) * GROUP, layer.size)
        spans = [(start, stop)]
        if not is_fully_allocated(layer):
            allocated = self._allocated(start, stop)
            spans = [(max(here, start), min(there, stop)) for here, there in allocated]
            group.covered = leaves_touched(spans, number)
            whole = _whole_leaves(spans, number, layer.size)
            group.mixed = group.covered & ~whole | self._cut(number, group.covered)
            group.covered |= group.mixed
        return group, spans

    def _fill(self, number: int, group: Group, spans: list[Run]) -> None:
        """Put the digests into a group, of which ``spans`` belong to the layer."""
        group.held = self._hasher.held(number, spans, group.mixed)
        if group.mixed.any():
            group.seen = self._seen(number, group.mixed)

    def _seen(self, number: int, bits: bitarray) -> bytes:
        """The digests of what the guest sees in the leaves ``bits`` of a group."""
        layer, seen = self.layer, bytearray(ZERO_BLOCK)
        hash_leaves(seen, bits, number, layer.size, layer.read_into, self._buffer)
        return bytes(seen)

    def _cut(self, number: int, covered: bitarray) -> bitarray:
        """The leaf in which the view ends, if a larger backing file continues it."""
        bits, size = no_leaves(), self.layer.size
        below = self.layer.backing if isinstance(self.layer, Overlay) else None
        leaf = size // LEAF - number * FAN
        if size % LEAF and below is not None and below.size > size and 0 <= leaf < FAN:
            bits[leaf] = not covered[leaf]
        return bits


def bytes_of(leaves: bitarray, number: int) -> Iterator[Run]:
    """The runs of some leaves of a group, in bytes."""
    base = number * FAN
    return (
        ((base + first) * LEAF, (base + last) * LEAF) for first, last in runs(leaves, 1, 0, FAN)
    )


def within_leaves(spans: list[Run], leaves: bitarray, number: int) -> list[Run]:
    """The parts of ``spans`` that lie in some ``leaves`` of a group."""
    return [
        (max(start, first), min(stop, last))
        for first, last in bytes_of(leaves, number)
        for start, stop in spans
        if start < last and first < stop
    ]


def leaves_touched(spans: list[Run], number: int) -> bitarray:
    """The leaves of a group that ``spans`` touch."""
    bits = no_leaves()
    for start, stop in spans:
        bits[start // LEAF - number * FAN : -(-stop // LEAF) - number * FAN] = 1
    return bits


def _whole_leaves(spans: list[Run], number: int, size: int) -> bitarray:
    """The leaves of a group of which all bytes within the view lie in ``spans``."""
    bits, base = no_leaves(), number * FAN
    for start, stop in merged(spans):
        end = -(-stop // LEAF) if stop == size else stop // LEAF
        first = -(-start // LEAF)
        if first < end:
            bits[first - base : end - base] = 1
    return bits
