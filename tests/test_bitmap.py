"""The bitmap of a file against a list of bools, the bitmap in memory against a set.

Each example is a real file: a header region, a bitmap with any bits set (also past the last
cluster), and often an end that comes too early. After every change the whole file is compared. A
change may write no byte that stays equal.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from addcow_mp.format import bitmap as bitmap_module
from addcow_mp.format import bits as bits_module
from addcow_mp.format.bitmap import PAGE_BITS, CowBitmap, SparseBits
from addcow_mp.format.bits import WINDOW, WINDOW_BITS, MappedBits, Run, merged, runs
from addcow_mp.format.geometry import Geometry
from support.command import GiB, KiB, MiB
from support.properties import tried

OFFSET = 4 * KiB
CLUSTER = 4 * KiB
FILL = 0xA5

PROPERTY = tried(50)

# Below, at and above the borders of bytes, of words and of the bitmap's own clusters.
COUNTS = st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 100, 1000, 32767, 32768, 32769, 40000])


def runs_of(bits: list[bool], value: int, start: int, stop: int) -> list[Run]:
    """The runs of ``value``, by looking at one bit after the other."""
    found, position = [], start
    for same, group in itertools.groupby(bits[start:stop]):
        length = len(list(group))
        if same == bool(value):
            found.append((position, position + length))
        position += length
    return found


@dataclass
class Case:
    """A bitmap on disk and what must be true of it."""

    clusters: int
    ones: set[int]  # bits set in the file, wherever they are
    cut: int  # bytes of the bitmap that the file lacks
    content: bytes = field(init=False)

    def __post_init__(self) -> None:
        raw = bytearray(self.geometry.bitmap_length)
        for one in self.ones:
            raw[one // 8] |= 1 << one % 8
        self.cut = min(self.cut, len(raw))
        self.content = bytes([FILL]) * OFFSET + bytes(raw[: len(raw) - self.cut])

    @property
    def geometry(self) -> Geometry:
        # The last cluster is a partial one.
        return Geometry(max(0, self.clusters * CLUSTER - 512), CLUSTER)

    @property
    def stored(self) -> int:
        """Bits that the file has room for."""
        return (len(self.content) - OFFSET) * 8

    @property
    def local(self) -> list[bool]:
        """One bool for each cluster."""
        local = [False] * self.clusters
        for one in self.ones:
            if one < min(self.stored, self.clusters):
                local[one] = True
        return local

    @property
    def stray(self) -> int:
        """Bits past the last cluster."""
        return sum(self.clusters <= one < self.stored for one in self.ones)


def places(clusters: int) -> st.SearchStrategy[int]:
    """Places in the bitmap, mostly near its beginning, the last cluster and its end."""
    length = Geometry(clusters * CLUSTER, CLUSTER).bitmap_length * 8
    near = [place + away for place in (0, clusters, length) for away in range(-20, 21)]
    inside = [place for place in near if 0 <= place < length]
    return st.sampled_from(inside) | st.integers(0, length - 1)


@st.composite
def cases(draw: st.DrawFn, *, short: bool = True) -> Case:
    """Bitmaps of all kinds; with ``short``, some in files that end too early."""
    clusters = draw(COUNTS)
    if clusters == 0:
        return Case(0, set(), 0)
    ones = draw(st.sets(places(clusters), max_size=12))
    for start in draw(st.lists(places(clusters), max_size=2)):
        ones |= set(range(start, start + draw(st.sampled_from([3, 8, 64, 3000]))))
    length = Geometry(clusters * CLUSTER, CLUSTER).bitmap_length
    ones = {one for one in ones if one < length * 8}
    cuts = st.sampled_from([0, 0, 1, 7, length - 1, length - 8, length]) | st.integers(0, length)
    return Case(clusters, ones, draw(cuts) if short else 0)


def ranges(clusters: int) -> st.SearchStrategy[Run]:
    """Ranges of clusters, empty ones included."""
    ends = st.integers(0, clusters) | st.integers(0, min(clusters, 70))
    return st.tuples(ends, ends).map(lambda pair: (min(pair), max(pair)))


@contextmanager
def opened(case: Case) -> Iterator[tuple[CowBitmap, int]]:
    """The bitmap of a new file with this content, and the file's descriptor."""
    with TemporaryFile() as file:
        file.write(case.content)
        file.flush()
        yield CowBitmap(file.fileno(), OFFSET, case.geometry), file.fileno()


