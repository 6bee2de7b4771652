"""Tests of the copy methods: the bytes, the method in the report, disk space and memory.

Every method moves the right bytes on random chains. Each method has a test of its purpose: clones
share blocks, `-t none` leaves no page in the page cache, holes are not read, zeros become holes.
The file systems are an XFS that clones and an ext4 that does not. Rates are tested with a clock
of the tests: no test waits.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addcow_mp.engine import throttle
from support.chains import can_commit, wild_chain
from support.command import (
    CLUSTER,
    KiB,
    MiB,
    bits,
    draw,
    draw_raw,
    guest_picture,
    local_clusters,
    look,
    overlay_bytes,
    pair,
    ran,
    refused,
    stored_bytes,
    succeed,
    tool,
)
from support.fault_rules import Rules, rule
from support.file_systems import clear
from support.model import Overlay, build, overlay, raw
from support.page_cache import resident, uncache, was_read
from support.processes import Ended, running
from support.promises import KINDS
from support.properties import tried
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

#: A run of this length is cloned where nothing is pinned; shorter ones are copied.
LONG = 512 * KiB // CLUSTER

WAYS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "clone": ("--copy", "clone"),
    "range": ("--copy", "range"),
    "map": ("--copy", "map"),
    "buffer": ("--copy", "buffer"),
    "direct": ("-t", "none"),
}
ALL_WAYS = pytest.mark.parametrize("way", WAYS)
JOBS = ["commit", "flatten", "convert"]


# ---- file systems, and a server that runs commands on them ----


@pytest.fixture(params=["ext4", "xfs"])
def here(request: pytest.FixtureRequest) -> Path:
    place: Path = request.getfixturevalue(request.param)
    return place


def free(place: Path) -> int:
    """Return the bytes that are free on a file system."""
    tool("sync", "-f", ".", cwd=place)  # what is not placed yet is not counted yet
    state = os.statvfs(place)
    return state.f_bfree * state.f_frsize


def place(path: Path, picture: str, cluster: int = CLUSTER) -> None:
    """Draw a raw file whose length is there first.

    XFS keeps more room behind the end of a file that grows than what is written into it.
    """
    with path.open("wb") as file:
        file.truncate(len(picture) * cluster)
        for number, mark in enumerate(picture):
            if mark != "-":
                file.seek(number * cluster)
                file.write((b"\0" if mark == "0" else mark.encode()) * cluster)


def lay(here: Path, base: str, top: str) -> Path:
    """Make base.img and top.add-cow over it, each taking what is in it and no more."""
    path = pair(here, base, top)
    place(here / "base.img", base)
    place(here / "top.raw", top)
    return path


def works(ended: Ended) -> dict[str, Any]:
    """Insist on success; return the report."""
    assert (ended.status, ended.stderr) == (0, ""), ended
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


class Shop:
    """Runs jobs in one directory and tells what the report says they did."""

    def __init__(self, warm: Warm, here: Path) -> None:
        self.warm = warm
        self.here = here

    def report(self, job: str, *options: str, file: str = "top.add-cow") -> dict[str, Any]:
        """Run a job in this process; convert makes new.raw."""
        target = ["-O", "raw", "new.raw"] if job == "convert" else []
        words = [*job.split(), "--jobs", "0", "--output", "json", *options, file, *target]
        return works(self.warm.run(*words, cwd=self.here))

    def moved(self, job: str, *options: str, file: str = "top.add-cow") -> dict[str, int]:
        """Run a job; return the ways that were used and how many bytes went each way."""
        report = self.report(job, *options, file=file)
        ways: dict[str, int] = report["moved-by"]
        assert set(ways) == {"clone", "range", "buffer", "direct", "map"}
        assert sum(ways.values()) == report["bytes-moved"]
        return {way: count for way, count in ways.items() if count}


@pytest.fixture
def shop(warm: Warm, here: Path) -> Shop:
    return Shop(warm, here)


@pytest.fixture
def on_xfs(warm: Warm, xfs: Path) -> Shop:
    return Shop(warm, xfs)


@pytest.fixture
def on_ext4(warm: Warm, ext4: Path) -> Shop:
    return Shop(warm, ext4)


# ---- the bytes ----


def odd_chain() -> Overlay:
    """Long and short runs of the image and of the backing, no border of which fits the other.

    Runs of 5 and 300 small blocks, ends within a block, a partial last cluster, and a
    backing that ends before the overlay does.
    """
    base = "Z" * 301 + "-" * 5 + "Z" * 3 + "0" * 13 + "Z" * 290 + "-" * 40 + "Z" * 31
    top = "A" * 9 + "-" * 3 + "a" * 2 + "A" + "0." + "A" * 17 + "-" * 5 + "aA-A0a"
    return overlay(top, raw(base, cut=1300), cluster_size=64 * KiB, cut=2 * KiB + 700)


def layered_chain() -> Overlay:
    """Small clusters over large ones, whose other parts are copied up."""
    low = raw("Z" * 25 + "-" + "Z" * 20, grain=64 * KiB, cut=5 * KiB)
    middle = overlay("MMM--mM.0" * 5, low, cluster_size=64 * KiB)
    cells = ("A" * 37 + "-" * 20 + "a" * 3 + "0.A" + "-" * 70) * 5
    return overlay(cells, middle, cluster_size=4 * KiB, cut=512)


def some_chains(job: str) -> Iterator[tuple[str, Overlay]]:
    seed = random.randrange(1 << 32)
    yield "odd", odd_chain()
    yield "layered", layered_chain()
    found = wild_chain(random.Random(seed), MiB)
    if can_commit(found) or job != "commit":
        yield f"seed {seed}", found


@pytest.mark.parametrize("job", JOBS)
@ALL_WAYS
def test_every_copy_method_moves_the_right_bytes(shop: Shop, way: str, job: str) -> None:
    blocks = iter(random.sample([(), ("-S", "0"), ("-S", "4k"), ("-S", "1536"), ("-S", "1G")], 3))
    for name, chain in some_chains(job):
        clear(shop.here)
        promise = KINDS[job](build(chain, str(shop.here)))
        promise.copy_options = (*WAYS[way], *next(blocks))
        done = shop.warm.run(*promise.command(0), cwd=shop.here)
        assert done.status == 0, (name, promise.copy_options, done)
        assert promise.broken(done=True) == [], (name, promise.copy_options)


@pytest.mark.long
@ALL_WAYS
def test_workers_with_every_copy_method_move_the_right_bytes(xfs: Path, way: str) -> None:
    """More than one task has to do: 64 MiB are one."""
    count = 36
    data = [os.urandom(4 * KiB) * 512 for _ in range(count)]
    base, image = xfs / "base.img", xfs / "top.raw"
    with base.open("wb") as low, image.open("wb") as high:
        for number, piece in enumerate(data):
            (high if number % 9 else low).seek(number * 2 * MiB)
            (high if number % 9 else low).write(piece)
        low.truncate(count * 2 * MiB)
        high.truncate(count * 2 * MiB)
    local = [n for n in range(count) if n % 9]
    cow = overlay_bytes(
        image="top.raw", size=count * 2 * MiB, backing="base.img", cluster=2 * MiB, local=local
    )
    (xfs / "top.add-cow").write_bytes(cow)
    words = ("commit", "--jobs", "2", "--output", "json", *WAYS[way], "top.add-cow")
    report = succeed(*words, cwd=xfs).json
    assert report["bytes-moved"] == len(local) * 2 * MiB
    with base.open("rb") as file:
        assert all(file.read(2 * MiB) == piece for piece in data)
    assert local_clusters(xfs / "top.add-cow") == []
    assert stored_bytes(image) == 0


@pytest.mark.parametrize("job", ["flatten", "convert"])
def test_clone_does_not_copy_to_the_end_of_the_source(on_xfs: Shop, job: str) -> None:
    """A length of 0 would: parts of a block are copied, whatever is pinned."""
    here = on_xfs.here
    for length in (512, 4 * KiB - 512, CLUSTER + 512):
        clear(here)
        draw_raw(here / "base.img", "ABCD")
        draw(here / "top.add-cow", "--")
        os.truncate(here / "top.raw", length)
        on_xfs.report(job, "--copy", "clone")
        target = here / ("top.raw" if job == "flatten" else "new.raw")
        assert target.read_bytes() == (b"A" * CLUSTER + b"B" * CLUSTER)[:length]
        assert look(here / "base.img") == "ABCD"


# ---- what was really done ----


def two_runs(here: Path) -> int:
    """A run that is just long enough to be cloned, and one that is not: 15 clusters."""
    lay(here, "A" * 20, "X" * LONG + "-" + "Y" * (LONG - 1) + "-" * 4)
    return (2 * LONG - 1) * CLUSTER


def with_a_tail(here: Path) -> int:
    """One run whose end is no whole block."""
    lay(here, "A" * 13, "X" * 13)
    os.truncate(here / "top.raw", 12 * CLUSTER + 5 * KiB + 512)
    return 12 * CLUSTER + 5 * KiB + 512


def test_long_runs_are_cloned_and_short_ones_copied(on_xfs: Shop) -> None:
    two_runs(on_xfs.here)
    assert on_xfs.moved("commit -d") == {
        "clone": LONG * CLUSTER,
        "buffer": (LONG - 1) * CLUSTER,
    }


@pytest.mark.parametrize("way", ["clone", "range", "map", "buffer", "direct"])
def test_pinned_copy_method_is_used_on_xfs(on_xfs: Shop, way: str) -> None:
    total = two_runs(on_xfs.here)
    assert on_xfs.moved("commit -d", *WAYS[way]) == {way: total}


@pytest.mark.parametrize("way", ["range", "map", "buffer", "direct"])
def test_other_copy_methods_work_on_ext4(on_ext4: Shop, way: str) -> None:
    total = two_runs(on_ext4.here)
    assert on_ext4.moved("commit -d", *WAYS[way]) == {way: total}


@pytest.mark.parametrize("job", ["commit", "flatten", "convert"])
@pytest.mark.parametrize("way", ["auto", "clone"])
def test_impossible_clone_is_reported_as_a_copy(on_ext4: Shop, job: str, way: str) -> None:
    lay(on_ext4.here, "A" * 40, "X" * 20 + "-" * 20)
    moved = {"commit": 20, "flatten": 20, "convert": 40}[job] * CLUSTER
    assert on_ext4.moved(job, *WAYS[way]) == {"buffer": moved}
    target = {"commit": "base.img", "flatten": "top.raw", "convert": "new.raw"}[job]
    assert look(on_ext4.here / target) == "X" * 20 + "A" * 20


@pytest.mark.parametrize("way", ["clone", "direct"])
def test_partial_block_is_copied_and_not_cloned(on_xfs: Shop, way: str) -> None:
    total = with_a_tail(on_xfs.here)
    tail = total % (4 * KiB)
    assert on_xfs.moved("commit -d", *WAYS[way]) == {way: total - tail, "buffer": tail}


@pytest.mark.parametrize("way", ["range", "map", "buffer"])
def test_partial_block_uses_the_pinned_copy_method(shop: Shop, way: str) -> None:
    total = with_a_tail(shop.here)
    assert shop.moved("commit -d", *WAYS[way]) == {way: total}


def test_report_of_nothing_moved_names_no_copy_method(shop: Shop) -> None:
    lay(shop.here, "AB--", "----")
    assert shop.moved("commit") == {}
    lay(shop.here, "----", "x---")
    assert shop.moved("flatten") == {}


# ---- across file systems ----


def over_there(near: Path, far: Path) -> None:
    """An overlay here whose backing is on another file system."""
    draw_raw(far / "base.img", "A" * 12 + "-" * 4)
    draw(near / "top.add-cow", "X" * 10 + "-" * 6, str(far / "base.img"))


@pytest.mark.parametrize("job", ["commit", "flatten"])
@pytest.mark.parametrize("away", ["from xfs", "to xfs"])
@ALL_WAYS
def test_data_of_another_file_system_is_copied(
    warm: Warm, xfs: Path, ext4: Path, away: str, job: str, way: str
) -> None:
    near, far = (xfs, ext4) if away == "from xfs" else (ext4, xfs)
    over_there(near, far)
    moved = Shop(warm, near).moved(job, *WAYS[way], "--root", str(far))
    total = (10 if job == "commit" else 2) * CLUSTER
    # Old kernels copy from one file system to another by copy_file_range, new ones do not.
    ways = {"range": {"range", "buffer"}, "direct": {"direct"}, "map": {"map"}}.get(way, {"buffer"})
    assert set(moved) <= ways
    assert sum(moved.values()) == total
    target = far / "base.img" if job == "commit" else near / "top.raw"
    assert look(target) == "X" * 10 + "AA" + "0000"


def test_job_clones_and_copies_by_file_system(warm: Warm, xfs: Path, ext4: Path) -> None:
    """Clones from here, copies from there, in turns, and goes on cloning afterwards."""
    draw_raw(ext4 / "base.img", "A" * 40)
    draw(xfs / "top.add-cow", ("X" * 8 + "-" * 2) * 4, str(ext4 / "base.img"))
    moved = Shop(warm, xfs).moved("convert", "--root", str(ext4))
    assert moved == {"clone": 32 * CLUSTER, "buffer": 8 * CLUSTER}
    assert look(xfs / "new.raw") == ("X" * 8 + "A" * 2) * 4


# ---- shared blocks ----


#: Room for the file system's own records of 16 MiB.
RECORDS = 512 * KiB
SIZE = 256 * CLUSTER


@pytest.mark.parametrize("job", ["commit -d", "flatten", "convert"])
def test_clone_takes_no_space(on_xfs: Shop, job: str) -> None:
    assert room_taken(on_xfs, job, "clone") < RECORDS


@pytest.mark.parametrize("job", ["commit -d", "flatten", "convert"])
def test_copy_takes_its_space(on_xfs: Shop, job: str) -> None:
    assert room_taken(on_xfs, job, "buffer") >= SIZE


def room_taken(shop: Shop, job: str, way: str) -> int:
    """Run a job that moves 16 MiB into a hole; return by how much less is free."""
    local = job.startswith("commit")
    lay(shop.here, ("-" if local else "A") * 256, ("A" if local else "-") * 256)
    before = free(shop.here)
    assert shop.moved(job, *WAYS[way]) == {way: SIZE}
    target = {"commit -d": "base.img", "flatten": "top.raw", "convert": "new.raw"}[job]
    assert stored_bytes(shop.here / target) >= SIZE
    assert look(shop.here / target) == "A" * 256
    return before - free(shop.here)


def test_commit_by_clone_stores_no_data_twice(on_xfs: Shop) -> None:
    lay(on_xfs.here, "-" * 256, "A" * 256)
    before = free(on_xfs.here)
    assert on_xfs.moved("commit") == {"clone": SIZE}
    assert abs(before - free(on_xfs.here)) < RECORDS
    assert stored_bytes(on_xfs.here / "top.raw") == 0
    assert look(on_xfs.here / "base.img") == "A" * 256


def test_cloned_blocks_are_shared_on_the_file_system(on_xfs: Shop) -> None:
    lay(on_xfs.here, "B" * 32, "-" * 8 + "A" * 16 + "-" * 8)
    assert on_xfs.moved("commit -d") == {"clone": 16 * CLUSTER}
    for name, first in (("base.img", 8), ("top.raw", 8)):
        assert shared_blocks(on_xfs.here, name) == range(first * 16, (first + 16) * 16)


def shared_blocks(here: Path, name: str) -> range:
    """Return the one run of shared blocks of 4 KiB that filefrag shows."""
    lines = tool("filefrag", "-s", "-v", "-b4096", name, cwd=here).splitlines()
    shared = [line.split(":")[1].split("..") for line in lines if "shared" in line]
    assert shared, lines
    return range(int(shared[0][0]), int(shared[-1][1]) + 1)


# ---- holes and zeros ----


#: Clusters of a hole, and those in its midst that no reading ahead gets to.
HOLE, MIDST = 768, slice(17 * MiB, 49 * MiB)


def islands(here: Path, job: str) -> Path:
    """Data before and behind a large hole, in the file that the job reads; return that."""
    data, rest = "X" * 16 + "-" * HOLE + "X" * 16, "-" * (HOLE + 32)
    if job == "flatten":
        lay(here, data, rest)
        return here / "base.img"
    lay(here, rest, data)
    local = range(HOLE + 32)
    cow = overlay_bytes(image="top.raw", size=len(rest) * CLUSTER, backing="base.img", local=local)
    (here / "top.add-cow").write_bytes(cow)
    return here / "top.raw"


@pytest.mark.parametrize("job", ["commit -d", "flatten", "convert"])
@pytest.mark.parametrize("way", ["range", "map", "buffer"])
def test_job_never_reads_a_hole(shop: Shop, job: str, way: str) -> None:
    source = islands(shop.here, job)
    uncache(source)
    assert shop.moved(job, *WAYS[way]) == {way: 32 * CLUSTER}
    assert resident(source, MIDST.start, MIDST.stop) == 0
    if way == "buffer":  # which looks at the data
        assert was_read(source, size=32 * CLUSTER)


def test_page_cache_shows_that_a_hole_was_read(here: Path) -> None:
    source = islands(here, "flatten")
    uncache(source)
    assert source.read_bytes().count(0) == HOLE * CLUSTER
    assert was_read(source, size=MIDST.stop - MIDST.start, within=MIDST)


@pytest.mark.parametrize(
    ("job", "options", "clusters"),
    [
        ("convert", (), 4),
        ("convert", ("-S", "4k"), 4),
        ("convert", ("-S", "0"), 9),
        ("commit -d", (), 7),
        ("commit -d", ("-S", "0"), 7),
        ("commit -d", ("-S", "4k"), 4),
        ("flatten", (), 9),
        ("flatten", ("-S", "0"), 9),
        ("flatten", ("-S", "4k"), 7),
    ],
)
def test_zeros_become_holes_with_option_s(
    shop: Shop, job: str, options: tuple[str, ...], clusters: int
) -> None:
    """Three clusters of zeros are the image's, two the backing's; letters are four clusters."""
    lay(shop.here, "AB" + "00" + "------" + "-----", "--" + "--" + "000XY-" + "-----")
    if job == "commit -d":
        place(shop.here / "base.img", "AB" + "-" * 13)
        clusters = clusters if options != ("-S", "4k") else 4
    shop.report(job, *options)
    target = {"commit -d": "base.img", "flatten": "top.raw", "convert": "new.raw"}[job]
    assert look(shop.here / target) == "AB" + "00000XY" + "000000"
    assert stored_bytes(shop.here / target) == clusters * CLUSTER


@pytest.mark.parametrize(
    ("block", "blocks"), [("0", 16), ("512", 13), ("4k", 13), ("8k", 14), ("16k", 16)]
)
def test_zeros_are_detected_in_blocks(shop: Shop, block: str, blocks: int) -> None:
    """Of sixteen blocks of 4 KiB these are zero: 1, and 6 and 7, which make 8 KiB."""
    picture = "A-AAAA--AAAAAAAA"
    place(shop.here / "new", picture.replace("-", "0"), 4 * KiB)
    draw(shop.here / "top.add-cow", "X")
    (shop.here / "new").replace(shop.here / "top.raw")
    place(shop.here / "base.img", "-")
    shop.report("commit -d", "-S", block)
    assert look(shop.here / "base.img", 4 * KiB) == picture.replace("-", "0")
    assert stored_bytes(shop.here / "base.img") == blocks * 4 * KiB


def test_zeros_in_a_long_run_become_holes_on_ext4(on_ext4: Shop) -> None:
    lay(on_ext4.here, "-" * 32, "A" * 8 + "0" * 16 + "B" * 8)
    on_ext4.report("convert")
    assert stored_bytes(on_ext4.here / "new.raw") == 16 * CLUSTER


def test_zeros_in_a_long_run_become_holes_on_xfs_when_copied(on_xfs: Shop) -> None:
    lay(on_xfs.here, "-" * 32, "A" * 8 + "0" * 16 + "B" * 8)
    on_xfs.report("convert", "--copy", "buffer")
    assert stored_bytes(on_xfs.here / "new.raw") == 16 * CLUSTER


def test_zeros_become_holes_with_direct_io(shop: Shop) -> None:
    lay(shop.here, "-" * 8, "AB0000XY")
    shop.report("convert", "-t", "none")
    assert stored_bytes(shop.here / "new.raw") == 4 * CLUSTER


# ---- what files take afterwards ----


@ALL_WAYS
def test_flatten_stores_exactly_the_guests_data(shop: Shop, way: str) -> None:
    """Stale clusters are overwritten, or emptied where there is nothing below."""
    lay(shop.here, "ABCDEFGHIJKL" + "-" * 8, "x-Xy" + "-" * 8 + "xxx-Y" + "xx" + "-" + "zz")
    shop.report("flatten", *WAYS[way])
    assert look(shop.here / "top.raw") == "ABXDEFGHIJKL" + "0000Y" + "00000"
    assert stored_bytes(shop.here / "top.raw") == 13 * CLUSTER


@ALL_WAYS
@pytest.mark.parametrize("keep", [True, False])
def test_commit_stores_exactly_the_guests_data(shop: Shop, way: str, keep: bool) -> None:
    """A allocated hole empties the backing's cluster; garbage and other clusters are nothing."""
    top = lay(shop.here, "ABCDEFGHIJ" + "-" * 8, "XX" + "-" * 8 + "YYYYx" + "---")
    place(shop.here / "top.raw", "X-" + "-" * 8 + "YY-Yx" + "---")
    view = guest_picture(top)
    shop.report("commit -d" if keep else "commit", *WAYS[way])
    assert look(shop.here / "base.img") == view == "X0CDEFGHIJ" + "YY0Y" + "0000"
    assert stored_bytes(shop.here / "base.img") == (9 + 3) * CLUSTER
    assert stored_bytes(shop.here / "top.raw") == (5 if keep else 0) * CLUSTER
    assert bits(top).count("1") == (6 if keep else 0)


