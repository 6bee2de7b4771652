"""What the tables of a qcow2 file say of an overlay that QEMU has used.

The file may come from anywhere. A table that overlaps another or does not lie in the file, and an
entry that no twin has, are errors. Memory is bounded by 8 bytes for each L2 table of the file.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from enum import IntEnum
from heapq import merge
from typing import NamedTuple

from bitarray import bitarray

from addcow_mp.format.bits import BITS_PER_BYTE
from addcow_mp.format.qcow2 import Header, Read
from addcow_mp.format.qcow2_entries import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    COPIED,
    FEW,
    SUBCLUSTERS,
    ZERO,
    Qcow2Error,
    Tables,
)
from addcow_mp.units import KiB, MiB, round_up

_COPIED_BYTE = COPIED >> 56
_OFFSET = 0x00FF_FFFF_FFFF_FE00

#: As long as the longest table.
_ZEROS = bytes(2 * MiB)

#: Table offsets that are sorted at a time when tables are checked for overlaps.
_SORTED = 256 * KiB


class State(IntEnum):
    """What an entry says of a range of the guest's view."""

    EMPTY = 0
    ALLOCATED = 1
    ZERO = 2


class Extent(NamedTuple):
    """The bytes ``[start, stop)`` of the guest's view, all in one state."""

    start: int
    stop: int
    state: State


def extents(header: Header, read: Read, length: int) -> Iterator[Extent]:
    """What the tables of a file of ``length`` bytes say, in order, from 0 to its size.

    Adjacent extents differ in their state. Raises :class:`Qcow2Error` for a table that overlaps
    another, does not lie in the file, or has an entry that no twin has.
    """
    _refuse_overlaps(header, read, length)
    pending = Extent(0, 0, State.EMPTY)
    for start, stop, state in _table_extents(header, read):
        if start >= stop:
            continue
        if state == pending.state:
            pending = Extent(pending.start, stop, state)
        else:
            if pending.start < pending.stop:
                yield pending
            pending = Extent(start, stop, state)
    size = header.fixed.size
    if pending.start < size:
        yield Extent(pending.start, min(pending.stop, size), pending.state)