def content_of(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


# ---- looking ----


@PROPERTY
@given(cases(), st.data())
def test_reading_bits_agrees_with_a_list_of_bools(case: Case, data: st.DataObject) -> None:
    local = case.local
    with opened(case) as (bitmap, _):
        for start, stop in data.draw(st.lists(ranges(case.clusters), min_size=1, max_size=4)):
            part = local[start:stop]
            assert bitmap.count(start, stop) == sum(part)
            assert bitmap.slice(start, stop).tolist() == part
            assert bitmap.any(start, stop) is any(part)
            if start < stop:
                assert bitmap.all(start, stop) is all(part)
                for value in (0, 1):
                    assert list(bitmap.runs(value, start, stop)) == runs_of(
                        local, value, start, stop
                    )


@PROPERTY
@given(cases())
def test_whole_bitmap_agrees_with_a_list_of_bools(case: Case) -> None:
    with opened(case) as (bitmap, _):
        assert bitmap.count() == sum(case.local)
        assert bitmap.stray() == case.stray
        assert bitmap.short is (case.cut > 0)
        assert bitmap.clusters == case.clusters


@PROPERTY
@given(cases())
def test_every_bit_outside_the_populated_ranges_is_0(case: Case) -> None:
    local = case.local
    with opened(case) as (bitmap, _):
        parts = list(bitmap.data_runs())
    assert all(0 <= first <= stop <= case.clusters for first, stop in parts)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(parts))
    for first, stop in parts:
        local[first:stop] = [False] * (stop - first)
    assert not any(local)


@PROPERTY
@given(cases(), st.data())
def test_populated_ranges_of_a_part_of_the_bitmap(case: Case, data: st.DataObject) -> None:
    start, stop = data.draw(ranges(case.clusters))
    local = case.local
    with opened(case) as (bitmap, _):
        parts = list(bitmap.data_runs(start, stop))
        assert sum(bitmap.count(*part) for part in parts) == sum(local[start:stop])
    assert all(start <= first <= last <= stop for first, last in parts)


def test_holes_of_the_bitmap_file_are_not_populated(tmp_path: Path) -> None:
    geometry = Geometry(64 * GiB, CLUSTER)
    with (tmp_path / "sparse").open("wb+", buffering=0) as file:
        file.truncate(OFFSET + geometry.bitmap_length)
        os.pwrite(file.fileno(), b"\1", OFFSET + MiB)
        parts = list(CowBitmap(file.fileno(), OFFSET, geometry).data_runs())
        if os.fstat(file.fileno()).st_blocks * 512 > MiB:
            pytest.skip("this file system stores no holes")
    assert any(first <= 8 * MiB < stop for first, stop in parts)
    assert sum(stop - first for first, stop in parts) <= 8 * 64 * KiB


def test_file_that_ends_before_its_bitmap_has_no_allocated_cluster() -> None:
    case = Case(100, {1, 2}, 4096)
    with opened(case) as (bitmap, _):
        assert bitmap.short
        assert list(bitmap.data_runs()) == []
        assert list(bitmap.runs(0, 0, 100)) == [(0, 100)]
        assert bitmap.slice(90, 100).tolist() == [False] * 10


# ---- changing ----


@contextmanager
def watching_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bytes]]]:
    """The pwrites of the block, as offset and bytes; they are carried out all the same."""
    seen: list[tuple[int, bytes]] = []
    pwrite = os.pwrite

    def watched(fd: int, data: bytes | memoryview, offset: int) -> int:
        seen.append((offset, bytes(data)))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", watched)
        yield seen


