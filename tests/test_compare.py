"""Tests of `addcow compare`: the result, the first difference, the list, and what it reads.

The expected list of extents comes from the bytes of both views, which the model reads. On raw
files the output is also compared with qemu-img. The page cache shows which files were read. A
dead disk is an ext4 in a file on an XFS that is shut down.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.command import (
    CLUSTER,
    GiB,
    KiB,
    MiB,
    draw,
    draw_raw,
    pair,
    patch,
    put,
    ran,
    snapshot,
    tool,
)
from support.fault_rules import Rules, rule
from support.file_systems import disks
from support.model import SECTOR, Layer, build, overlay, raw, read_view
from support.page_cache import resident, uncache, was_read
from support.powercut import Disk
from support.processes import Ended, running
from support.properties import tried
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

SAME = "Images are identical.\n"
SIZES = "Warning: Image size mismatch!\n"
BLOCK = 4 * KiB

Extents = list[tuple[int, int]]


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


@pytest.mark.parametrize(("one", "other"), ANY_TWO)
def test_equal_disks_in_any_two_forms_are_identical(
    warm: Warm, tmp_path: Path, one: str, other: str
) -> None:
    names = FORMS[one](tmp_path, "a", PICTURE), FORMS[other](tmp_path, "b", PICTURE)
    files = Pair(warm, tmp_path, *names)
    files.says(SAME)
    assert files.extents(jobs="1" if one == other else "0") == []


@pytest.mark.parametrize("jobs", ["0", "2"])
@pytest.mark.parametrize(("one", "other"), ANY_TWO)
def test_different_disks_in_any_two_forms_differ(
    warm: Warm, tmp_path: Path, one: str, other: str, jobs: str
) -> None:
    """Data against data, zeros against data, data against a hole, and the last cluster."""
    changed = "ABX0YDE-Z-GI"
    names = FORMS[one](tmp_path, "a", PICTURE), FORMS[other](tmp_path, "b", changed)
    files = Pair(warm, tmp_path, *names)
    files.says(f"Content mismatch at offset {2 * CLUSTER}!\n")
    expected = [(at * CLUSTER, n * CLUSTER) for at, n in ((2, 1), (4, 1), (7, 2), (11, 1))]
    assert files.extents(jobs=jobs) == expected


# ---- against plain bytes ----


@st.composite
def layers(draw_from: st.DrawFn) -> Layer:
    """Any disk of a few blocks; the same letter at the same place is the same data."""
    cut = draw_from(st.sampled_from([0, 0, 0, SECTOR, 3 * KiB, 700, 1]))
    low = draw_from(st.text("A-0B", max_size=12))
    if draw_from(st.booleans()):
        return raw(low, cut=cut)
    size = draw_from(st.sampled_from([BLOCK, 8 * KiB]))
    cells = draw_from(st.text("A-0.a", max_size=12 * BLOCK // size))
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


@pytest.mark.long
@given(layers(), layers(), POKES, st.sampled_from(["first", "second", "copy"]))
@tried(80)
def test_listed_extents_agree_with_a_comparison_of_bytes(
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


def whole_view(path: str, kind: str) -> bytes:
    """What the image shows; of a raw file every byte, filled up to a sector."""
    if kind != "raw":
        return read_view(path, kind)
    data = Path(path).read_bytes()
    return data.ljust(-(-len(data) // SECTOR) * SECTOR, b"\0")


def agrees(warm: Warm, paths: list[str], kinds: list[str]) -> None:
    """Insist on the answers that the bytes give, as text and as JSON."""
    views = [whole_view(path, kind) for path, kind in zip(paths, kinds, strict=True)]
    expected = differing(*views)
    words = ["compare", "-f", kinds[0], "-F", kinds[1], "--jobs", "0", *paths]
    listed = warm.run(*words, "--output", "json", cwd=Path("/"))
    report = json.loads(listed.stdout)
    assert [(one["start"], one["length"]) for one in report["differing-extents"]] == expected
    assert (listed.status, listed.stderr) == (1 if expected else 0, "")
    assert report["virtual-sizes"] == [len(view) for view in views]
    assert report["filenames"] == paths
    told = warm.run(*words, cwd=Path("/"))
    last = f"Content mismatch at offset {expected[0][0]}!\n" if expected else SAME
    assert (told.status, told.stderr) == (1 if expected else 0, "")
    assert told.stdout.removeprefix(SIZES) == last
    if len(views[0]) == len(views[1]) or not expected:
        assert told.stdout.startswith(SIZES) == (len(views[0]) != len(views[1]))


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
def test_first_difference_is_reported_whichever_worker_finds_one(thin: Pair, jobs: str) -> None:
    first = TASK + 3 * GRAIN + SECTOR
    thin.says(f"Content mismatch at offset {first}!\n", jobs=jobs)


@pytest.mark.parametrize("jobs", ["0", "1", "2", "3"])
def test_extents_of_all_tasks_form_one_ordered_list(thin: Pair, jobs: str) -> None:
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


def test_limited_list_says_that_it_is_incomplete(warm: Warm, tmp_path: Path) -> None:
    expected = spots(tmp_path, 1500)
    files = Pair(warm, tmp_path, "a.img", "b.img")
    report = json.loads(files.compare("--output", "json").stdout)
    found = [(one["start"], one["length"]) for one in report["differing-extents"]]
    assert found == expected[:1000]
    assert report["complete"] is False
    files.says("Content mismatch at offset 0!\n")


@pytest.mark.parametrize("count", [1, 999, 1000])
def test_long_list_is_complete(warm: Warm, tmp_path: Path, count: int) -> None:
    expected = spots(tmp_path, count)
    assert Pair(warm, tmp_path, "a.img", "b.img").extents() == expected


# ---- in the words of qemu-img ----


#: Where one has data, so has the other, as far as both go.
ALIKE = {
    "equal": ("AB-0C", "AB-0C"),
    "content": ("ABCDE", "ABCXE"),
    "zeros and data": ("AB0D", "ABCD"),
    "data and zeros": ("ABCD", "AB0D"),
    "longer by a hole": ("AB", "AB--"),
    "longer by zeros": ("AB000", "AB"),
    "longer by data": ("AB", "AB--C"),
    "empty": ("", ""),
    "empty and zeros": ("", "0-"),
    "empty and data": ("--A", ""),
}
#: Not so. Behind the place both have a hole and data: for qemu-img the file's end is a state too.
UNLIKE = {
    "a hole and zeros": ("AB-D-E", "AB0D-E"),
    "zeros and a hole": ("A0-D-E", "A--D-E"),
    "a hole and data": ("-BCD-E", "ABCD-E"),
    "content behind": ("A-C-E", "A0X-E"),
    "content before": ("XBC-D-E", "ABC0D-E"),
}
#: Of other sizes too, but that is not what makes the difference.
BOTH = {"content and longer": ("ABC", "AXC-"), "content and longer by data": ("ABCD", "XB")}


def as_qemu_img_does(files: Pair, *flags: str) -> None:
    """Insist on the same output and status; skip without qemu-img."""
    tool("qemu-img", "--version", cwd=files.here)
    words = ["qemu-img", "compare", *flags, *formats(*files.names), *files.names]
    done = ran(words, cwd=files.here)
    ended = files.compare(*flags)
    assert ended == Ended(done.returncode, done.stdout, done.stderr)


def raw_pair(warm: Warm, here: Path, pictures: tuple[str, str]) -> Pair:
    for name, picture in zip(("a.img", "b.img"), pictures, strict=True):
        draw_raw(here / name, picture)
    return Pair(warm, here, "a.img", "b.img")


@pytest.mark.parametrize("flags", [(), ("-s",), ("-q",), ("-q", "-s")], ids=" ".join)
@pytest.mark.parametrize("pictures", ALIKE.values(), ids=ALIKE)
def test_compare_of_raw_files_prints_what_qemu_img_prints(
    warm: Warm, tmp_path: Path, pictures: tuple[str, str], flags: tuple[str, ...]
) -> None:
    as_qemu_img_does(raw_pair(warm, tmp_path, pictures), *flags)


@pytest.mark.parametrize("pictures", BOTH.values(), ids=BOTH)
def test_content_difference_is_reported_before_a_size_difference(
    warm: Warm, tmp_path: Path, pictures: tuple[str, str]
) -> None:
    as_qemu_img_does(raw_pair(warm, tmp_path, pictures))


@pytest.mark.parametrize("pictures", UNLIKE.values(), ids=UNLIKE)
def test_allocation_does_not_matter_without_strict(
    warm: Warm, tmp_path: Path, pictures: tuple[str, str]
) -> None:
    as_qemu_img_does(raw_pair(warm, tmp_path, pictures))


@pytest.mark.parametrize("pictures", UNLIKE.values(), ids=UNLIKE)
def test_strict_compares_allocation(warm: Warm, tmp_path: Path, pictures: tuple[str, str]) -> None:
    as_qemu_img_does(raw_pair(warm, tmp_path, pictures), "-s")


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("-s",)], ids=" ".join)
def test_strict_reports_a_difference_by_its_sector(
    warm: Warm, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    for offset in (0, 511, 512, CLUSTER - 1, 3 * CLUSTER + 1000, 5 * CLUSTER - 1):
        files = raw_pair(warm, tmp_path, ("ABCDE", "ABCDE"))
        put(tmp_path / "b.img", offset, b"#")
        as_qemu_img_does(files, *flags)
        files.says(f"Content mismatch at offset {offset // SECTOR * SECTOR}!\n", *flags)


# ---- strictly ----


def strictly(files: Pair) -> tuple[int, int | None, bool]:
    """Return status, the place of unequal allocation, and whether they are identical."""
    ended = files.compare("-s", "--output", "json")
    report = json.loads(ended.stdout)
    assert report["strict"] is True
    return ended.status, report["allocation-differs-at"], report["identical"]


@pytest.mark.parametrize("pictures", UNLIKE.values(), ids=UNLIKE)
def test_strict_names_the_first_unequal_allocation(
    warm: Warm, tmp_path: Path, pictures: tuple[str, str]
) -> None:
    files = raw_pair(warm, tmp_path, pictures)
    one, other = ("".join("-" if mark == "-" else "D" for mark in each) for each in pictures)
    place = next(at for at, marks in enumerate(zip(one, other, strict=True)) if len({*marks}) > 1)
    assert strictly(files) == (1, place * CLUSTER, False)


def test_strict_compares_sizes(warm: Warm, tmp_path: Path) -> None:
    files = raw_pair(warm, tmp_path, ("AB", "AB-"))
    assert strictly(files) == (1, None, False)
    assert files.extents() == []


@pytest.mark.parametrize(("one", "other"), ANY_TWO)
def test_strict_ignores_which_file_of_the_chain_holds_data(
    warm: Warm, tmp_path: Path, one: str, other: str
) -> None:
    """A copy of the guest's view takes the same places, in whatever files they are."""
    names = FORMS[one](tmp_path, "a", "ABCDEFGHI"), FORMS[other](tmp_path, "b", "ABCDEFGHI")
    files = Pair(warm, tmp_path, *names)
    assert strictly(files) == (0, None, True)
    files.says(SAME, "-s")