@ALL_WAYS
def test_convert_stores_exactly_the_guests_data(shop: Shop, way: str) -> None:
    lay(shop.here, "ABCDEFGHIJKL" + "-" * 8, "-X--" + "-" * 8 + "xxx-Y" + "---")
    shop.report("convert", *WAYS[way])
    assert look(shop.here / "new.raw") == "AXCDEFGHIJKL" + "0000Y" + "000"
    assert stored_bytes(shop.here / "new.raw") == 13 * CLUSTER


@ALL_WAYS
def test_overwritten_clusters_take_no_more_space(shop: Shop, way: str) -> None:
    lay(shop.here, "A" * 30, "X" * 25 + "-" * 5)
    shop.report("commit -d", *WAYS[way])
    assert stored_bytes(shop.here / "base.img") == 30 * CLUSTER


# ---- the page cache ----


def large(here: Path) -> tuple[Path, Path]:
    """Two files of which the page cache knows nothing: eight MiB each, in several runs."""
    lay(here, "A" * 128, "X" * 40 + "-" * 8 + "Y" * 3 + "-" * 37 + "Z" * 40)
    files = here / "base.img", here / "top.raw"
    uncache(*files)
    return files


@pytest.mark.parametrize("job", ["commit -d", "flatten", "convert"])
def test_direct_io_leaves_no_pages_in_the_page_cache(shop: Shop, job: str) -> None:
    files = large(shop.here)
    moved = {"commit -d": 83, "flatten": 45, "convert": 128}[job]
    assert shop.moved(job, "-t", "none") == {"direct": moved * CLUSTER}
    new = [shop.here / "new.raw"] if job == "convert" else []
    # A page for each edge of the five runs, though all of them fall on whole pages.
    assert sum(map(resident, (*files, *new))) <= 10 * mmap.PAGESIZE