def assert_needed(before: bytes, writes: list[tuple[int, bytes]]) -> None:
    """Assert that each write begins and ends with a byte that was another one before."""
    for offset, data in writes:
        assert data[0] != before[offset]
        assert data[-1] != before[offset + len(data) - 1]


def expected(case: Case, start: int, bits: list[bool]) -> bytes:
    """The content with these bits from cluster ``start`` on, and all else as it was."""
    content = bytearray(case.content)
    for number, bit in enumerate(bits, start):
        content[OFFSET + number // 8] &= ~(1 << number % 8)
        content[OFFSET + number // 8] |= bit << number % 8
    return bytes(content)


def assert_changed(case: Case, after: bytes, wanted: bytes) -> None:
    """Assert that the file is as wanted; stray bits in the last cluster's byte may be 0."""
    assert len(after) == len(wanted)
    last = OFFSET + case.clusters // 8
    own = (1 << case.clusters % 8) - 1
    assert after[:last] == wanted[:last]
    assert after[last + 1 :] == wanted[last + 1 :]
    if case.clusters % 8:
        assert after[last] in (wanted[last], wanted[last] & own)


@PROPERTY
@given(cases(short=False), st.data())
def test_setting_a_range_changes_no_other_bits(case: Case, data: st.DataObject) -> None:
    start, stop = data.draw(ranges(case.clusters))
    value = data.draw(st.integers(0, 1))
    with opened(case) as (bitmap, fd), pytest.MonkeyPatch.context() as monkeypatch:
        with watching_writes(monkeypatch) as writes:
            bitmap.fill(start, stop, value)
        assert_needed(case.content, writes)
        assert_changed(case, content_of(fd), expected(case, start, [bool(value)] * (stop - start)))
        # It is seen through the mapping, and a second time there is nothing to do.
        assert bitmap.count(start, stop) == value * (stop - start)
        with watching_writes(monkeypatch) as again:
            bitmap.fill(start, stop, value)
        assert again == []


@PROPERTY
@given(cases(short=False), st.data())
def test_publishing_agrees_with_a_list_of_bools(case: Case, data: st.DataObject) -> None:
    start, stop = data.draw(ranges(case.clusters))
    flipped = data.draw(st.sets(st.integers(start, max(start, stop - 1)), max_size=20))
    seen: list[Run] = []

    def flip(bits: bitarray, first: int) -> None:
        seen.append((first, first + len(bits)))
        for number in flipped:
            if first <= number < first + len(bits):
                bits.invert(number - first)

    wanted = [bit ^ (number in flipped) for number, bit in enumerate(case.local)][start:stop]
    with opened(case) as (bitmap, fd):
        bitmap.publish(start, stop, flip)
        assert seen == ([(start, stop)] if start < stop else [])
        assert bitmap.slice(start, stop).tolist() == wanted
        assert_changed(case, content_of(fd), expected(case, start, wanted))


@PROPERTY
@given(cases())
def test_clearing_stray_bits_changes_no_cluster(case: Case) -> None:
    wanted = bytearray(expected(case, 0, case.local[: case.stored]))
    for one in case.ones:
        if case.clusters <= one < case.stored:
            wanted[OFFSET + one // 8] &= ~(1 << one % 8)
    with opened(case) as (bitmap, fd), pytest.MonkeyPatch.context() as monkeypatch:
        with watching_writes(monkeypatch) as writes:
            bitmap.clear_stray()
        assert content_of(fd) == bytes(wanted)
        assert bitmap.stray() == 0
        assert bool(writes) is bool(case.stray)
        assert_needed(case.content, writes)
        assert bitmap.count() == sum(case.local)


def test_bitmap_shows_the_changes_of_another_process() -> None:
    with opened(Case(100, {3}, 0)) as (bitmap, fd):
        os.pwrite(fd, b"\xff", OFFSET + 5)
        assert list(bitmap.runs(1, 0, 100)) == [(3, 4), (40, 48)]


def test_unchanged_pages_of_the_bitmap_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    page = 8 * 4 * KiB
    case = Case(6 * page, set(range(page - 5, 5 * page + 5)), 0)
    with opened(case) as (bitmap, fd):
        with watching_writes(monkeypatch) as writes:
            bitmap.fill(0, case.clusters, 1)
        assert sum(len(data) for _, data in writes) <= 2 * 4 * KiB
        assert_needed(case.content, writes)
        assert content_of(fd)[OFFSET:] == b"\xff" * (6 * 4 * KiB)


@pytest.mark.parametrize("value", [0, 1])
def test_large_bitmap_change_is_written_in_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: int
) -> None:
    monkeypatch.setattr(bitmap_module, "PUBLISH_BYTES", 16)
    clusters, start, stop = 1000, 5, 990
    geometry = Geometry(clusters * CLUSTER, CLUSTER)
    old = bytes([255 * (1 - value)])
    with (tmp_path / "bitmap").open("wb+", buffering=0) as file:
        file.write(bytes([FILL]) * OFFSET + old * geometry.bitmap_length)
        bitmap = CowBitmap(file.fileno(), OFFSET, geometry)
        with watching_writes(monkeypatch) as writes:
            bitmap.fill(start, stop, value)
        assert max(len(data) for _, data in writes) <= 17
        assert len(writes) >= 123 // 17
        assert list(bitmap.runs(value, 0, clusters)) == [(start, stop)]
        assert content_of(file.fileno())[OFFSET + 125 :] == old * (geometry.bitmap_length - 125)


# ---- runs ----


@PROPERTY
@given(st.lists(st.booleans(), max_size=200), st.integers(0, 1), st.data())
def test_runs_agree_with_a_plain_search(bits: list[bool], value: int, data: st.DataObject) -> None:
    start, stop = data.draw(ranges(len(bits)))
    found = list(runs(bitarray(bits, endian="little"), value, start, stop))
    assert found == runs_of(bits, value, start, stop)


@PROPERTY
@given(st.lists(ranges(200), max_size=20).map(sorted))
def test_merged_ranges_keep_all_members_and_do_not_touch(parts: list[Run]) -> None:
    parts = [(first, stop) for first, stop in parts if first < stop]
    joined = list(merged(parts))
    members = set(itertools.chain.from_iterable(range(*part) for part in parts))
    assert set(itertools.chain.from_iterable(range(*part) for part in joined)) == members
    assert all(one[1] < other[0] for one, other in itertools.pairwise(joined))


# ---- the bitmap in memory ----

# Around the borders of its pages.
SPOTS = st.sampled_from([0, PAGE_BITS, 3 * PAGE_BITS]).flatmap(
    lambda border: st.integers(max(0, border - 70), border + 70)
)
SPANS = st.tuples(SPOTS, st.sampled_from([0, 1, 2, 63, 200, PAGE_BITS])).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)


def of(spans: list[Run]) -> tuple[SparseBits, set[int]]:
    """Sparse bits with these runs set, and the same as a set."""
    bits, model = SparseBits(), set[int]()
    for span in spans:
        bits.set(*span)
        model |= set(range(*span))
    return bits, model


def members(bits: SparseBits) -> set[int]:
    """Every set bit; insists that the runs come in order and are not empty."""
    found = list(bits.runs())
    assert all(first < stop for first, stop in found)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(found))
    return set(itertools.chain.from_iterable(range(*run) for run in found))


