"""The bytes of a new qcow2 file that describes an overlay.

Layout, in clusters: header, refcount table, refcount blocks, L1 table, L2 tables. Only these have a
refcount, which is 1. An L2 table exists where one of its clusters is allocated. Only its part with
entries is written: the rest is a hole, so that a lonely cluster costs a page and not a table.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from addcow_mp.format.bits import Run
from addcow_mp.format.qcow2 import Header
from addcow_mp.format.qcow2_entries import (
    ALL_SUBCLUSTERS,
    COPIED,
    MAX_L1_BYTES,
    SUBCLUSTERS,
    Qcow2Error,
    Tables,
)
from addcow_mp.units import MiB

#: Bytes of a refcount.
_REFCOUNT_BYTES = 2


class _Part(NamedTuple):
    """Entries ``[first, stop)`` of table ``number``; ``bits`` are those of one partial entry."""

    number: int
    first: int
    stop: int
    bits: int | None = None


def _parts(tables: Tables, runs: Iterable[Run]) -> Iterator[_Part]:
    """What ``runs`` of allocated bytes are in entries, table by table, in order."""
    for first, stop, bits in _entries(tables, runs):
        for number in range(first // tables.entries, -(-stop // tables.entries)):
            base = number * tables.entries
            yield _Part(number, max(0, first - base), min(stop - base, tables.entries), bits)


def _entries(tables: Tables, runs: Iterable[Run]) -> Iterator[tuple[int, int, int | None]]:
    """The entries ``[first, stop)`` of ``runs``; a partial one by itself, with its bits."""
    if not tables.extended:
        for start, stop in runs:
            yield start // tables.cluster_size, -(-stop // tables.cluster_size), None
        return
    partial, bits = -1, 0
    for start, stop in runs:
        for entry, end, mask in _divided(tables, start, stop):
            if entry != partial and bits:
                yield partial, partial + 1, bits
                bits = 0
            if mask is None:
                yield entry, end, None
            else:
                partial, bits = entry, bits | mask
    if bits:
        yield partial, partial + 1, bits


def _divided(tables: Tables, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
    """One run of bytes as a partial entry, whole ones, and a partial entry."""
    first, head = divmod(start // tables.unit, SUBCLUSTERS)
    last, tail = divmod(-(-stop // tables.unit), SUBCLUSTERS)
    if first == last:
        yield first, first + 1, (1 << tail) - (1 << head)
        return
    if head:
        yield first, first + 1, ALL_SUBCLUSTERS + 1 - (1 << head)
        first += 1
    if first < last:
        yield first, last, None
    if tail:
        yield last, last + 1, (1 << tail) - 1


class Image(NamedTuple):
    """What a new twin describes.

    ``header.fixed`` gives size, cluster size and features; its other offsets are filled in.
    ``runs()`` gives the allocated ranges in bytes, in order, and is called twice. They begin and
    end at multiples of the unit, or end at the size.
    """

    header: Header
    runs: Callable[[], Iterator[Run]]

    @property
    def tables(self) -> Tables:
        """The shape of its L2 tables."""
        return Tables(self.header.cluster_size, extended=self.header.extended)


class _Layout(NamedTuple):
    """Where the tables of a new file lie, in clusters."""

    refcount_table: int
    refcount_blocks: int
    l1: int
    l2: int
    end: int

    @classmethod
    def of(cls, cluster: int, l1_entries: int, l2_tables: int) -> _Layout:
        l1 = max(1, -(-l1_entries * 8 // cluster))
        blocks = table = 1
        while True:
            total = 1 + table + blocks + l1 + l2_tables
            wanted = -(-total * _REFCOUNT_BYTES // cluster)
            if (blocks, table) == (wanted, -(-wanted * 8 // cluster)):
                return cls(1, 1 + table, 1 + table + blocks, 1 + table + blocks + l1, total)
            blocks, table = wanted, -(-wanted * 8 // cluster)


def chunks(image: Image) -> Iterator[tuple[int, bytes]]:
    """The bytes of a new file, each with its offset; what is not among them is a hole.

    The header comes last. No chunk is longer than one cluster or 1 MiB.
    """
    tables, cluster = image.tables, image.header.cluster_size
    l1_entries = -(-image.header.fixed.size // tables.coverage)
    layout = _Layout.of(cluster, l1_entries, _count_tables(tables, image.runs()))
    if l1_entries * 8 > MAX_L1_BYTES:
        raise Qcow2Error(
            f"clusters of {cluster} bytes describe at most "
            f"{MAX_L1_BYTES // 8 * tables.coverage} bytes to QEMU"
        )
    # First the last byte, which a table may overwrite: the length is a whole number of clusters.
    yield layout.end * cluster - 1, b"\0"
    yield from _l2_chunks(tables, layout, image.runs())
    yield from _l1_chunks(tables, layout, image.runs())
    yield from _refcount_chunks(cluster, layout)
    fixed = image.header.fixed._replace(
        l1_entries=max(1, l1_entries),
        l1_offset=layout.l1 * cluster,
        refcount_offset=layout.refcount_table * cluster,
        refcount_clusters=layout.refcount_blocks - layout.refcount_table,
    )
    yield 0, image.header._replace(fixed=fixed).pack()


def _numbers(tables: Tables, runs: Iterable[Run]) -> Iterator[int]:
    """The numbers of the tables with an allocated cluster, in order."""
    next_number = 0
    for start, stop in runs:
        first, last = start // tables.coverage, -(-stop // tables.coverage)
        yield from range(max(first, next_number), last)
        next_number = max(next_number, last)


def _count_tables(tables: Tables, runs: Iterable[Run]) -> int:
    return sum(1 for _ in _numbers(tables, runs))


def _l2_chunks(tables: Tables, layout: _Layout, runs: Iterable[Run]) -> Iterator[tuple[int, bytes]]:
    place, current = layout.l2 - 1, -1
    for number, first, stop, bits in _parts(tables, runs):
        if number != current:
            place, current = place + 1, number
        start = number * tables.coverage + first * tables.cluster_size
        one = bits is not None
        data = tables.entry(start, bits) if one else tables.allocated(start, stop - first)
        yield place * tables.cluster_size + first * tables.entry_size, data


def _l1_chunks(tables: Tables, layout: _Layout, runs: Iterable[Run]) -> Iterator[tuple[int, bytes]]:
    """The entries of the L1 table: adjacent ones in one chunk, up to 1 MiB."""
    base, place = layout.l1 * tables.cluster_size, layout.l2
    first, values = 0, array("Q")
    for number in _numbers(tables, runs):
        if values and (number != first + len(values) or len(values) * 8 >= MiB):
            yield base + first * 8, _big_endian(values)
            values = array("Q")
        if not values:
            first = number
        values.append(place * tables.cluster_size | COPIED)
        place += 1
    if values:
        yield base + first * 8, _big_endian(values)


def _refcount_chunks(cluster: int, layout: _Layout) -> Iterator[tuple[int, bytes]]:
    """A count of 1 for each cluster of the file, and the table of the blocks with these."""
    table, blocks, l1 = layout.refcount_table, layout.refcount_blocks, layout.l1
    entries = array("Q", range(blocks * cluster, l1 * cluster, cluster))
    yield table * cluster, _big_endian(entries)
    block = b"\0\1" * (cluster // _REFCOUNT_BYTES)
    for number in range(blocks, l1):
        left = (layout.end - (number - blocks) * len(block) // 2) * _REFCOUNT_BYTES
        yield number * cluster, block[:left]


def _big_endian(values: array[int]) -> bytes:
    values = values[:]
    values.byteswap()
    return values.tobytes()
