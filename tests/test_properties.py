"""Property tests of random chains against a bytearray: the device, commit, flatten and convert.

Each example is a chain of one to three layers. The package changes its files, and the model's own
parser reads them. Lengths are odd, unallocated clusters hold garbage, and stray bits are set.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import addcow_mp
from addcow_mp import nbd_plugin
from support.model import (
    LONG_AGO,
    SECTOR,
    Content,
    Files,
    KiB,
    Layer,
    MiB,
    Overlay,
    Raw,
    build,
    ceil_div,
    contents,
    file_picture,
    overlay,
    owners,
    picture,
    raw,
    read_bits,
    read_file,
    read_header,
    read_view,
    snapshot,
    span,
    stray_bits,
    touched,
    view,
)
from support.properties import tried

pytestmark = pytest.mark.sample(2)

CLUSTER_SIZES = [4 * KiB, 8 * KiB, 16 * KiB, 2 * MiB, 32 * KiB, 64 * KiB]
# Letters by depth, so that no layer's bytes can pass for those of another.
LETTERS = ("ABc", "PQr", "XYz")


# --- Random chains ------------------------------------------------------------------------


@st.composite
def _contents(draw: st.DrawFn, letters: str, grain: int, lengths: list[int]) -> Content:
    # Lengths are drawn from few, and before the cells: text alone is mostly short.  First and
    # last choices come up most, so they are the ones with something to see.
    length = draw(st.sampled_from(lengths))
    cells = draw(
        st.text(st.sampled_from(letters[0] + "-0" + letters[1:]), min_size=length, max_size=length)
    )
    cut = draw(st.sampled_from([700, 0, 1, SECTOR, 0, grain // 2 + 3, SECTOR - 1]))
    return Content(cells, grain, cut)


def _free(letters: str, cluster_size: int) -> st.SearchStrategy[Content]:
    """Return contents of any length that suits the cluster size."""

    def of(grain: int) -> st.SearchStrategy[Content]:
        most = max(3, min(20, MiB // grain))
        return _contents(letters, grain, [most, 2, 3, 1, most // 2, most - 1])

    return st.sampled_from([cluster_size, cluster_size, 4 * KiB, 64 * KiB, SECTOR]).flatmap(of)


def _beneath(letters: str, like: Content) -> st.SearchStrategy[Content]:
    """Return contents about as long as those of the layer above."""
    count = len(like.cells)
    near = _contents(letters, like.grain, [count - 1, count + 1, count + 3, count // 2])
    same = _contents(letters, like.grain, [count]).map(
        lambda content: replace(content, cut=like.cut)
    )
    return near | same if count else same


@st.composite
def chains(draw: st.DrawFn, depth: int = 0, like: Content | None = None) -> Overlay:
    """Return an overlay over at most two more layers."""
    cluster_size = draw(st.sampled_from(CLUSTER_SIZES))
    content = draw(_layer_contents(depth, like, cluster_size))
    chain = Overlay(
        content,
        cluster_size=cluster_size,
        backing=draw(_backings(depth + 1, content)),
        all_allocated=draw(st.sampled_from([False, True, False, False])),
        stray=draw(st.booleans()),
        image_first=draw(st.booleans()),
        gap=draw(st.sampled_from([0, 1, 100])),
        unknown=draw(st.sampled_from([0, 1 << 1, 1 << 63])),
    )
    return replace(chain, bits=draw(_bits(chain.clusters)))


def _bits(clusters: int) -> st.SearchStrategy[frozenset[int]]:
    flags = st.lists(st.booleans(), min_size=clusters, max_size=clusters)
    return flags.map(lambda local: frozenset(index for index, bit in enumerate(local) if bit))


def _layer_contents(
    depth: int, like: Content | None, cluster_size: int
) -> st.SearchStrategy[Content]:
    free = _free(LETTERS[depth], cluster_size)
    return free if like is None else _beneath(LETTERS[depth], like) | free


@st.composite
def _backings(draw: st.DrawFn, depth: int, like: Content) -> Layer | None:
    kind = draw(st.sampled_from(["raw", "add-cow", "none"] if depth < 2 else ["raw", "none"]))
    if kind == "add-cow":
        return draw(chains(depth, like))
    cluster_size = draw(st.sampled_from(CLUSTER_SIZES))
    return None if kind == "none" else Raw(draw(_layer_contents(depth, like, cluster_size)))


def _too_short(chain: Overlay) -> bool:
    return isinstance(chain.backing, Overlay) and chain.backing.size < chain.size


def committable() -> st.SearchStrategy[Overlay]:
    """Return chains whose overlay can be committed."""
    return chains().filter(lambda chain: chain.backing is not None and not _too_short(chain))


def with_something_local() -> st.SearchStrategy[Overlay]:
    """Return chains of which commit has something to move."""
    return committable().filter(lambda chain: bool(chain.local))


def ranges(chain: Overlay) -> st.SearchStrategy[tuple[int, int]]:
    """Return (start, stop) within the virtual size, often close to the edges of clusters."""
    edges = st.integers(0, chain.clusters).map(lambda cluster: cluster * chain.cluster_size)
    near = st.builds(lambda edge, by: edge + by, edges, st.integers(-2, 2))
    place = (st.integers(0, chain.size) | near).map(lambda at: max(0, min(at, chain.size)))
    return st.tuples(place, place).map(lambda pair: (min(pair), max(pair)))


@contextmanager
def files_of(chain: Layer, factory: pytest.TempPathFactory) -> Iterator[Files]:
    """Build the chain for one example and take its files away after it."""
    with tempfile.TemporaryDirectory(dir=factory.getbasetemp()) as directory:
        yield build(chain, directory)


# --- The device ---------------------------------------------------------------------------


@tried(80)
@given(chain=chains(), data=st.data())
def test_device_reads_what_the_model_holds(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay, data: st.DataObject
) -> None:
    guest = view(chain)
    with files_of(chain, tmp_path_factory) as files:
        before = snapshot(files.everything)
        with addcow_mp.open(files.path) as device:
            assert (device.size, device.cluster_size) == (chain.size, chain.cluster_size)
            assert device.read(0, chain.size) == guest
            for start, stop in data.draw(st.lists(ranges(chain), max_size=5)):
                assert device.read(start, stop - start) == guest[start:stop]
        assert snapshot(files.everything) == before


@tried(20)
@given(chain=chains())
def test_device_refuses_bytes_outside_the_virtual_size(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay
) -> None:
    outside = [(chain.size, 1), (-1, 1), (0, chain.size + 1), (chain.size + 2**64, 1)]
    with files_of(chain, tmp_path_factory) as files:
        before = contents(files.everything)
        with addcow_mp.open(files.path, writable=True) as device:
            for start, length in outside:
                with pytest.raises(addcow_mp.RangeError):
                    device.read(start, length)
                with pytest.raises(addcow_mp.RangeError):
                    device.write(start, b"x" * length)
                with pytest.raises(addcow_mp.RangeError):
                    device.write_zeroes(start, length)
        assert contents(files.everything) == before


@dataclass(frozen=True)
class Step:
    """One thing a guest, or the one who opened the device, does."""

    verb: str
    start: int
    stop: int
    fill: int

    @property
    def payload(self) -> bytes:
        """The bytes that must be there afterwards."""
        size = self.stop - self.start
        return bytes(size) if self.verb == "zeroes" else random.Random(self.fill).randbytes(size)


@st.composite
def steps(draw: st.DrawFn, chain: Overlay) -> Step:
    start, stop = draw(ranges(chain))
    verb = draw(st.sampled_from(["write", "write", "write", "zeroes", "flush", "reopen"]))
    return Step(verb, start, stop, draw(st.integers(0, 255)))


def run(path: str, todo: list[Step], guest: bytearray) -> set[int]:
    """Do the steps and return the clusters that were allocated at the end, by the device's word."""
    device = addcow_mp.open(path, writable=True)
    try:
        for step in todo:
            if step.verb == "reopen":
                device.close()
                device = addcow_mp.open(path, writable=True)
            elif step.verb == "flush":
                device.flush()
            elif step.verb == "zeroes":
                device.write_zeroes(step.start, step.stop - step.start)
            else:
                device.write(step.start, step.payload)
            note(step, guest, path)
            assert device.read(0, device.size) == guest
        local = flat(device.allocated_runs())
        top = sum(each.length for each in device.extents() if each.present and each.depth == 0)
        spans = (span(cluster, device.cluster_size, device.size) for cluster in local)
        assert top == sum(stop - start for start, stop in spans)
        return local
    finally:
        device.close()