def test_strict_list_contains_every_difference(warm: Warm, tmp_path: Path) -> None:
    files = raw_pair(warm, tmp_path, ("ABC-EF", "AXC0EY"))
    report = json.loads(files.compare("-s", "--output", "json").stdout)
    assert report["allocation-differs-at"] == 3 * CLUSTER
    assert report["differing-extents"] == [
        {"start": CLUSTER, "length": CLUSTER},
        {"start": 5 * CLUSTER, "length": CLUSTER},
    ]


# ---- what is read ----


def siblings(here: Path, below: str) -> list[Path]:
    """Two overlays over eight MiB of data, of which both replace the same two clusters."""
    draw_raw(here / "base.img", "A" * 128)
    if not (here / below).exists():
        shutil.copy(here / "base.img", here / below)
    draw(here / "a.add-cow", "X" + "-" * 126 + "Y", "base.img")
    draw(here / "b.add-cow", "X" + "-" * 126 + "Z", below)
    bases = [here / "base.img", here / below]
    uncache(*bases)
    return bases


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_data_from_one_shared_file_is_not_read(warm: Warm, tmp_path: Path, jobs: str) -> None:
    bases = siblings(tmp_path, "base.img")
    files = Pair(warm, tmp_path, "a.add-cow", "b.add-cow")
    assert files.extents(jobs=jobs) == [(127 * CLUSTER, CLUSTER)]
    assert [*map(resident, bases)] == [0, 0]


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_data_from_two_files_is_read(warm: Warm, tmp_path: Path, jobs: str) -> None:
    bases = siblings(tmp_path, "other.img")
    files = Pair(warm, tmp_path, "a.add-cow", "b.add-cow")
    assert files.extents(jobs=jobs) == [(127 * CLUSTER, CLUSTER)]
    assert all(was_read(base, size=126 * CLUSTER) for base in bases)