def _l1_entries(header: Header, read: Read) -> Iterator[tuple[int, int]]:
    """The number and the offset of each L2 table that exists."""
    tables = Tables(header.cluster_size, extended=header.extended)
    needed = -(-header.fixed.size // tables.coverage)
    for base in range(0, needed, MiB // 8):
        count = min(needed - base, MiB // 8)
        raw = _read_all(read, header.fixed.l1_offset + base * 8, count * 8)
        if raw == _ZEROS[: len(raw)]:
            continue
        values = array("Q", raw)
        values.byteswap()
        for number, value in enumerate(values, base):
            if value:
                yield number, _table_offset(number, value, header.cluster_size)


def _table_offset(number: int, value: int, cluster: int) -> int:
    offset = value & ~COPIED
    if offset & ~_OFFSET or offset % cluster or not offset:
        raise Qcow2Error(f"entry {number} of the L1 table is {value:#x}")
    return offset


def _read_all(read: Read, offset: int, count: int) -> bytes:
    raw = read(offset, count)
    if len(raw) < count:
        raise Qcow2Error("the file ends inside a table")
    return raw


def _refuse_overlaps(header: Header, read: Read, length: int) -> None:
    """Raise when two tables, or a table and the header, have a cluster in common."""
    cluster, fixed = header.cluster_size, header.fixed
    l1_end = fixed.l1_offset + round_up(max(1, fixed.l1_entries * 8), cluster)
    counts_end = fixed.refcount_offset + fixed.refcount_clusters * cluster
    taken = ((0, cluster), (fixed.l1_offset, l1_end), (fixed.refcount_offset, counts_end))
    last = -1
    for offset in _sorted_offsets(header, read):
        if offset == last:
            raise Qcow2Error(f"two L2 tables lie at {offset}")
        if offset + cluster > length:
            raise Qcow2Error(f"the file ends inside the L2 table at {offset}")
        if any(start <= offset < stop for start, stop in taken):
            raise Qcow2Error(f"the L2 table at {offset} overlaps another table")
        last = offset


def _sorted_offsets(header: Header, read: Read) -> Iterator[int]:
    """The offsets of all L2 tables in order. Takes 8 bytes of memory for each."""
    sorted_parts: list[array[int]] = []
    part: list[int] = []
    for _, offset in _l1_entries(header, read):
        part.append(offset)
        if len(part) >= _SORTED:
            sorted_parts.append(array("Q", sorted(part)))
            part.clear()
    return merge(*sorted_parts, sorted(part))


def _table_extents(header: Header, read: Read) -> Iterator[tuple[int, int, State]]:
    """The extents of all tables in order; ranges without a table are empty. Some have no bytes."""
    tables = Tables(header.cluster_size, extended=header.extended)
    position, size = 0, header.fixed.size
    for number, offset in _l1_entries(header, read):
        start = number * tables.coverage
        if position < start:
            yield position, start, State.EMPTY
        position = min(start + tables.coverage, size)
        used = -(-(position - start) // tables.cluster_size) * tables.entry_size
        raw = _read_all(read, offset, used)
        first, stop = _used_entries(tables, raw)
        used_start, used_stop = (start + one * tables.cluster_size for one in (first, stop))
        yield start, used_start, State.EMPTY
        entries = raw[first * tables.entry_size : stop * tables.entry_size]
        yield from _entry_extents(tables, used_start, entries)
        yield used_stop, position, State.EMPTY
    if position < size:
        yield position, size, State.EMPTY


def _used_entries(tables: Tables, raw: bytes) -> tuple[int, int]:
    """The first of the entries ``raw`` that is not empty, and the end of the last one.

    A table of a sparse disk has few entries, and most of it is skipped so.
    """
    bits, size = bitarray(buffer=raw), BITS_PER_BYTE * tables.entry_size
    first = bits.find(1)
    return (0, 0) if first < 0 else (first // size, bits.find(1, right=True) // size + 1)


def _entry_extents(tables: Tables, start: int, raw: bytes) -> Iterator[tuple[int, int, State]]:
    """The extents of the entries ``raw``, the first of them at ``start``.

    Entries that are all empty or all allocated are seen at once, others are divided by 8.
    """
    count = len(raw) // tables.entry_size
    stop = start + count * tables.cluster_size
    if raw == _ZEROS[: len(raw)]:  # a table is at most 2 MiB
        yield start, stop, State.EMPTY
    elif count > FEW and _may_be_allocated(tables, raw) and raw == tables.allocated(start, count):
        yield start, stop, State.ALLOCATED
    elif count > FEW:
        part = round_up(-(-len(raw) // 8), tables.entry_size)
        for place in range(0, len(raw), part):
            first = start + place // tables.entry_size * tables.cluster_size
            yield from _entry_extents(tables, first, raw[place : place + part])
    else:
        values = array("Q", raw)
        values.byteswap()
        one = _extended_extents if tables.extended else _plain_extents
        yield from one(tables, start, values)


def _may_be_allocated(tables: Tables, raw: bytes) -> bool:
    """Whether the first and the last entry are allocated: a cheap test before the full one."""
    return raw[0] >= _COPIED_BYTE and raw[-tables.entry_size] >= _COPIED_BYTE


def _plain_extents(
    tables: Tables, start: int, values: array[int]
) -> Iterator[tuple[int, int, State]]:
    for value in values:
        stop = start + tables.cluster_size
        state = State.EMPTY
        if value:
            _refuse_offset(value & ~ZERO, start)
            state = State.ZERO if value & ZERO else State.ALLOCATED
        yield start, stop, state
        start = stop


def _extended_extents(
    tables: Tables, start: int, values: array[int]
) -> Iterator[tuple[int, int, State]]:
    for value, bits in zip(values[::2], values[1::2], strict=True):
        allocated, zero = bits & ALL_SUBCLUSTERS, bits >> SUBCLUSTERS
        _refuse_offset(value, start)
        if allocated & zero or (allocated and not value):
            raise Qcow2Error(f"the entry at {start} has contradictory bits {bits:#x}")
        stop = start + tables.cluster_size
        state = _WHOLE_ENTRIES.get(bits)
        if state is not None:
            yield start, stop, state
        else:
            for number, first in enumerate(range(start, stop, tables.unit)):
                state = State((allocated >> number & 1) + 2 * (zero >> number & 1))
                yield first, first + tables.unit, state
        start = stop


#: What the bits of an entry say when all its subclusters are in one state.
_WHOLE_ENTRIES = {
    0: State.EMPTY,
    ALL_SUBCLUSTERS: State.ALLOCATED,
    ALL_SUBCLUSTERS << SUBCLUSTERS: State.ZERO,
}


def _refuse_offset(value: int, start: int) -> None:
    """Raise unless an entry refers to the guest's own offset, or to none."""
    if value & COMPRESSED:
        raise Qcow2Error(f"the cluster at {start} is compressed")
    offset = value & ~COPIED
    # A zero cluster has no offset; one at guest offset 0 has only the COPIED bit.
    if offset not in (0, start) or (not offset and start and value):
        raise Qcow2Error(f"the entry at {start} refers to {value:#x}")