def note(step: Step, guest: bytearray, path: str) -> None:
    """Do the step in the model; what was flushed must be in the files."""
    if step.verb in {"write", "zeroes"}:
        guest[step.start : step.stop] = step.payload
    else:
        assert read_view(path) == guest


def flat(runs: Iterable[tuple[int, int]]) -> set[int]:
    """Return the clusters of (first, stop) runs."""
    return {cluster for first, stop in runs for cluster in range(first, stop)}


@tried(100)
@given(chain=chains(), data=st.data())
def test_writes_equal_the_model_and_reach_the_files(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay, data: st.DataObject
) -> None:
    todo = data.draw(st.lists(steps(chain), max_size=10))
    guest = view(chain)
    with files_of(chain, tmp_path_factory) as files:
        below, tail = snapshot(files.below), read_file(files.image)[chain.size :]
        header = read_header(files.path)
        local = run(files.path, todo, guest)
        assert read_view(files.path) == guest
        assert read_file(files.image)[chain.size :] == tail
        assert read_header(files.path) == header
        assert snapshot(files.below) == below
        check_bits_after_writes(chain, files, todo, local)


def check_bits_after_writes(
    chain: Overlay, files: Files, todo: list[Step], local: set[int]
) -> None:
    """A write makes its clusters local; zeroes may; nothing else does."""
    written = [step for step in todo if step.verb in {"write", "zeroes"}]
    must = [step for step in written if step.verb == "write"]
    if chain.all_allocated:
        assert read_bits(files.path) == chain.bits
        assert local == chain.local
    else:
        assert read_bits(files.path) == local
        assert chain.bits | clusters_of(must, chain) <= local
        assert local <= chain.bits | clusters_of(written, chain)