@pytest.mark.parametrize("name", ["base.img", "a link", "another name"])
def test_file_is_shared_by_whatever_name(warm: Warm, tmp_path: Path, name: str) -> None:
    base, _ = siblings(tmp_path, "base.img")
    if name == "a link":
        (tmp_path / name).symlink_to("base.img")
    elif name == "another name":
        (tmp_path / name).hardlink_to(base)
    draw(tmp_path / "a.add-cow", "-" * 128, "base.img")
    Pair(warm, tmp_path, "a.add-cow", name).says(SAME)
    assert resident(base) == 0


def test_overlay_compared_with_itself_is_not_read(warm: Warm, tmp_path: Path) -> None:
    pair(tmp_path, "A" * 64, "X" * 30 + "-" * 34)
    uncache(tmp_path / "base.img", tmp_path / "top.raw")
    Pair(warm, tmp_path, "top.add-cow", "top.add-cow").says(SAME)
    assert resident(tmp_path / "base.img") + resident(tmp_path / "top.raw") == 0


def test_hole_compared_with_data_is_not_read(warm: Warm, tmp_path: Path) -> None:
    files = raw_pair(warm, tmp_path, ("-" * 250, "0" * 250))
    uncache(tmp_path / "a.img", tmp_path / "b.img")
    files.says(SAME)
    assert resident(tmp_path / "a.img") == 0
    assert was_read(tmp_path / "b.img", size=250 * CLUSTER)