@pytest.mark.parametrize("job", ["commit -d", "flatten", "convert"])
def test_buffered_copy_leaves_its_pages_in_the_page_cache(shop: Shop, job: str) -> None:
    files = large(shop.here)
    moved = {"commit -d": 83, "flatten": 45, "convert": 128}[job]
    assert shop.moved(job, "--copy", "buffer") == {"buffer": moved * CLUSTER}
    assert was_read(*files, size=moved * CLUSTER)


def test_direct_io_keeps_cached_pages_of_the_source(shop: Shop) -> None:
    _, image = large(shop.here)
    with image.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        file.read(5 * CLUSTER)
    before = resident(image)
    assert 5 * CLUSTER // 2 < before < 20 * CLUSTER
    shop.report("commit -d", "-t", "none")
    assert before // 2 < resident(image) <= before + 10 * mmap.PAGESIZE


# ---- a limit ----


class Clock:
    """A clock that advances only when a worker sleeps or the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


class Worker:
    """A worker with its pace, and a list of when it had moved how much."""

    def __init__(self, clock: Clock, rate: int) -> None:
        self.clock = clock
        self.pace = throttle.Throttle(rate)
        self.moves: list[tuple[float, int]] = []

    def move(self, length: int, seconds: float = 0.0) -> None:
        """Move a step, which itself takes some time."""
        self.clock.now += seconds
        self.moves.append((self.clock.now, length))
        self.pace.spend(length)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throttle, "time", made)
    return made


def busiest_second(moves: list[tuple[float, int]]) -> int:
    """Return the most bytes that were moved within less than a second."""
    moves = sorted(moves)
    most, first, within = 0, 0, 0
    for moment, length in moves:
        within += length
        while moves[first][0] <= moment - 1:
            within -= moves[first][1]
            first += 1
        most = max(most, within)
    return most


RATES = st.integers(64 * KiB, 4096 * MiB)

#: Pauses before a step: none, those that the step itself may take, and long waits for a task.
PAUSES = st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.03, 0.12, 0.2, 0.9, 5.0])


@given(RATES, st.lists(st.tuples(PAUSES, st.floats(0.001, 1)), min_size=1, max_size=80))
@tried(150)
def test_rate_is_exceeded_by_at_most_an_eighth_and_a_step(
    rate: int, steps: list[tuple[float, float]]
) -> None:
    """What a step took of its time by itself is not waited for again, up to that much."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(throttle, "time", clock)
        worker = Worker(clock, rate)
        for seconds, part in steps:
            worker.move(max(1, int(worker.pace.step * part)), seconds)
        assert busiest_second(worker.moves) <= rate * 9 / 8 + worker.pace.step + 1


