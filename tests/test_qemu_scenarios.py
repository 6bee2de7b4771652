"""The scenarios of QEMU's own tests for this format, through `addcow io`.

The stages are QEMU's: a base, an overlay, requests with patterns at 0 and at 4 GiB, then reading.
The expected bytes come from a plain model here.
"""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from support.command import (
    GiB,
    KiB,
    MiB,
    addcow,
    bitmap_length,
    guest,
    local_clusters,
    overlay_bytes,
    read_header,
    succeed,
    tool,
)

pytestmark = pytest.mark.sample(1)

TOP = "top.add-cow"
SECTOR = 512
WINDOW = 1 * MiB
OFFSETS = (0, 4 * GiB)


def sectors(offset: int, length: int) -> bytes:
    """Return the content of the base there: each sector repeats its own number."""
    numbers = range(offset // SECTOR, (offset + length) // SECTOR)
    return b"".join(struct.pack("<Q", number + 1) * (SECTOR // 8) for number in numbers)


class Request(NamedTuple):
    """One patterned request."""

    offset: int
    length: int
    pattern: int

    def command(self, verb: str) -> str:
        return f"{verb} -P {self.pattern} {self.offset} {self.length}"


def strided(start: int, size: int, step: int, count: int, first: int = 1) -> list[Request]:
    """Return the requests of a loop: `count` of them, `step` apart, each of its own pattern."""
    return [Request(start + at * step, size, first + at) for at in range(count)]


@dataclass
class Disk:
    """What a guest has to see: windows of a large disk, each a plain bytearray."""

    windows: dict[int, bytearray] = field(default_factory=dict)

    def write(self, requests: list[Request]) -> None:
        for each in requests:
            window, at = self._at(each.offset)
            window[at : at + each.length] = bytes([each.pattern]) * each.length

    def holds(self, each: Request) -> bool:
        window, at = self._at(each.offset)
        return window[at : at + each.length] == bytes([each.pattern]) * each.length

    def _at(self, offset: int) -> tuple[bytearray, int]:
        start = max(start for start in self.windows if start <= offset)
        return self.windows[start], offset - start


def play(here: Path, verb: str, requests: list[Request]) -> None:
    """Send requests through standard input; the exit status says whether the patterns matched."""
    script = "".join(each.command(f"{verb} -q") + "\n" for each in requests)
    result = addcow("io", TOP, cwd=here, stdin=script)
    assert result.status == 0, result
    assert result.lines == []


def assert_guest_sees(here: Path, disk: Disk) -> None:
    for start, window in disk.windows.items():
        assert guest(here / TOP, start, len(window)) == window, f"window at {start}"


def assert_raw_is(path: Path, disk: Disk) -> None:
    for start, window in disk.windows.items():
        assert guest(path, start, len(window), "raw") == window, f"window at {start}"


# ---- alternating between backing and image, at 0 and at 4 GiB ----


@dataclass
class Stage:
    """A base and an overlay of 6 GiB, and the requests that filled them."""

    here: Path
    disk: Disk
    below: list[Request]
    above: list[Request]


def fill_base(here: Path, requests: list[Request]) -> Disk:
    with (here / "base.img").open("wb") as file:
        file.truncate(6 * GiB)
        for each in requests:
            file.seek(each.offset)
            file.write(bytes([each.pattern]) * each.length)
    disk = Disk({offset: bytearray(WINDOW) for offset in OFFSETS})
    disk.write(requests)
    return disk


def pieces(offset: int, small: int) -> tuple[list[Request], list[Request]]:
    """Return what goes into the base and what into the overlay, around one offset.

    First pieces that alternate between the two, then a whole cluster of the base, then one
    of the overlay; what follows stays empty. No pattern is used twice, not at the other
    offset either.
    """
    whole, mark = offset + 512 * KiB, 40 * OFFSETS.index(offset)
    below = [
        *strided(offset, small, 2 * small, 32, 1 + mark),
        Request(whole, 64 * KiB, 33 + mark),
    ]
    above = [
        *strided(offset + small, small, 2 * small, 32, 101 + mark),
        Request(whole + 64 * KiB, 64 * KiB, 133 + mark),
    ]
    return below, above


@pytest.fixture(params=[(4 * KiB, 512), (64 * KiB, 512), (64 * KiB, 8 * KiB), (2 * MiB, 4 * KiB)])
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Stage:
    cluster, small = request.param
    both = [pieces(offset, small) for offset in OFFSETS]
    below = [each for one, _ in both for each in one]
    above = [each for _, one in both for each in one]
    disk = fill_base(tmp_path, below)
    options = f"backing_file=base.img,backing_fmt=raw,cluster_size={cluster}"
    succeed("create", "-q", "-o", options, TOP, "6G", cwd=tmp_path)
    play(tmp_path, "writev", above)
    disk.write(above)
    return Stage(tmp_path, disk, below, above)


def empty(disk: Disk) -> list[Request]:
    """Return reads of zeros, of places that nothing was written to."""
    zeros = [Request(offset + 704 * KiB, 64 * KiB, 0) for offset in OFFSETS]
    assert all(disk.holds(each) for each in zeros)
    return zeros


@pytest.mark.long
def test_reads_alternate_between_backing_and_image(stage: Stage) -> None:
    everything = [*stage.below, *stage.above, *empty(stage.disk)]
    assert all(stage.disk.holds(each) for each in everything)
    play(stage.here, "readv", everything)
    assert_guest_sees(stage.here, stage.disk)
    base = Disk({offset: bytearray(WINDOW) for offset in OFFSETS})
    base.write(stage.below)
    assert_raw_is(stage.here / "base.img", base)


@pytest.mark.long
def test_commit_brings_both_to_the_backing(stage: Stage) -> None:
    assert succeed("commit", TOP, cwd=stage.here).lines[-1] == "Image committed."
    everything = [*stage.below, *stage.above, *empty(stage.disk)]
    commands = [word for each in everything for word in ("-c", each.command("read -q"))]
    said = tool("qemu-io", "-r", "-f", "raw", *commands, "base.img", cwd=stage.here)
    assert said == ""
    assert_raw_is(stage.here / "base.img", stage.disk)
    assert (stage.here / "base.img").stat().st_size == 6 * GiB
    assert local_clusters(stage.here / TOP) == []
    assert_guest_sees(stage.here, stage.disk)


def test_only_written_clusters_become_allocated(stage: Stage) -> None:
    cluster = read_header(stage.here / TOP).cluster
    touched = {
        number
        for each in stage.above
        for number in range(each.offset // cluster, -(-(each.offset + each.length) // cluster))
    }
    assert set(local_clusters(stage.here / TOP)) == touched


# ---- unaligned copy-up over a shorter backing ----


SMALL = 4 * KiB
# Not a whole number of clusters: the backing ends inside one.
BASE_LENGTH = 64 * SMALL + 3 * SECTOR
IMAGE_LENGTH = 128 * SMALL + 5 * SECTOR


def over_a_shorter_backing(here: Path) -> Disk:
    (here / "base.img").write_bytes(sectors(0, BASE_LENGTH))
    (here / "top.raw").touch()
    with (here / "top.raw").open("r+b") as file:
        # Garbage in clusters that are not allocated: copy-up has to overwrite all of it.
        file.write(b"\xee" * IMAGE_LENGTH)
    content = overlay_bytes(image="top.raw", size=IMAGE_LENGTH, backing="base.img", cluster=SMALL)
    (here / TOP).write_bytes(content)
    return Disk({0: bytearray(sectors(0, BASE_LENGTH).ljust(IMAGE_LENGTH, b"\0"))})


UNALIGNED = {
    "within one cluster": [Request(10 * SMALL + 512, 1024, 11)],
    "from the start of one": [Request(10 * SMALL, 512, 11)],
    "to the end of one": [Request(10 * SMALL + 3584, 512, 11)],
    "across two": [Request(10 * SMALL + 3072, 2048, 12)],
    "across many": [Request(10 * SMALL + 1536, 9 * SMALL, 13)],
    "in the cluster the backing ends in, below": [Request(64 * SMALL + 512, 512, 14)],
    "in the cluster the backing ends in, above": [Request(64 * SMALL + 2048, 512, 15)],
    "across the backing's end": [Request(BASE_LENGTH - 5 * SMALL + 512, 10 * SMALL, 16)],
    "behind the backing's end": [Request(80 * SMALL + 1024, 2 * SMALL, 17)],
    "in the partial last cluster": [Request(128 * SMALL + 1024, 512, 18)],
    "into the partial last cluster": [Request(126 * SMALL + 512, 2 * SMALL + 1024, 19)],
    "one after the other": [
        *strided(20 * SMALL + 512, 512, 1024, 40),
        *strided(62 * SMALL + 1024, 3 * SECTOR, SMALL - SECTOR, 20, 101),
    ],
}


@pytest.mark.parametrize("case", UNALIGNED)
def test_unaligned_writes_copy_up_what_is_around_them(tmp_path: Path, case: str) -> None:
    disk = over_a_shorter_backing(tmp_path)
    play(tmp_path, "write", UNALIGNED[case])
    disk.write(UNALIGNED[case])
    assert_guest_sees(tmp_path, disk)
    succeed("convert", "-O", "raw", TOP, "new.raw", cwd=tmp_path)
    assert (tmp_path / "new.raw").read_bytes() == disk.windows[0]
    assert (tmp_path / "base.img").read_bytes() == sectors(0, BASE_LENGTH)


def test_commit_of_unaligned_writes_grows_the_backing(tmp_path: Path) -> None:
    disk = over_a_shorter_backing(tmp_path)
    everything = [each for requests in UNALIGNED.values() for each in requests]
    play(tmp_path, "write", everything)
    disk.write(everything)
    succeed("commit", TOP, cwd=tmp_path)
    assert (tmp_path / "base.img").read_bytes() == disk.windows[0]
    assert (tmp_path / "top.raw").read_bytes() == bytes(IMAGE_LENGTH)


def test_disk_much_larger_than_its_backing(tmp_path: Path) -> None:
    base, size = 128 * MiB + SECTOR, 4 * GiB + 128 * MiB
    with (tmp_path / "base.img").open("wb") as file:
        file.seek(base - WINDOW)
        file.write(sectors(base - WINDOW, WINDOW))
    succeed("create", "-q", "-b", "base.img", "-F", "raw", TOP, str(size), cwd=tmp_path)
    edge = bytearray(sectors(base - WINDOW, WINDOW) + bytes(WINDOW))
    disk = Disk({base - WINDOW: edge, 4 * GiB: bytearray(WINDOW)})
    writes = [
        *strided(base - 9 * SECTOR, 3 * SECTOR, 4 * SECTOR, 5, 101),
        *strided(4 * GiB + 1024, 64 * KiB, 96 * KiB, 8),
    ]
    play(tmp_path, "write", writes)
    disk.write(writes)
    assert_guest_sees(tmp_path, disk)
    play(tmp_path, "read", [*writes[-8:], Request(3 * GiB, 1 * MiB, 0)])


# ---- concurrent writes that touch the same clusters ----


def large_clusters(here: Path, count: int) -> Disk:
    length = count * 2 * MiB
    (here / "base.img").write_bytes(sectors(0, length))
    with (here / "top.raw").open("wb") as file:
        file.truncate(length)
    content = overlay_bytes(image="top.raw", size=length, backing="base.img", cluster=2 * MiB)
    (here / TOP).write_bytes(content)
    return Disk({0: bytearray(sectors(0, length))})


def concurrently(here: Path, disk: Disk, requests: list[Request]) -> None:
    """Issue all requests before waiting for any, then compare every byte."""
    commands = [each.command("aio_write") for each in requests] + ["aio_flush", "length"]
    script = "".join(command + "\n" for command in commands)
    lines = succeed("io", TOP, cwd=here, stdin=script).lines
    finished = sorted(line for line in lines if line.startswith("wrote"))
    assert finished == sorted(
        f"wrote {each.length}/{each.length} bytes at offset {each.offset}" for each in requests
    )
    disk.write(requests)
    assert_guest_sees(here, disk)


def test_concurrent_writes_within_one_cluster(tmp_path: Path) -> None:
    disk = large_clusters(tmp_path, 3)
    concurrently(tmp_path, disk, strided(2 * MiB + 512, 32 * KiB, 64 * KiB, 31))
    assert local_clusters(tmp_path / TOP) == [1]


def test_concurrent_writes_across_the_borders_of_clusters(tmp_path: Path) -> None:
    disk = large_clusters(tmp_path, 5)
    borders = [
        each
        for border in range(2 * MiB, 10 * MiB, 2 * MiB)
        for each in strided(border - 96 * KiB, 64 * KiB, 80 * KiB, 3, 1 + border // (64 * KiB))
    ]
    concurrently(tmp_path, disk, borders)
    assert local_clusters(tmp_path / TOP) == [0, 1, 2, 3, 4]


@pytest.mark.long
def test_concurrent_writes_side_by_side_without_a_gap(tmp_path: Path) -> None:
    disk = large_clusters(tmp_path, 2)
    concurrently(tmp_path, disk, strided(1 * MiB, 64 * KiB, 64 * KiB, 32))
    play(tmp_path, "read", strided(1 * MiB, 64 * KiB, 64 * KiB, 32))


def disjoint(chance: random.Random, length: int) -> Iterator[Request]:
    """Yield requests of whole sectors that do not overlap, in no order."""
    cuts = sorted(chance.sample(range(1, length // SECTOR), 80))
    spans = list(zip(cuts[::2], cuts[1::2], strict=True))
    chance.shuffle(spans)
    for start, stop in spans:
        size = min(stop - start, 512) * SECTOR
        yield Request(start * SECTOR, size, chance.randrange(1, 256))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_concurrent_writes_at_random(tmp_path: Path, count: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201
    disk = large_clusters(tmp_path, count)
    concurrently(tmp_path, disk, list(disjoint(random.Random(seed), count * 2 * MiB)))


def test_bitmap_keeps_its_length(tmp_path: Path) -> None:
    large_clusters(tmp_path, 2)
    play(tmp_path, "write", [Request(4 * MiB - 512, 512, 7)])
    length = 2 * MiB + bitmap_length(4 * MiB, 2 * MiB)
    assert (tmp_path / TOP).stat().st_size == length == 2 * 2 * MiB