def test_compare_changes_nothing(warm: Warm, tmp_path: Path) -> None:
    names = as_chain(tmp_path, "a", PICTURE), as_overlay(tmp_path, "b", PICTURE.lower())
    before = snapshot(tmp_path), {each: each.stat().st_mtime_ns for each in tmp_path.iterdir()}
    files = Pair(warm, tmp_path, *names)
    for options in ((), ("-s",), ("--output", "json")):
        assert files.compare(*options, jobs="2").status == 1
    after = snapshot(tmp_path), {each: each.stat().st_mtime_ns for each in tmp_path.iterdir()}
    assert after == before


def test_large_holes_cost_compare_nothing(warm: Warm, tmp_path: Path) -> None:
    """Were they looked at, this would take minutes, and a list would have no end."""
    for name in ("a.img", "b.img"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(3072 * GiB)
    patch(tmp_path / "b.img", 3000 * GiB + 7, b"#")
    files = Pair(warm, tmp_path, "a.img", "b.img")
    assert files.extents() == [(3000 * GiB, SECTOR)]


# ---- what else it says ----


def test_compare_quiet_keeps_the_exit_status(warm: Warm, tmp_path: Path) -> None:
    for pictures, status in ((("AB", "AB-"), 0), (("AB", "AX-"), 1)):
        assert raw_pair(warm, tmp_path, pictures).compare("-q") == Ended(status, "", "")


def test_compare_prints_progress_on_stderr(warm: Warm, tmp_path: Path) -> None:
    ended = raw_pair(warm, tmp_path, ("AB" * 40, "AB" * 40)).compare("-p", jobs="2")
    assert (ended.status, ended.stdout) == (0, SAME)
    assert "100" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("short", [("a",), ("b",), ("a", "b")])
def test_compare_warns_of_short_bitmaps(warm: Warm, tmp_path: Path, short: tuple[str, ...]) -> None:
    """Missing bits are 0: no cluster is allocated there."""
    draw_raw(tmp_path / "low.img", "AB")
    for name in "ab":
        draw(tmp_path / f"{name}.add-cow", "--" if name not in short else "-X", "low.img")
        if name in short:
            os.truncate(tmp_path / f"{name}.add-cow", CLUSTER)
    files = Pair(warm, tmp_path, "a.add-cow", "b.add-cow")
    for options in ((), ("--output", "json")):
        ended = files.compare(*options)
        assert ended.status == 0
        lines = ended.stderr.splitlines()
        assert [line.split(": ")[:3] for line in lines] == [
            ["addcow", "warning", f"{name}.add-cow"] for name in short
        ]
        assert all("ends inside its bitmap" in line for line in lines)


@pytest.mark.parametrize("flags", [(), ("-s",)], ids=" ".join)
@pytest.mark.parametrize("other", [b"A" * 899 + b"B", b"A" * 900, b"A" * 899, b"A" * 512, b""])
def test_bytes_after_the_last_whole_sector_are_compared(
    warm: Warm, tmp_path: Path, other: bytes, flags: tuple[str, ...]
) -> None:
    """No view of a chain has them; in two separate files they are content."""
    (tmp_path / "a.img").write_bytes(b"A" * 900)
    (tmp_path / "b.img").write_bytes(other)
    as_qemu_img_does(Pair(warm, tmp_path, "a.img", "b.img"), *flags)


# ---- errors ----


def gone(here: Path, name: str) -> str:
    (here / f"{name}.add-cow").unlink()
    return f"{name}.add-cow"


def image_gone(here: Path, name: str) -> str:
    (here / f"{name}.raw").unlink()
    return f"{name}.raw"


def backing_gone(here: Path, name: str) -> str:
    (here / f"{name}.img").unlink()
    return f"{name}.img"


def no_header(here: Path, name: str) -> str:
    os.truncate(here / f"{name}.add-cow", 75)
    return f"{name}.add-cow"


def no_magic(here: Path, name: str) -> str:
    put(here / f"{name}.add-cow", 0, b"QFI\xfb")
    return f"{name}.add-cow"


def strange_feature(here: Path, name: str) -> str:
    put(here / f"{name}.add-cow", 24, b"\1")
    return f"{name}.add-cow"


def strange_backing_format(here: Path, name: str) -> str:
    put(here / f"{name}.add-cow", 44, b"qcow2\0")
    return f"{name}.img"


def directory_instead(here: Path, name: str) -> str:
    (here / f"{name}.raw").unlink()
    (here / f"{name}.raw").mkdir()
    return f"{name}.raw"


def outside(here: Path, name: str) -> str:
    draw(here / f"{name}.add-cow", "--", "../low.img")
    draw_raw(here.parent / "low.img", "AB")
    return "low.img"


def image_is_backing(here: Path, name: str) -> str:
    (here / f"{name}.img").unlink()
    (here / f"{name}.img").hardlink_to(here / f"{name}.raw")
    return f"{name}.img"


DAMAGES = [
    gone,
    image_gone,
    backing_gone,
    no_header,
    no_magic,
    strange_feature,
    strange_backing_format,
    directory_instead,
    outside,
    image_is_backing,
]


def cannot(ended: Ended, name: str) -> None:
    """Insist on an error that names a file."""
    assert ended.status == 2, ended
    assert ended.stderr.startswith("addcow: ")
    if ended.stdout:  # with --output json
        assert json.loads(ended.stdout)["exit"] == 2
    assert ended.stderr.count("\n") == 1
    assert name in ended.stderr


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["a", "b"])
def test_compare_names_the_file_that_it_cannot_open(
    warm: Warm, tmp_path: Path, name: str, damage: Callable[[Path, str], str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for each in "ab":
        draw_raw(here / f"{each}.img", "AB")
        draw(here / f"{each}.add-cow", "-X", f"{each}.img")
    named = damage(here, name)
    files = Pair(warm, here, "a.add-cow", "b.add-cow")
    cannot(files.compare(), named)
    cannot(files.compare("-s", "--output", "json"), named)


@pytest.mark.parametrize("name", ["a.img", "b.img"])
def test_compare_names_a_missing_raw_file(warm: Warm, tmp_path: Path, name: str) -> None:
    files = raw_pair(warm, tmp_path, ("AB", "AB"))
    (tmp_path / name).unlink()
    cannot(files.compare(), name)


def test_compare_never_guesses_a_format(warm: Warm, tmp_path: Path) -> None:
    pair(tmp_path, "AB", "--")
    words = ["compare", "top.add-cow", "base.img"]
    cannot(warm.run(*words, cwd=tmp_path), "base.img")
    # As raw, an add-cow file is bytes like any others.
    assert warm.run("compare", "-f", "raw", "-F", "raw", *words[1:], cwd=tmp_path).status == 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a.img"],
        ["a.img", "b.img", "c.img"],
        ["-f", "qcow2", "a.img", "b.img"],
        ["-F", "", "a.img", "b.img"],
        ["--jobs", "-1", "a.img", "b.img"],
        ["--output", "xml", "a.img", "b.img"],
        ["--copy", "clone", "a.img", "b.img"],
    ],
    ids=" ".join,
)
def test_invalid_compare_options_are_usage_errors(
    warm: Warm, tmp_path: Path, words: list[str]
) -> None:
    raw_pair(warm, tmp_path, ("AB", "AB"))
    ended = warm.run("compare", *words, cwd=tmp_path)
    assert (ended.status, ended.stdout) == (64, "")
    assert ended.stderr.startswith("addcow: ")