def clusters_of(written: list[Step], chain: Overlay) -> set[int]:
    """Return the clusters in which a step changed a byte."""
    return set().union(*(touched(step.start, step.stop, chain.cluster_size) for step in written))


# --- Several threads, as those of a server ------------------------------------------------

#: Threads of a server, each with a part of the disk of its own; their parts meet within clusters.
THREADS = 3


@st.composite
def requests(draw: st.DrawFn, chain: Overlay, first: int, last: int) -> Step:
    """Return one request of a client that uses the bytes [first, last) alone."""
    start, stop = draw(ranges(chain))
    start, stop = (max(first, min(at, last)) for at in (start, stop))
    short = draw(st.sampled_from([SECTOR, 4 * KiB, 3, chain.size]))
    verb = draw(st.sampled_from(["write", "read", "zero", "write", "trim", "flush"]))
    return Step(verb, start, min(stop, start + short), draw(st.integers(0, 255)))


def serve(disk: addcow_mp.Overlay, todo: list[Step], guest: bytearray) -> None:
    """Do what a client asks for, by the functions that nbdkit calls, and look at its bytes."""
    for step in todo:
        count = step.stop - step.start
        if step.verb == "write":
            nbd_plugin.pwrite(disk, bytearray(step.payload), step.start, 0)
            guest[step.start : step.stop] = step.payload
        elif step.verb == "zero":
            nbd_plugin.zero(disk, count, step.start, 0)
            guest[step.start : step.stop] = bytes(count)
        elif step.verb == "trim":
            nbd_plugin.trim(disk, count, step.start, 0)
            start, stop = whole_clusters(disk, step)
            guest[start:stop] = bytes(stop - start)
        elif step.verb == "flush":
            nbd_plugin.flush(disk, 0)
        read = bytearray(count)
        nbd_plugin.pread(disk, read, step.start, 0)
        assert read == guest[step.start : step.stop]


