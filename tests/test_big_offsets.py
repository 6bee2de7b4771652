"""Tests with images of 3 TiB: data past 2 TiB arrives at its offset, and costs little.

The files are sparse. Where the file system refuses files of this length, the tests are skipped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import addcow_mp
from support.command import ran
from support.model import Files, KiB, MiB, disk_usage, pack_header, read_header

GiB = 1024 * MiB
TiB = 1024 * GiB
SIZE = 3 * TiB
# Reading 3 TiB, holes or not, takes minutes; what follows the data is done in a second or two.
QUICK = 30.0
SIZES = [64 * KiB, 4 * KiB]


def sparse(path: Path, size: int, data: dict[int, bytes] | None = None) -> None:
    """Make a sparse file with a little data in it."""
    with path.open("wb") as file:
        try:
            file.truncate(size)
        except OSError as error:
            pytest.skip(f"the file system refuses a file of {size} bytes: {error.strerror}")
        for offset, piece in (data or {}).items():
            file.seek(offset)
            file.write(piece)


def big(
    directory: Path,
    cluster_size: int,
    *,
    backing: dict[int, bytes] | None = None,
    backing_size: int = SIZE,
    garbage: dict[int, bytes] | None = None,
) -> Files:
    """Build an overlay of 3 TiB without allocated clusters over a raw file."""
    base, image, path = (directory / name for name in ("base.raw", "top.raw", "top.add-cow"))
    sparse(base, backing_size, backing)
    sparse(image, SIZE, garbage)
    header = pack_header("top.raw", "base.raw", "raw", cluster_size=cluster_size)
    bitmap_bytes = SIZE // cluster_size // 8
    sparse(path, len(header) + bitmap_bytes, {0: header})
    return Files(str(path), str(image), Files(str(base), str(base)))


def bits_set(path: str) -> Iterator[int]:
    """Yield the bits that are set, looking only where the file holds data."""
    bitmap = start = read_header(path).header_size
    with open(path, "rb") as file:
        fd = file.fileno()
        while True:
            try:
                start = os.lseek(fd, start, os.SEEK_DATA)
            except OSError:  # ENXIO: no data behind start
                return
            stop = os.lseek(fd, start, os.SEEK_HOLE)
            yield from _bits_of(os.pread(fd, stop - start, start), (start - bitmap) * 8)
            start = stop


def _bits_of(block: bytes, first: int) -> Iterator[int]:
    for at, byte in enumerate(block):
        if byte:
            yield from (first + at * 8 + bit for bit in range(8) if byte >> bit & 1)


def bitmap_byte(path: str, index: int) -> int:
    """Return one byte of the bitmap."""
    with open(path, "rb") as file:
        return os.pread(file.fileno(), 1, read_header(path).header_size + index)[0]


def pread(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), length, offset)


def clusters_at(cluster_size: int, *offsets: int) -> list[int]:
    return sorted({offset // cluster_size for offset in offsets})


# --- The device -----------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", SIZES)
def test_write_past_2_tib_sets_only_its_own_bit(tmp_path: Path, cluster_size: int) -> None:
    cluster = (2 * TiB + 5 * GiB) // cluster_size + 3
    start = cluster * cluster_size
    files = big(tmp_path, cluster_size, backing={start: b"under"})
    with addcow_mp.open(files.path, writable=True) as device:
        assert device.size == SIZE
        device.write(start + 2, b"OVER")
        assert device.read(start, 8) == b"unOVER\0\0"
    assert bitmap_byte(files.path, cluster // 8) == 1 << cluster % 8
    assert list(bits_set(files.path)) == [cluster]
    assert pread(files.image, start, 8) == b"unOVER\0\0"
    with addcow_mp.open(files.path) as device:
        assert device.read(start - 2, 10) == b"\0\0unOVER\0\0"
        assert list(device.allocated_runs()) == [(cluster, cluster + 1)]
    assert disk_usage(files.image, files.path) < MiB


@pytest.mark.parametrize("cluster_size", SIZES)
def test_last_bytes_of_a_3_tib_image_are_written_and_read(
    tmp_path: Path, cluster_size: int
) -> None:
    files = big(tmp_path, cluster_size)
    with addcow_mp.open(files.path, writable=True) as device:
        device.write(SIZE - 3, b"end")
        assert device.read(SIZE - 5, 5) == b"\0\0end"
        with pytest.raises(addcow_mp.RangeError):
            device.write(SIZE - 3, b"over")
    assert list(bits_set(files.path)) == [SIZE // cluster_size - 1]
    assert os.path.getsize(files.image) == SIZE


@pytest.mark.parametrize("cluster_size", SIZES)
def test_offsets_with_equal_low_bits_do_not_collide(tmp_path: Path, cluster_size: int) -> None:
    apart = [5 * cluster_size, 4 * GiB, TiB + 4 * GiB, 2 * TiB]
    files = big(tmp_path, cluster_size)
    with addcow_mp.open(files.path, writable=True) as device:
        for offset in apart:
            device.write(offset - 1, offset.to_bytes(8, "little"))
        for offset in apart:
            assert device.read(offset - 1, 8) == offset.to_bytes(8, "little")
    edges = [edge for offset in apart for edge in (offset - 1, offset)]
    assert sorted(bits_set(files.path)) == clusters_at(cluster_size, *edges)


@pytest.mark.parametrize("cluster_size", SIZES)
def test_map_shows_a_cluster_past_2_tib(tmp_path: Path, cluster_size: int) -> None:
    start = 2 * TiB + 7 * cluster_size
    files = big(tmp_path, cluster_size)
    with addcow_mp.open(files.path, writable=True) as device:
        device.write(start, b"x" * cluster_size)
        found = [(each.start, each.length) for each in device.extents() if each.depth == 0]
    assert found == [(start, cluster_size)]
    command = [sys.executable, "-m", "addcow_mp", "map", "--output", "json", files.path]
    done = ran(command)
    assert (done.returncode, done.stderr) == (0, "")
    extents = json.loads(done.stdout)
    assert [each["start"] for each in extents if each["depth"] == 0] == [start]
    assert sum(each["length"] for each in extents) == SIZE


# --- The jobs -------------------------------------------------------------------------------


def places(cluster_size: int) -> dict[int, bytes]:
    """Three clusters of data: near the start, past 2 TiB, and the very last."""
    offsets = (cluster_size, 2 * TiB + 9 * cluster_size, SIZE - cluster_size)
    return {offset: bytes([65 + at]) * cluster_size for at, offset in enumerate(offsets)}


def write_all(path: str, pieces: dict[int, bytes]) -> None:
    with addcow_mp.open(path, writable=True) as device:
        for offset, piece in pieces.items():
            device.write(offset, piece)


@pytest.mark.parametrize("jobs", [0, 2])
@pytest.mark.parametrize("cluster_size", SIZES)
def test_commit_costs_what_the_data_costs(tmp_path: Path, cluster_size: int, jobs: int) -> None:
    # A backing of 1 MiB is grown to 3 TiB first, and must stay sparse in doing so.
    files = big(tmp_path, cluster_size, backing={5: b"kept"}, backing_size=MiB)
    pieces = places(cluster_size)
    write_all(files.path, pieces)
    begun = time.monotonic()
    addcow_mp.commit(files.path, jobs=jobs)
    assert time.monotonic() - begun < QUICK
    base = files.below[0]
    assert os.path.getsize(base) == os.path.getsize(files.image) == SIZE
    assert all(pread(base, offset, len(piece)) == piece for offset, piece in pieces.items())
    assert pread(base, 4, 6) == b"\0kept\0"
    assert list(bits_set(files.path)) == []
    assert disk_usage(files.image) <= 4 * KiB  # at most a block of the file system's own index
    assert disk_usage(base) < 2 * MiB


@pytest.mark.parametrize("jobs", [0, 2])
def test_flatten_costs_what_the_data_costs(tmp_path: Path, jobs: int) -> None:
    cluster_size = 64 * KiB
    under = {
        MiB: b"low" * 1000,
        2 * TiB + MiB: b"high" * 1000,
        2 * TiB + 9 * cluster_size: b"hidden",
    }
    files = big(tmp_path, cluster_size, backing=under, garbage={2 * TiB + GiB: b"garbage" * 1000})
    pieces = places(cluster_size)
    write_all(files.path, pieces)
    begun = time.monotonic()
    addcow_mp.flatten(files.path, jobs=jobs)
    assert time.monotonic() - begun < QUICK
    shown = {
        MiB: b"low" * 1000,
        2 * TiB + MiB: b"high" * 1000,
        2 * TiB + GiB: bytes(7000),
        **pieces,
    }
    assert all(pread(files.image, offset, len(piece)) == piece for offset, piece in shown.items())
    assert os.path.getsize(files.image) == SIZE
    assert disk_usage(files.image) < 2 * MiB
    assert read_header(files.path).all_allocated
    bitmap = pread(files.path, read_header(files.path).header_size, SIZE // cluster_size // 8)
    assert bitmap == b"\xff" * (SIZE // cluster_size // 8)


@pytest.mark.parametrize("jobs", [0, 2])
def test_convert_costs_what_the_data_costs(tmp_path: Path, jobs: int) -> None:
    cluster_size = 64 * KiB
    garbage = {2 * TiB + GiB: b"garbage" * 1000}
    files = big(tmp_path, cluster_size, backing={2 * TiB + MiB: b"high" * 1000}, garbage=garbage)
    pieces = places(cluster_size)
    write_all(files.path, pieces)
    new = str(tmp_path / "new.raw")
    begun = time.monotonic()
    addcow_mp.convert(files.path, new, jobs=jobs)
    assert time.monotonic() - begun < QUICK
    shown = {2 * TiB + MiB: b"high" * 1000, 2 * TiB + GiB: bytes(7000), **pieces}
    assert all(pread(new, offset, len(piece)) == piece for offset, piece in shown.items())
    assert os.path.getsize(new) == SIZE
    assert disk_usage(new) < 2 * MiB