@pytest.mark.parametrize("order", [1, -1])
def test_compare_refuses_a_disk_in_use(warm: Warm, tmp_path: Path, order: int) -> None:
    pair(tmp_path, "AB", "-X")
    draw_raw(tmp_path / "copy.img", "AX")
    files = Pair(warm, tmp_path, *["top.add-cow", "copy.img"][::order])
    rules = Rules.write(tmp_path / "rules", rule("image_write", "stop"))
    words = ("io", "-c", "write -P 0x41 64k 64k", "top.add-cow")
    with running(*words, cwd=tmp_path, rules=rules) as guest:
        guest.stopped()
        cannot(files.compare(), "top.")
        assert "in use" in files.compare().stderr
        files.says(SAME, "-U")


# ---- disks that no longer answer ----


def let_die(here: Path, dying: Disk, place: Path, *words: str) -> Ended:
    """Begin to compare, and let a disk die when the overlay is being opened.

    Nothing of `place` is in memory then but what the file system knows of it.
    """
    uncache(place)
    with place.open("rb") as file:
        os.lseek(file.fileno(), 0, os.SEEK_HOLE)
    rules = Rules.write(here / "rules", rule("bitmap_load", "stop", once="on"))
    with running("compare", *words, cwd=here, rules=rules) as job:
        (stopped,) = job.stopped()
        dying.cut()
        job.signal(signal.SIGCONT, stopped)
        return job.end()