def whole_clusters(disk: addcow_mp.Overlay, step: Step) -> tuple[int, int]:
    """Return the bytes of the clusters that a request covers to their end."""
    clusters = [
        (start, min(start + disk.cluster_size, disk.size))
        for start in range(0, disk.size, disk.cluster_size)
    ]
    covered = [one for one in clusters if step.start <= one[0] and one[1] <= step.stop]
    return (covered[0][0], covered[-1][1]) if covered else (0, 0)


@tried(60)
@given(chain=chains().filter(lambda chain: chain.size > 0), data=st.data())
def test_threads_of_a_server_see_and_leave_what_the_model_holds(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.integers(0, chain.size)) for _ in range(THREADS - 1))
    parts = list(pairwise([0, *cuts, chain.size]))
    todo = [data.draw(st.lists(requests(chain, *part), max_size=12)) for part in parts]
    guests = [view(chain) for _ in parts]
    with files_of(chain, tmp_path_factory) as files:
        below = snapshot(files.below)
        with addcow_mp.open(files.path, writable=True) as disk, ThreadPoolExecutor(THREADS) as pool:
            for done in [
                pool.submit(serve, disk, *each) for each in zip(todo, guests, strict=True)
            ]:
                done.result()
            guest = b"".join(
                own[start:stop] for own, (start, stop) in zip(guests, parts, strict=True)
            )
            assert disk.read(0, disk.size) == guest
        assert read_view(files.path) == guest
        assert snapshot(files.below) == below


@tried(60)
@given(chain=chains(), data=st.data())
def test_extents_cover_the_range_and_are_true(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay, data: st.DataObject
) -> None:
    start, stop = data.draw(ranges(chain))
    with files_of(chain, tmp_path_factory) as files, addcow_mp.open(files.path) as device:
        check_extents(list(device.extents()), 0, chain.size, chain)
        check_extents(list(device.extents(start, stop)), start, stop, chain)
        assert flat(device.allocated_runs()) == chain.local


def check_extents(extents: list[addcow_mp.Extent], start: int, stop: int, chain: Overlay) -> None:
    """The extents lie side by side from start to stop, and no two adjacent ones are equal."""
    guest, held = view(chain), owners(chain)
    kinds = [(each.depth, each.present, each.zero, each.data) for each in extents]
    assert all(one != other for one, other in pairwise(kinds))
    at = start
    for extent in extents:
        assert extent.start == at
        assert extent.length > 0
        at += extent.length
        check_extent(extent, guest, held)
    assert at == stop