def test_busy_worker_reaches_its_full_rate(clock: Clock) -> None:
    worker = Worker(clock, 8 * MiB)
    start = clock.now
    for _ in range(800):
        worker.move(worker.pace.step, 0.05)
    assert worker.pace.step == MiB
    assert 99 < clock.now - start <= 100.1


def test_steps_slower_than_the_rate_are_not_delayed(clock: Clock) -> None:
    worker = Worker(clock, 8 * MiB)
    start = clock.now
    for _ in range(50):
        worker.move(MiB, 0.5)
    assert clock.now - start == pytest.approx(25, abs=0.2)


def test_long_wait_polls_every_second(clock: Clock) -> None:
    looks: list[float] = []
    waiting = throttle.Throttle(1)
    start = clock.now
    waiting.spend(100, lambda: looks.append(clock.now))
    assert clock.now - start == pytest.approx(100, abs=0.2)
    assert max(after - before for before, after in pairwise([start, *looks])) <= 1


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_rate_of_one_byte_limits_and_a_signal_ends_the_wait(tmp_path: Path, jobs: str) -> None:
    """A byte a second: the job would last for days, unless it were not limited at all."""
    pair(tmp_path, "A" * 40, "X" * 40)
    base = tmp_path / "base.img"
    with running("commit", "-r", "1", "--jobs", jobs, "top.add-cow", cwd=tmp_path) as job:
        job.until(lambda: look(base)[0] == "X", "the first bytes")
        job.signal(signal.SIGTERM)
        ended = job.end()
    assert ended.status == 143
    assert "the same command continues from there" in ended.stderr
    assert "A" in look(base)