@PROPERTY
@given(st.lists(SPANS, max_size=6))
def test_sparse_bits_agree_with_a_set(spans: list[Run]) -> None:
    bits, model = of(spans)
    assert members(bits) == model
    assert bool(bits) is bool(model)


@PROPERTY
@given(st.lists(SPANS, max_size=4), st.lists(SPANS, max_size=4))
def test_copy_of_sparse_bits_is_independent(spans: list[Run], later: list[Run]) -> None:
    bits, model = of(spans)
    copy = bits.copy()
    for span in later:
        bits.set(*span)
    assert members(copy) == model
    assert members(bits) == model | of(later)[1]


@PROPERTY
@given(st.lists(SPANS, max_size=4), st.lists(SPANS, max_size=4))
def test_removing_bits_is_the_difference_of_sets(spans: list[Run], dropped: list[Run]) -> None:
    bits, model = of(spans)
    other, gone = of(dropped)
    bits.drop(other)
    assert members(bits) == model - gone
    assert members(other) == gone
    assert bool(bits) is bool(model - gone)


@PROPERTY
@given(st.lists(SPANS, max_size=4), SPOTS, st.integers(0, 300), st.data())
def test_adding_to_other_bits_is_the_union(
    spans: list[Run], start: int, length: int, data: st.DataObject
) -> None:
    bits, model = of(spans)
    ones = data.draw(st.sets(st.integers(0, max(0, length - 1)), max_size=9)) if length else set()
    other = bitarray(length, endian="little")
    for one in ones:
        other[one] = 1
    bits.add_to(other, start)
    assert other.tolist() == [n in ones or start + n in model for n in range(length)]
    assert members(bits) == model


