"""Images with many runs of data: what the file system lists is what SEEK finds.

A file gets holes, data that is not yet on the disk, and blocks that were allocated and not written.
"""

from __future__ import annotations

import ctypes
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest

from addcow_mp.device import fiemap, holes
from addcow_mp.device.extent import AscendingWalk, Extent, ExtentKind, joined
from addcow_mp.format.bits import merged
from support.availability import missing
from support.command import CLUSTER, KiB, addcow, overlay_bytes, succeed

BLOCK = 4 * KiB
_PUNCH = 0x02 | 0x01


def fallocate(fd: int, mode: int, start: int, length: int) -> None:
    """Allocate or punch a range of a file."""
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    assert call(fd, mode, start, length) == 0


def scatter(fd: int, size: int, rng: random.Random) -> None:
    """Write, allocate, punch and sync at random places of a file of ``size`` bytes."""
    os.ftruncate(fd, size)
    for _ in range(rng.randrange(200)):
        start, length = rng.randrange(size), rng.choice([1, 512, BLOCK, 5000, 64 * KiB])
        length = min(length, size - start)
        action = rng.choice(["write", "write", "write", "allocate", "punch", "sync"])
        if action == "write":
            os.pwrite(fd, b"x" * length, start)
        elif action == "allocate":
            fallocate(fd, 0, start, length)
        elif action == "punch":
            fallocate(fd, _PUNCH, start, length)
        elif rng.random() < 0.1:
            os.fsync(fd)


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", range(5))
def test_list_of_extents_says_what_seek_says(
    tmp_path: Path, rng: random.Random, number: int
) -> None:
    for case in range(20):
        fd = os.open(tmp_path / f"file-{case}", os.O_RDWR | os.O_CREAT)
        if not fiemap.is_reliable(fd):
            missing("temporary files are not on ext4")
        size = rng.randrange(1, 300 * BLOCK)
        scatter(fd, size, rng)
        start = rng.randrange(size)
        stop = rng.randrange(start, size + 9999)
        expected = list(merged(holes._seek_runs(fd, start, stop)))
        assert list(fiemap.data_runs(fd, start, stop, holes._seek_runs)) == expected
        assert list(merged(holes.data_runs(fd, start, stop))) == expected
        os.close(fd)


def test_file_with_more_extents_than_one_list_holds(tmp_path: Path) -> None:
    expected = [(2 * n * BLOCK, (2 * n + 1) * BLOCK) for n in range(fiemap.BATCH + 100)]
    with (tmp_path / "file").open("wb") as file:
        for start, _ in expected:
            os.pwrite(file.fileno(), b"x" * BLOCK, start)
        assert list(holes.data_runs(file.fileno(), 0, 1 << 40)) == expected


def test_map_check_and_convert_of_many_runs(tmp_path: Path) -> None:
    clusters, garbage = list(range(0, 600, 2)), 301
    content = bytearray(b"b" * 400 * CLUSTER + bytes(200 * CLUSTER))
    with (tmp_path / "top.raw").open("wb") as file:
        for number in [*clusters, garbage]:
            os.pwrite(file.fileno(), b"x" * BLOCK, number * CLUSTER)
        file.truncate(len(content))
    for number in clusters:
        content[number * CLUSTER : (number + 1) * CLUSTER] = b"x" * BLOCK + bytes(CLUSTER - BLOCK)
    cow = overlay_bytes(image="top.raw", size=len(content), backing="base.raw", local=clusters)
    (tmp_path / "top.add-cow").write_bytes(cow)
    (tmp_path / "base.raw").write_bytes(b"b" * 400 * CLUSTER)
    mapped = succeed("map", "--output", "json", "top.add-cow", cwd=tmp_path).json
    own = [one["start"] for one in mapped if one["depth"] == 0 and one["data"]]
    assert own == [number * CLUSTER for number in clusters]
    assert sum(one["length"] for one in mapped) == len(content)
    assert addcow("check", "top.add-cow", cwd=tmp_path).status == 3, "one cluster leaks"
    succeed("convert", "-O", "raw", "top.add-cow", "new.raw", cwd=tmp_path)
    assert (tmp_path / "new.raw").read_bytes() == content


def test_walk_for_ascending_ranges_gives_what_single_walks_give(rng: random.Random) -> None:
    cuts = sorted(rng.sample(range(1, 1000), 60))
    edges = [0, *cuts, 1000]
    every = [
        Extent(start, stop, rng.randrange(2), ExtentKind(rng.randrange(3)))
        for start, stop in pairwise(edges)
    ]

    def walk(start: int, stop: int) -> list[Extent]:
        return [
            one._replace(start=max(one.start, start), stop=min(one.stop, stop))
            for one in every
            if one.start < stop and start < one.stop
        ]

    ahead = AscendingWalk(lambda start, stop: iter(walk(start, stop)), 1000)
    bounds = sorted(rng.sample(range(1001), 40))
    for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
        assert list(joined(ahead.extents(start, stop))) == list(joined(walk(start, stop)))