FIRST, SECOND = ("raw", "add-cow"), ("add-cow", "raw")


@pytest.mark.parametrize(
    ("order", "jobs"),
    [
        (FIRST, "1"),
        (SECOND, "1"),
        (FIRST, "0"),
        (SECOND, "0"),
    ],
)
def test_compare_names_the_file_with_a_read_error(
    tmp_path: Path, order: tuple[str, str], jobs: str
) -> None:
    pair(tmp_path, "ABCD" * 8, "-" * 32)
    with disks(tmp_path, "xfs", "ext4") as (below, disk):
        bad = disk.mountpoint / "bad.img"
        draw_raw(bad, "ABCD" * 8)
        names = {"raw": str(bad), "add-cow": "top.add-cow"}
        words = ["-f", order[0], "-F", order[1], "--jobs", jobs]
        cannot(let_die(tmp_path, below, bad, *words, *map(names.__getitem__, order)), "bad.img")


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_dead_disk_is_an_error_and_not_a_difference(tmp_path: Path, jobs: str) -> None:
    pair(tmp_path, "ABCD" * 8, "-" * 32)
    with disks(tmp_path, "xfs") as (disk,):
        bad = disk.mountpoint / "bad.img"
        draw_raw(bad, "ABCD" * 8)
        words = ["-f", "raw", "--jobs", jobs, str(bad), "top.add-cow"]
        cannot(let_die(tmp_path, disk, bad, *words), "bad.img")