def test_worker_without_a_limit_never_waits(clock: Clock) -> None:
    worker = Worker(clock, 0)
    for _ in range(100):
        worker.move(64 * MiB)
    assert clock.now == 1000.0


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_several_workers_share_one_limit(workers: int) -> None:
    """Each has its part of the rate, and a clock that shows the same time."""
    rate, moves = 8 * MiB, []
    for number in range(workers):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock()
            patch.setattr(throttle, "time", clock)
            worker = Worker(clock, throttle.share_of(rate, workers))
            for _ in range(40):
                worker.move(worker.pace.step, 0.01 * number)
            moves += worker.moves
            step = worker.pace.step
    assert busiest_second(moves) <= rate + workers * step


@pytest.mark.long
@pytest.mark.parametrize("jobs", ["0", "2"])
@pytest.mark.parametrize("options", [(), ("--copy", "clone"), ("-S", "4k")])
def test_limited_job_moves_the_right_bytes(xfs: Path, jobs: str, options: tuple[str, ...]) -> None:
    lay(xfs, "A" * 20, "X" * 11 + "-" * 5 + "0Y--")
    os.truncate(xfs / "top.raw", 19 * CLUSTER + 1536)
    words = ("commit", "--jobs", jobs, "--limit-rate", "64M", *options, "top.add-cow")
    succeed(*words, cwd=xfs)
    assert look(xfs / "base.img") == "X" * 11 + "A" * 5 + "0YAA"
    assert stored_bytes(xfs / "top.raw") == 0