# ---- windows ----

#: Bits in a window of one page, as these tests have them.
PANE = 8 * mmap.ALLOCATIONGRANULARITY

#: Places around the borders of windows, and anywhere.
PLACES = st.one_of(
    st.builds(
        lambda pane, by: min(max(0, pane * PANE + by), 5 * PANE),
        st.integers(0, 5),
        st.integers(-9, 9),
    ),
    st.integers(0, 5 * PANE),
)


@contextmanager
def small_windows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits_module, "WINDOW", mmap.ALLOCATIONGRANULARITY)
        patch.setattr(bits_module, "WINDOW_BITS", PANE)
        yield


@PROPERTY
@given(
    st.lists(st.tuples(PLACES, PLACES).map(sorted), max_size=8),
    st.tuples(PLACES, PLACES).map(sorted),
    st.sampled_from([1000, 1024, PANE, 2 * PANE]),
)
def test_bits_are_equal_through_windows_of_any_size(
    ones: list[list[int]], asked: list[int], step: int
) -> None:
    size, (start, stop) = 5 * PANE, asked
    wanted = bitarray(size, endian="little")
    with small_windows(), TemporaryFile(buffering=0) as file:
        file.truncate(mmap.ALLOCATIONGRANULARITY + size // 8)
        bits = MappedBits(file.fileno(), mmap.ALLOCATIONGRANULARITY, size, writable=True)
        for one in ones:
            bits.set(*one)
            wanted[one[0] : one[1]] = 1
        assert list(bits.runs(start, stop)) == list(runs(wanted, 1, start, stop))
        assert bits.count(start, stop) == wanted.count(1, start, stop)
        assert bits.any(start, stop) == wanted[start:stop].any()
        counts = {at: wanted.count(1, at, at + step) for at in range(0, size, step)}
        assert list(bits.counts(0, size, step)) == [one for one in counts.items() if one[1]]
        added = bitarray(stop - start, endian="little")
        bits.add_to(added, start)
        assert added == wanted[start:stop]


def test_at_most_one_window_of_the_bitmap_is_mapped(tmp_path: Path) -> None:
    """A bit in each of 64 windows, of a file whose bits would take a gigabyte."""
    size = 64 * WINDOW_BITS
    with (tmp_path / "sparse").open("wb+", buffering=0) as file:
        file.truncate(size // 8)
        for number in range(64):
            os.pwrite(file.fileno(), b"\1", number * WINDOW)
        bits = MappedBits(file.fileno(), 0, size)
        mapped = [mapped_bytes(file.name) for _ in bits.runs(0, size)]
    assert len(mapped) == 64
    assert set(mapped) == {WINDOW}


def mapped_bytes(path: str) -> int:
    """How much of the file this process has mapped."""
    maps = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    spans = (words[0].split("-") for words in maps if words[-1] == path)
    return sum(int(stop, 16) - int(start, 16) for start, stop in spans)
