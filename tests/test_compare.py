"""`addcow compare`: the same or not, where, how it is said, and what is read for the answer.

The answer is held against plain bytes: both guests' views are read by the model's own parser,
the shorter one is continued with zeros, and the sectors that differ are joined into extents.
That list must be the command's list, exactly, and its first place the one that is named. On
raw files qemu-img is asked as well: same words, same exit status.

Some things cannot be seen in the answer. What both sides take from the same place is equal
without being read: its pages are then not in the page cache, from which they were driven out
before. A disk that no longer answers is made of an ext4 in a file on an XFS that is shut down
under it, so that reading fails as it does with a bad sector.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from command import (
    CLUSTER,
    GiB,
    KiB,
    MiB,
    draw,
    draw_raw,
    overlay_bytes,
    pair,
    patch,
    put,
    snapshot,
    tool,
)
from faulty import PATIENCE, Ended, Rules, Warm, rule, running
from hypothesis import given, settings
from hypothesis import strategies as st
from model import SECTOR, Layer, build, overlay, raw, read_view
from powercut import ToolMissingError, UnavailableError, loop_disk

SAME = "Images are identical.\n"
SIZES = "Warning: Image size mismatch!\n"
BLOCK = 4 * KiB

Extents = list[tuple[int, int]]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    server = Warm(tmp_path_factory.mktemp("outputs"))
    yield server
    server.close()


def formats(*names: str) -> list[str]:
    """Return the options that say what both files are, by how their names end."""
    kinds = ["add-cow" if name.endswith(".add-cow") else "raw" for name in names]
    return ["-f", kinds[0], "-F", kinds[1]]


class Pair:
    """Two files in one directory, and the command that compares them."""

    def __init__(self, warm: Warm, here: Path, one: str, other: str) -> None:
        self.warm = warm
        self.here = here
        self.names = one, other

    def compare(self, *options: str, jobs: str = "0") -> Ended:
        """Run the command."""
        words = ["compare", *formats(*self.names), "--jobs", jobs, *options, *self.names]
        return self.warm.run(*words, cwd=self.here)

    def says(self, text: str, *options: str, jobs: str = "0") -> None:
        """Insist on these words, nothing else, and the exit status that belongs to them."""
        ended = self.compare(*options, jobs=jobs)
        assert ended == Ended(0 if text.endswith(SAME) else 1, text, "")

    def extents(self, *options: str, jobs: str = "0") -> Extents:
        """Return the differing extents that the command lists."""
        ended = self.compare("--output", "json", *options, jobs=jobs)
        report = json.loads(ended.stdout)
        found = [(one["start"], one["length"]) for one in report["differing-extents"]]
        assert (ended.status, ended.stderr) == (1 if found else 0, "")
        assert report["identical"] is (not found)
        assert report["complete"] is True
        return found


# ---- every combination of formats ----


def as_raw(here: Path, name: str, picture: str) -> str:
    draw_raw(here / f"{name}.img", picture)
    return f"{name}.img"


def as_overlay(here: Path, name: str, picture: str) -> str:
    """Every other cluster in the image, the rest below; garbage above what is below."""
    low = "".join(mark if at % 2 else "v" for at, mark in enumerate(picture))
    top = "".join("w" if at % 2 else mark.upper() for at, mark in enumerate(picture))
    draw_raw(here / f"{name}-base.img", low)
    draw(here / f"{name}.add-cow", top.replace("-", "0"), f"{name}-base.img")
    return f"{name}.add-cow"


def as_chain(here: Path, name: str, picture: str) -> str:
    """An overlay over an overlay, which holds the last third; a longer raw file below both."""
    cut = len(picture) - len(picture) // 3
    draw_raw(here / f"{name}-low.img", picture[:cut] + "v" * (len(picture) - cut) + "vv")
    middle = "-" * cut + picture[cut:].replace("-", "0")
    draw(here / f"{name}-mid.add-cow", middle, f"{name}-low.img")
    top = f"{name}.add-cow"
    draw(here / top, "-" * len(picture), f"{name}-mid.add-cow", backing_format="add-cow")
    return top


FORMS: dict[str, Callable[[Path, str, str], str]] = {
    "raw": as_raw,
    "overlay": as_overlay,
    "chain": as_chain,
}
ANY_TWO = [(one, other) for one in FORMS for other in FORMS]
PICTURE = "ABC0-DEF--GH"


@pytest.mark.parametrize("jobs", ["0", "1", "2"])
@pytest.mark.parametrize(("one", "other"), ANY_TWO)
def test_the_same_disk_in_any_two_forms(
    warm: Warm, tmp_path: Path, one: str, other: str, jobs: str
) -> None:
    names = FORMS[one](tmp_path, "a", PICTURE), FORMS[other](tmp_path, "b", PICTURE)
    files = Pair(warm, tmp_path, *names)
    files.says(SAME, jobs=jobs)
    assert files.extents(jobs=jobs) == []


@pytest.mark.parametrize("jobs", ["0", "1", "2"])
@pytest.mark.parametrize(("one", "other"), ANY_TWO)
def test_different_disks_in_any_two_forms(
    warm: Warm, tmp_path: Path, one: str, other: str, jobs: str
) -> None:
    """Data against data, zeros against data, data against a hole, and the last cluster."""
    changed = "ABX0YDE-Z-GI"
    names = FORMS[one](tmp_path, "a", PICTURE), FORMS[other](tmp_path, "b", changed)
    files = Pair(warm, tmp_path, *names)
    files.says(f"Content mismatch at offset {2 * CLUSTER}!\n", jobs=jobs)
    expected = [(at * CLUSTER, n * CLUSTER) for at, n in ((2, 1), (4, 1), (7, 2), (11, 1))]
    assert files.extents(jobs=jobs) == expected


# ---- against plain bytes ----


@st.composite
def layers(draw_from: st.DrawFn) -> Layer:
    """Any disk of a few blocks; the same letter at the same place is the same data."""
    cut = draw_from(st.sampled_from([0, 0, 0, SECTOR, 3 * KiB, 700, 1]))
    low = draw_from(st.text("AAA-0B", max_size=12))
    if draw_from(st.booleans()):
        return raw(low, cut=cut)
    size = draw_from(st.sampled_from([BLOCK, 8 * KiB]))
    cells = draw_from(st.text("AA--0.a", max_size=12 * BLOCK // size))
    below: Layer | None = raw(low, cut=draw_from(st.sampled_from([0, 700])))
    if draw_from(st.booleans()):
        below = overlay(draw_from(st.text("-B0.", max_size=8)), below)
    return overlay(cells, below, cluster_size=size, cut=cut)


def differing(one: bytes, other: bytes) -> Extents:
    """Return the extents, in whole sectors, in which two views differ."""
    size = max(len(one), len(other))
    one, other = one.ljust(size, b"\0"), other.ljust(size, b"\0")
    found: Extents = []
    for at in range(0, size, SECTOR):
        if one[at : at + SECTOR] != other[at : at + SECTOR]:
            if found and sum(found[-1]) == at:
                found[-1] = found[-1][0], found[-1][1] + SECTOR
            else:
                found.append((at, SECTOR))
    return found


POKES = st.lists(st.tuples(st.integers(0, 48 * KiB), st.integers(1, 255)), max_size=4)


def poke(path: str, offset: int, value: int) -> None:
    """Change a byte, wherever in the file that is."""
    length = os.path.getsize(path)
    if length:
        with open(path, "r+b") as file:
            old = os.pread(file.fileno(), 1, offset % length)
            os.pwrite(file.fileno(), bytes([old[0] ^ value]), offset % length)


@given(layers(), layers(), POKES, st.sampled_from(["first", "second", "copy"]))
@settings(deadline=None, max_examples=120, derandomize=True, database=None)
def test_extents_are_those_of_the_bytes(
    warm: Warm, one: Layer, other: Layer, pokes: list[tuple[int, int]], how: str
) -> None:
    with TemporaryDirectory() as directory:
        files = build(one, directory, "one"), build(other, directory, "other")
        kinds = ["raw" if each.path == each.image else "add-cow" for each in files]
        paths = [each.path for each in files]
        if how == "copy":
            # Two disks that have most in common.
            paths[1], kinds[1] = os.path.join(directory, "copy"), "raw"
            Path(paths[1]).write_bytes(read_view(paths[0], kinds[0]))
        for offset, value in pokes:
            poke(paths[1] if how == "copy" else files[how == "second"].image, offset, value)
        agrees(warm, paths, kinds)


def agrees(warm: Warm, paths: list[str], kinds: list[str]) -> None:
    """Insist on the answers that the bytes give, as text and as JSON."""
    views = [read_view(path, kind) for path, kind in zip(paths, kinds, strict=True)]
    expected = differing(*views)
    words = ["compare", "-f", kinds[0], "-F", kinds[1], "--jobs", "0", *paths]
    listed = warm.run(*words, "--output", "json", cwd=Path("/"))
    report = json.loads(listed.stdout)
    assert [(one["start"], one["length"]) for one in report["differing-extents"]] == expected
    assert (listed.status, listed.stderr) == (1 if expected else 0, "")
    assert report["virtual-sizes"] == [len(view) for view in views]
    assert report["filenames"] == paths
    text = SIZES if len(views[0]) != len(views[1]) else ""
    text += f"Content mismatch at offset {expected[0][0]}!\n" if expected else SAME
    assert warm.run(*words, cwd=Path("/")) == Ended(1 if expected else 0, text, "")


# ---- many tasks ----

#: Data of one block in every 256 KiB: so thinly spread, 64 MiB of disk count as one task.
GRAIN, TASK = 256 * KiB, 64 * MiB


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Pair:
    """Two disks of five tasks; in the second, third and last of them something differs."""
    here = tmp_path_factory.mktemp("thin")
    with (here / "a.img").open("wb") as one, (here / "b.img").open("wb") as other:
        for file in (one, other):
            file.truncate(5 * TASK)
            for at in range(0, 5 * TASK, GRAIN):
                file.seek(at)
                file.write(f"{at}".encode().ljust(BLOCK, b"."))
    for at in (TASK + 3 * GRAIN, 2 * TASK, 5 * TASK - GRAIN):
        put(here / "b.img", at + 1000, b"#")
    # Zeros against data, across the border of two tasks.
    patch(here / "a.img", 4 * TASK - SECTOR, b"x" * 2 * SECTOR)
    return Pair(warm, here, "a.img", "b.img")


@pytest.mark.parametrize("jobs", ["0", "1", "2", "3"])
def test_the_first_difference_is_the_first_one_whoever_finds_it(thin: Pair, jobs: str) -> None:
    first = TASK + 3 * GRAIN + SECTOR
    thin.says(f"Content mismatch at offset {first}!\n", jobs=jobs)


@pytest.mark.parametrize("jobs", ["0", "1", "2", "3"])
def test_extents_of_all_tasks_are_one_list_in_order(thin: Pair, jobs: str) -> None:
    places = [TASK + 3 * GRAIN + SECTOR, 2 * TASK + SECTOR, 5 * TASK - GRAIN + SECTOR]
    expected = [(at, SECTOR) for at in places]
    assert thin.extents(jobs=jobs) == sorted([*expected, (4 * TASK - SECTOR, 2 * SECTOR)])


def spots(here: Path, count: int) -> Extents:
    """Two files that differ in so many single sectors."""
    places = [(at * 2 * SECTOR, SECTOR) for at in range(count)]
    content = bytearray(2 * SECTOR * (count + 1))
    (here / "a.img").write_bytes(content)
    for start, _ in places:
        content[start + 7] = 1
    (here / "b.img").write_bytes(content)
    return places


def test_a_list_that_is_cut_short_says_so(warm: Warm, tmp_path: Path) -> None:
    expected = spots(tmp_path, 1500)
    files = Pair(warm, tmp_path, "a.img", "b.img")
    report = json.loads(files.compare("--output", "json").stdout)
    found = [(one["start"], one["length"]) for one in report["differing-extents"]]
    assert found == expected[:1000]
    assert report["complete"] is False
    files.says("Content mismatch at offset 0!\n")


@pytest.mark.parametrize(
    "count",
    [
        999,
        pytest.param(
            1000,
            marks=pytest.mark.xfail(strict=True, reason="at the very limit it says 'incomplete'"),
        ),
    ],
)
def test_a_long_list_is_complete(warm: Warm, tmp_path: Path, count: int) -> None:
    expected = spots(tmp_path, count)
    assert Pair(warm, tmp_path, "a.img", "b.img").extents() == expected


# ---- in the words of qemu-img ----


def raw_pair(here: Path, one: str, other: str) -> None:
    for name, picture in (("a.img", one), ("b.img", other)):
        draw_raw(here / name, picture)


EQUAL_ALLOCATION = {
    "equal": ("AB-0C", "AB-0C"),
    "content": ("ABCDE", "ABCXE"),
    "zeros and data": ("AB0D", "ABCD"),
    "data and zeros": ("ABCD", "AB0D"),
    "longer by a hole": ("AB", "AB--"),
    "longer by zeros": ("AB000", "AB"),
    "longer by data": ("AB", "AB--C"),
    "longer and content": ("ABC", "AXC-"),
    "longer by data and content": ("ABCD", "XB"),
    "empty": ("", ""),
    "empty and zeros": ("", "0-"),
    "empty and data": ("--A", ""),
}
OTHER_ALLOCATION = {
    "a hole and zeros": ("AB-D", "AB0D"),
    "a hole and data": ("-BCD", "ABCD"),
    "content before": ("XBC-", "ABC0"),
    "content behind": ("A-C", "A0X"),
}


def as_qemu_img_does(here: Path, *flags: str) -> None:
    """Insist on the same output and status; skip without qemu-img."""
    tool("qemu-img", "--version", cwd=here)
    words = ["compare", *flags, "-f", "raw", "-F", "raw", "a.img", "b.img"]
    done = subprocess.run(
        ["qemu-img", *words], cwd=here, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    ours = Warm(here) if not hasattr(as_qemu_img_does, "warm") else None
    assert ours is not None
    try:
        ended = ours.run(*words, cwd=here)
    finally:
        ours.close()
    assert (ended.status, ended.stdout) == (done.returncode, done.stdout)
    assert ended.stderr == done.stderr == ""