@pytest.mark.parametrize("options", [("-r", "1G"), ("--limit-rate", "0"), ("-r", "1.5g")])
def test_limit_accepts_size_suffixes(tmp_path: Path, options: tuple[str, ...]) -> None:
    pair(tmp_path, "AB", "-X")
    succeed("commit", *options, "top.add-cow", cwd=tmp_path)
    assert look(tmp_path / "base.img") == "AX"


@pytest.mark.parametrize("job", ["commit", "flatten", "convert"])
@pytest.mark.parametrize(
    "options",
    [
        *[("--limit-rate", word) for word in ("", "x", "-5", "1Z", "5 MB/s", "9E")],
        *[("-S", word) for word in ("", "x", "-1", "511", "4097", "9E")],
        ("--copy", "rsync"),
        ("--copy", ""),
        ("-t", "directsync"),
        ("--idle", "yes", "please"),
    ],
    ids=" ".join,
)
def test_invalid_copy_options_are_usage_errors(
    warm: Warm, tmp_path: Path, job: str, options: tuple[str, ...]
) -> None:
    pair(tmp_path, "AB", "-X")
    target = ["-O", "raw", "new.raw"] if job == "convert" else []
    ended = warm.run(job, *options, "top.add-cow", *target, cwd=tmp_path)
    assert ended.status == 64
    assert ended.stderr.startswith("addcow: ")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "new.raw").exists()
    assert (bits(tmp_path / "top.add-cow"), look(tmp_path / "base.img")) == (".1", "AB")