def check_extent(extent: addcow_mp.Extent, guest: bytearray, held: list[int | None]) -> None:
    """What the extent says of its bytes is so."""
    stop = extent.start + extent.length
    reads_zero = not any(guest[extent.start : stop])
    holders = set(held[extent.start // SECTOR : ceil_div(stop, SECTOR)])
    assert holders == ({extent.depth} if extent.present else {None})
    assert reads_zero or (extent.data and not extent.zero)
    assert extent.present or (extent.zero and not extent.data)


# --- The jobs: what each may and must change ----------------------------------------------

# A check runs one job on the files of a chain, twice, and looks at everything afterwards.
Check = Callable[[Overlay, Files, int], None]


def check_commit(chain: Overlay, files: Files, jobs: int) -> None:
    """The backing took the data, the overlay is empty, the guest saw nothing."""
    before, names = contents(files.everything), listing(files)
    addcow_mp.commit(files.path, jobs=jobs)
    assert listing(files) == names
    check_backing_took_it(chain, files, before)
    check_overlay_is_empty(chain, files, before)
    assert read_view(files.path) == view(chain)
    once = contents(files.everything)
    addcow_mp.commit(files.path, jobs=jobs)
    assert contents(files.everything) == once


def check_commit_keep(chain: Overlay, files: Files, jobs: int) -> None:
    """The backing took the data, the overlay's two files were not even written to."""
    before, own = contents(files.everything), snapshot(files.own)
    addcow_mp.commit(files.path, keep=True, jobs=jobs)
    check_backing_took_it(chain, files, before)
    assert read_view(files.path) == view(chain)
    once = contents(files.everything)
    addcow_mp.commit(files.path, keep=True, jobs=jobs)
    assert contents(files.everything) == once
    assert snapshot(files.own) == own


def check_flatten(chain: Overlay, files: Files, jobs: int) -> None:
    """The image alone holds the guest's view, all is marked local, the backing was only read."""
    before, below, names = contents(files.own), snapshot(files.below), listing(files)
    addcow_mp.flatten(files.path, jobs=jobs)
    assert listing(files) == names
    assert read_file(files.image) == bytes(view(chain)) + before[files.image][chain.size :]
    check_all_local(chain, files, before[files.path])
    assert read_view(files.path) == view(chain)
    once = contents(files.own)
    addcow_mp.flatten(files.path, jobs=jobs)
    assert contents(files.own) == once
    assert snapshot(files.below) == below


def check_discard(chain: Overlay, files: Files, jobs: int) -> None:
    """The raw file is all that is left of the overlay, and it is the guest's view and no more."""
    names, below = listing(files), snapshot(files.below)
    addcow_mp.flatten(files.path, discard=True, jobs=jobs)
    assert read_file(files.image) == view(chain)
    assert listing(files) == names - {os.path.basename(files.path)}
    assert snapshot(files.below) == below


def check_convert(chain: Layer, files: Files, jobs: int) -> None:
    """The new file is the guest's view and no more; a second one is refused; none was touched."""
    before, names = snapshot(files.everything), listing(files)
    new = os.path.join(os.path.dirname(files.path), "new")
    source_format = "raw" if isinstance(chain, Raw) else "add-cow"
    addcow_mp.convert(files.path, new, source_format=source_format, jobs=jobs)
    made = snapshot([new])
    assert made[new][0] == view(chain)
    with pytest.raises(addcow_mp.AddcowError, match="new"):
        addcow_mp.convert(files.path, new, source_format=source_format, jobs=jobs)
    assert snapshot([new]) == made
    assert listing(files) == names | {"new"}
    assert snapshot(files.everything) == before


def listing(files: Files) -> set[str]:
    """Return the names in the directory of the chain: no job leaves more behind than it says."""
    return set(os.listdir(os.path.dirname(files.path)))


def check_backing_took_it(chain: Overlay, files: Files, before: dict[str, bytes]) -> None:
    """The backing shows the guest's view, and is what it was in every other byte."""
    assert files.backing is not None
    if isinstance(chain.backing, Overlay):
        check_add_cow_backing(chain, chain.backing, files.backing, before)
    elif chain.backing is not None:
        old = before[files.backing.path]
        rest = old[chain.size :] if chain.backing.size >= chain.size else b""
        # With nothing to commit there is no need to grow.
        allowed = [bytes(view(chain)) + rest] + ([] if chain.local else [old])
        assert read_file(files.backing.path) in allowed


def check_add_cow_backing(
    chain: Overlay, backing: Overlay, files: Files, before: dict[str, bytes]
) -> None:
    """What was committed came into the layer below; nothing else in it moved."""
    spans = [span(cluster, chain.cluster_size, chain.size) for cluster in chain.local]
    into: set[int] = set().union(*(touched(*one, backing.cluster_size) for one in spans))
    assert read_view(files.path) == view(chain) + view(backing)[chain.size :]
    check_other_clusters(backing, into, before[files.image], read_file(files.image))
    assert same_but_for_bits(before[files.path], read_file(files.path))
    assert read_header(files.path).all_allocated == backing.all_allocated
    may_come = set() if backing.all_allocated else into
    assert backing.bits <= read_bits(files.path) <= backing.bits | may_come
    for path in files.below:
        assert snapshot([path]) == {path: (before[path], LONG_AGO * 10**9)}


def check_other_clusters(layer: Overlay, changed: set[int], old: bytes, new: bytes) -> None:
    """The image file differs nowhere but in the changed clusters."""
    assert new[layer.size :] == old[layer.size :]
    for cluster in set(range(layer.clusters)) - changed:
        start, stop = span(cluster, layer.cluster_size, layer.size)
        assert new[start:stop] == old[start:stop]


def check_overlay_is_empty(chain: Overlay, files: Files, before: dict[str, bytes]) -> None:
    """No cluster is allocated; the image keeps its length, but no data within the virtual size."""
    assert read_file(files.image) == bytes(chain.size) + before[files.image][chain.size :]
    assert same_but_for_bits(before[files.path], read_file(files.path))
    assert not read_bits(files.path)
    if chain.local:  # else there was nothing to publish
        assert not stray_bits(files.path)
        assert not read_header(files.path).all_allocated


def check_all_local(chain: Overlay, files: Files, before: bytes) -> None:
    """The flag is set and so are the bits, unless the flag already made them meaningless."""
    every = frozenset(range(chain.clusters))
    assert read_header(files.path).all_allocated
    assert same_but_for_bits(before, read_file(files.path))
    assert read_bits(files.path) in ([every, chain.bits] if chain.all_allocated else [every])
    if chain.local != every:
        assert not stray_bits(files.path)


def same_but_for_bits(old: bytes, new: bytes) -> bool:
    """Tell whether two add-cow files differ in nothing but ALL_ALLOCATED and the bitmap."""
    header_size = int.from_bytes(old[40:44], "little")
    flag = bytes([old[32] & ~1]), bytes([new[32] & ~1])
    fixed = old[:32] + old[33:header_size], new[:32] + new[33:header_size]
    return flag[0] == flag[1] and fixed[0] == fixed[1] and len(old) == len(new)


# --- The jobs on random chains ------------------------------------------------------------


@tried(100)
@given(chain=with_something_local())
def test_commit_moves_the_data_and_keeps_the_guests_view(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay
) -> None:
    with files_of(chain, tmp_path_factory) as files:
        check_commit(chain, files, 0)


@pytest.mark.long
@tried(20)
@given(chain=committable())
def test_commit_of_nothing_is_harmless(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay
) -> None:
    chain = replace(chain, bits=frozenset(), all_allocated=False)
    with files_of(chain, tmp_path_factory) as files:
        check_commit(chain, files, 0)


@tried(50)
@given(chain=with_something_local())
def test_commit_can_keep_the_overlay(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay
) -> None:
    with files_of(chain, tmp_path_factory) as files:
        check_commit_keep(chain, files, 0)


@tried(100)
@given(chain=chains())
def test_flatten_makes_the_image_stand_alone(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay
) -> None:
    with files_of(chain, tmp_path_factory) as files:
        check_flatten(chain, files, 0)


@tried(30)
@given(chain=chains())
def test_flatten_can_discard_the_overlay(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay
) -> None:
    with files_of(chain, tmp_path_factory) as files:
        check_discard(chain, files, 0)


@tried(60)
@given(chain=chains() | _free("AB", 4 * KiB).map(Raw))
def test_convert_writes_the_guests_view(
    tmp_path_factory: pytest.TempPathFactory, chain: Layer
) -> None:
    with files_of(chain, tmp_path_factory) as files:
        check_convert(chain, files, 0)


@tried(30)
@given(chain=chains().filter(lambda chain: bool(chain.local) and _too_short(chain)))
def test_commit_into_a_shorter_add_cow_backing_is_refused(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay
) -> None:
    check_commit_is_refused(chain, tmp_path_factory)


@tried(15)
@given(chain=chains().filter(lambda chain: chain.backing is None))
def test_commit_without_a_backing_is_refused(
    tmp_path_factory: pytest.TempPathFactory, chain: Overlay
) -> None:
    check_commit_is_refused(chain, tmp_path_factory)


def check_commit_is_refused(chain: Overlay, factory: pytest.TempPathFactory) -> None:
    """Either way of committing says no and has written nothing."""
    with files_of(chain, factory) as files:
        before = snapshot(files.everything)
        for keep in (False, True):
            with pytest.raises(addcow_mp.AddcowError, match="top"):
                addcow_mp.commit(files.path, keep=keep, jobs=0)
        assert snapshot(files.everything) == before


CHECKS: list[Check] = [
    check_commit,
    check_commit_keep,
    check_flatten,
    check_discard,
    check_convert,
]


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("check", CHECKS)
@tried(3)
@given(chain=with_something_local())
def test_workers_have_the_same_result(
    tmp_path_factory: pytest.TempPathFactory, check: Check, jobs: int, chain: Overlay
) -> None:
    with files_of(chain, tmp_path_factory) as files:
        check(chain, files, jobs)


@pytest.mark.long
@pytest.mark.parametrize("seed", [20130])
@pytest.mark.parametrize("jobs", [0, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_many_small_clusters_over_large_ones(
    tmp_path_factory: pytest.TempPathFactory, check: Check, jobs: int, seed: int
) -> None:
    chain = checkered(random.Random(seed))
    with files_of(chain, tmp_path_factory) as files:
        check(chain, files, jobs)


def checkered(rng: random.Random) -> Overlay:
    """Return a chain of 12 MiB that changes from cluster to cluster in every layer."""
    base = Content("".join(rng.choices("-0XYZ", k=12 * 16)), 64 * KiB, cut=4567)
    middle = Content("".join(rng.choices("-0PQr", k=12 * 2)), 512 * KiB, cut=1)
    top = Content("".join(rng.choices("-0ABc", k=12 * 256)), 4 * KiB, cut=4 * KiB - 777)
    below = Overlay(middle, frozenset(rng.sample(range(6), 3)), Raw(base), 2 * MiB)
    return Overlay(top, frozenset(rng.sample(range(12 * 256), 1300)), below)


# --- Much to do for several workers ---------------------------------------------------------

CELL = 64 * KiB
IN_ONE = 2 * MiB // CELL  # cells in a cluster of the middle layer


@dataclass(frozen=True)
class Wide:
    """A chain of 320 MiB, mostly holes, so that there is work for four workers at a time."""

    chain: Overlay
    middle: Overlay
    merged: str  # what the guest sees


def wide(rng: random.Random, mostly: str) -> Wide:
    """Return small clusters over 2 MiB ones over a raw file; most of the top is as said."""
    count = 320 * MiB // CELL
    base = "".join(rng.choices("-X", [5, 1], k=count))
    middle = "".join(rng.choices("-Pr", [8, 1, 1], k=count))
    top = "".join(rng.choices(mostly + ".-AB0c", [40, 3, 3, 4, 4, 1, 4], k=count))
    held = frozenset(rng.sample(range(count // IN_ONE), count // IN_ONE // 3))
    below = Overlay(Content(middle, CELL), held, raw(base, CELL), 2 * MiB)
    chain = overlay(top, below, cluster_size=CELL)
    under = [middle[at] if at // IN_ONE in held else base[at] for at in range(count)]
    merged = "".join(top[at] if at in chain.bits else under[at] for at in range(count))
    return Wide(chain, below, merged.replace("-", "0").replace(".", "0"))


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_workers_side_by_side_commit(tmp_path: Path, seed: int) -> None:
    """Two workers must not meet in one of the backing's clusters: both would copy it up."""
    it = wide(random.Random(seed), ".")
    files = files_in(tmp_path, it.chain)
    middle, base = files.below[0], files.below[-1]
    addcow_mp.commit(files.path, jobs=4)
    pictures = file_picture(files.below[1], CELL), file_picture(base, CELL)
    bits = read_bits(middle)
    got = (pictures[0 if at // IN_ONE in bits else 1][at] for at in range(len(it.merged)))
    assert "".join(got) == it.merged
    assert bits <= it.middle.bits | {cluster // IN_ONE for cluster in it.chain.bits}
    assert not read_bits(files.path)
    assert set(file_picture(files.image, CELL)) == {"0"}


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_workers_side_by_side_flatten(tmp_path: Path, seed: int) -> None:
    it = wide(random.Random(seed), "-")
    files = files_in(tmp_path, it.chain)
    addcow_mp.flatten(files.path, jobs=4)
    assert file_picture(files.image, CELL) == it.merged
    assert read_bits(files.path) == frozenset(range(it.chain.clusters))


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_workers_side_by_side_convert(tmp_path: Path, seed: int) -> None:
    it = wide(random.Random(seed), "-")
    files = files_in(tmp_path, it.chain)
    addcow_mp.convert(files.path, f"{tmp_path}/new", jobs=4)
    assert file_picture(f"{tmp_path}/new", CELL) == it.merged


# --- Pictures: the same rules, readable -----------------------------------------------------


def files_in(directory: Path, chain: Overlay) -> Files:
    return build(chain, str(directory))


BASE = raw("UVWXYZ")


def test_device_reads_a_chain_layer_by_layer(tmp_path: Path) -> None:
    files = files_in(tmp_path, overlay("A----", overlay("-Fg-", raw("XYZWV"))))
    with addcow_mp.open(files.path) as device:
        assert picture(device.read(0, device.size)) == "AFZW0"
        found = [(each.depth, each.present, each.length) for each in device.extents()]
    whole = 4 * KiB
    assert found[:3] == [(0, True, whole), (1, True, whole), (2, True, 2 * whole)]
    assert [present for _, present, _ in found[3:]] == [False]


def test_write_copies_up_the_rest_of_its_cluster(tmp_path: Path) -> None:
    files = files_in(tmp_path, overlay("--bb", raw("XYZ"), cluster_size=8 * KiB))
    cell = 8 * KiB
    with addcow_mp.open(files.path, writable=True) as device:
        device.write(cell - 1, b"!!")
        device.write(3 * cell + 5, b"!")
    image = read_file(files.image)
    expected = bytearray(raw("XYZ").content.data.ljust(4 * cell, b"\0"))
    expected[cell - 1 : cell + 1], expected[3 * cell + 5] = b"!!", ord("!")
    assert image[: 2 * cell] == expected[: 2 * cell]
    assert image[3 * cell :] == expected[3 * cell :]
    assert read_bits(files.path) == {0, 1, 3}


def test_all_allocated_hides_the_bitmap_and_the_backing(tmp_path: Path) -> None:
    files = files_in(tmp_path, overlay("ab-", BASE, all_allocated=True))
    with addcow_mp.open(files.path, writable=True) as device:
        assert picture(device.read(0, device.size)) == "ab0"
        device.write(0, b"!")
        assert {(each.depth, each.present) for each in device.extents()} == {(0, True)}
    assert read_bits(files.path) == frozenset()


def test_extents_separate_holes_from_data(tmp_path: Path) -> None:
    cluster = 64 * KiB
    files = files_in(tmp_path, overlay("A.-", raw("WXY-"), cluster_size=cluster))
    with open(files.image, "rb") as image:
        if os.lseek(image.fileno(), cluster, os.SEEK_HOLE) != cluster:
            pytest.skip("this file system does not report holes")
    with addcow_mp.open(files.path) as device:
        first, second = list(device.extents())[:2]
    assert (first.start, first.length, first.zero, first.data) == (0, cluster, False, True)
    assert (second.start, second.zero, second.data, second.present) == (cluster, True, False, True)