@pytest.mark.long
def test_usage_error_names_the_option_and_the_value(tmp_path: Path) -> None:
    for option in ("-S", "--limit-rate"):
        said = refused("commit", option, "many", "top.add-cow", cwd=tmp_path, status=64)
        assert option in said
        assert "'many'" in said


# ---- stepping back ----


def priority(here: Path, pid: int) -> str:
    """Return the class of input and output priority of a process."""
    return tool("ionice", "-p", str(pid), cwd=here).split(":")[0].strip()


@pytest.mark.long
@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_idle_option_gives_workers_the_idle_priority(tmp_path: Path, job: str) -> None:
    pair(tmp_path, "ABCD", "-X-Y")
    rules = Rules.write(tmp_path / "rules", rule("image_write", "stop"))
    if job == "commit":
        rules = Rules.write(tmp_path / "rules", rule("image_read", "stop"))
    for options in ((), ("--idle",)):
        words = (job, "--jobs", "1", *options, "top.add-cow")
        with running(*words, cwd=tmp_path, rules=rules) as process:
            stopped = process.stopped()
            assert stopped == process.workers()
            assert (priority(tmp_path, stopped[0]) == "idle") == bool(options)


def test_idle_option_applies_to_a_job_without_workers(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X-Y")
    rules = Rules.write(tmp_path / "rules", rule("image_read", "stop"))
    with running("commit", "--idle", "top.add-cow", cwd=tmp_path, rules=rules) as process:
        assert priority(tmp_path, process.stopped()[0]) == "idle"


@pytest.mark.long
@pytest.mark.parametrize("jobs", ["0", "1", "2"])
def test_idle_job_moves_the_right_bytes(tmp_path: Path, jobs: str) -> None:
    top = pair(tmp_path, "ABCD" * 8, "-X0-" * 8)
    succeed("commit", "--idle", "--jobs", jobs, "top.add-cow", cwd=tmp_path)
    assert look(tmp_path / "base.img") == "AX0D" * 8
    assert local_clusters(top) == []


# ---- the space of what is cloned ----


def fill(place: Path, leave: int) -> None:
    """Take all of the free space but `leave` bytes."""
    with (place / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free(place) - leave)


def half_shared(here: Path, job: str) -> str:
    """Prepare a job that brings two long runs and a short one into holes of its target."""
    marks = (LONG * 4 * "A" + "-") * 2 + "A" + "-" * LONG
    gone = "-" * len(marks)
    below, local = (gone, marks) if job == "commit" else (marks, gone)
    pair(here, below, local)
    return marks.replace("-", "0")


@pytest.mark.long
@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_space_check_does_not_count_cloned_data(xfs: Path, job: str) -> None:
    wanted = half_shared(xfs, job)
    fill(xfs, leave=2 * MiB)
    said = refused(job, "--copy", "buffer", "top.add-cow", cwd=xfs)
    assert f"{(LONG * 8 + 1) * CLUSTER} bytes of free space are needed" in said
    succeed(job, "top.add-cow", cwd=xfs)
    assert look(xfs / ("base.img" if job == "commit" else "top.raw")) == wanted


@pytest.mark.long
def test_space_check_counts_copied_data(xfs: Path) -> None:
    """Each run is one block too short to be cloned."""
    runs = 40
    pair(xfs, (LONG * "-") * runs, ((LONG - 1) * "A" + "-") * runs)
    fill(xfs, leave=2 * MiB)
    said = refused("commit", "-d", "top.add-cow", cwd=xfs)
    assert f"{runs * (LONG - 1) * CLUSTER} bytes of free space are needed" in said


@pytest.mark.long
@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_limited_job_still_clones(xfs: Path, job: str) -> None:
    """Steps of a limited worker are never too short for it: the space is not there."""
    half_shared(xfs, job)
    fill(xfs, leave=2 * MiB)
    words = (job, "-r", "20M", "--jobs", "2", "--output", "json", "top.add-cow")
    assert succeed(*words, cwd=xfs).json["moved-by"]["clone"] == LONG * 8 * CLUSTER


@pytest.mark.long
def test_clones_are_aligned_to_large_file_system_blocks(tmp_path: Path) -> None:
    """An end that is no whole block is copied, and clones nothing away from the rest."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    here = tmp_path / "disk"
    here.mkdir()
    with (tmp_path / "device").open("wb") as device:
        device.truncate(320 * MiB)
    tool("mkfs.xfs", "-q", "-m", "reflink=1", "-b", "size=16k", "device", cwd=tmp_path)
    mount = ["mount", "-o", "loop", str(tmp_path / "device"), str(here)]
    done = ran(mount)
    if done.returncode:
        pytest.skip(f"no file system with blocks of 16 KiB here: {done.stderr.strip()}")
    try:
        size = 8 * MiB + 4 * KiB
        draw_raw(here / "base.img", "A" * (8 * MiB // CLUSTER + 1))
        succeed("create", "-b", "base.img", "-F", "raw", "top.add-cow", str(size), cwd=here)
        moved = succeed("flatten", "--output", "json", "top.add-cow", cwd=here).json["moved-by"]
        assert (moved["clone"], moved["buffer"]) == (8 * MiB, 4 * KiB)
        assert (here / "top.raw").read_bytes() == b"A" * size
    finally:
        subprocess.run(["umount", str(here)], check=True)
