"""Tests with the reference's images, replayed from facts about them.

The replay must make the very bytes of the reference. Then `info`, `map` and `check` are tested,
the guest's view, commit and flatten. Files with one forbidden edit must be refused by every
command. Each case is made once and copied; the copies have old times, so that any write shows.
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

import addcow_mp
import oracle
from support.golden import (
    CASES,
    INVALID,
    Facts,
    Replayed,
    Result,
    addcow,
    bitmap_bytes,
    copy_files,
    damage,
    expand,
    file_sha256,
    invalid_case,
    replay,
    sha256,
    snapshot,
    top,
)

pytestmark = pytest.mark.sample(1)

KiB = 1024
ALL_ALLOCATED = 1
COMPATIBLE_FEATURES = 32  # offset of the field in the header
NOT_ADD_COW = 63  # exit status of check

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
each_invalid = pytest.mark.parametrize(
    "case", INVALID["cases"], ids=lambda case: str(case["file"])[: -len(".add-cow")]
)
each_jobs = pytest.mark.parametrize("jobs", [0, 2], ids=lambda jobs: f"jobs{jobs}")


class Shelf:
    """Every case, made at its first use and never changed; tests get copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.replayed = cache(self._replayed)
        self.good = cache(self._good)

    def _replayed(self, name: str) -> Replayed:
        case = next(case for case in CASES if case["name"] == name)
        return replay(case, self.root / "replayed" / name)

    def _good(self) -> Path:
        return replay(invalid_case(), self.root / "good").folder

    def original(self, case: Facts) -> Path:
        """Return the folder of a case, to read from."""
        return self.replayed(case["name"]).folder

    def invalid(self, case: Facts, folder: Path) -> Path:
        """Put one invalid file, with base and image, into the new FOLDER."""
        return damage(self.good(), case, folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone afterwards: the copies would add up to some hundred MiB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def copy_case(shelf: Shelf, case: Facts, room: Path) -> Path:
    """Copy a case's files into ROOM and return the path of its top layer."""
    names = [name for name in case["files"] if name != "source.raw"]
    folder = copy_files(shelf.original(case), room / "case", names)
    name: str = top(case)["file"]
    return folder / name


def assert_refused(result: Result, path: Path, status: int = 1) -> None:
    """The command failed with one line that names the file, and no traceback."""
    assert result.exit == status, result
    assert result.err.startswith("addcow: "), result
    assert result.err.count("\n") == 1, result
    assert path.name in result.err, result


def assert_warned(result: Result, case: Facts) -> None:
    """The command worked; it warned of a bitmap that ends too early, and of nothing else."""
    assert result.exit == 0, result
    if not is_short(case):
        assert result.err == ""
        return
    assert result.err.startswith("addcow: warning: ")
    assert result.err.count("\n") == 1


def is_short(case: Facts) -> bool:
    return bool(case["exit"]["check"] == 2)


def assert_view(path: Path, case: Facts) -> None:
    """Oracle and device both show the guest what the reference showed."""
    assert oracle.digest(str(path)) == case["expected_sha256"]
    with addcow_mp.open(path) as device:
        assert device.size == case["virtual_size"]
        assert sha256(device.read(0, device.size)) == case["expected_sha256"]


# The replay leaves the reference's bytes


@each_case
def test_create_makes_the_file_of_the_reference(shelf: Shelf, case: Facts) -> None:
    replayed = shelf.replayed(case["name"])
    for layer in case["layers"]:
        if layer["stdout"] is not None:
            assert replayed.stdout[layer["file"]] == layer["stdout"] + "\n"
            assert replayed.created_sha256[layer["file"]] == layer["created_sha256"]


@each_case
def test_writes_make_the_files_of_the_reference(shelf: Shelf, case: Facts) -> None:
    # Images are compared whole: a allocated cluster holds what the guest saw, and no write ever
    # touches another one, so no two drivers may differ in a single byte.
    folder = shelf.replayed(case["name"]).folder
    names = {name for name in case["files"] if name != "source.raw"}
    assert set(os.listdir(folder)) == names
    for name in names:
        assert (folder / name).stat().st_size == case["files"][name]["length"]
        assert file_sha256(folder / name) == case["files"][name]["sha256"], name


# What the reading commands say


@each_case
def test_guests_view_is_that_of_the_reference(shelf: Shelf, case: Facts, room: Path) -> None:
    path = shelf.original(case) / top(case)["file"]
    assert_warned(addcow("convert", "-O", "raw", path, room / "out.raw"), case)
    assert file_sha256(room / "out.raw") == case["expected_sha256"]
    assert_view(path, case)
    with addcow_mp.open(path) as device:
        assert expand(device.allocated_runs()) == expand(top(case)["allocated"])
    assert oracle.allocated(str(path)) == expand(top(case)["allocated"])


@each_case
def test_info_shows_the_header(shelf: Shelf, case: Facts) -> None:
    path = shelf.original(case) / top(case)["file"]
    result = addcow("info", "--output", "json", path)
    assert_warned(result, case)
    assert_info(json.loads(result.out), path, case, expand(top(case)["allocated"]))


def assert_info(info: Facts, path: Path, case: Facts, allocated: list[int]) -> None:
    header = case["header"]
    assert (info["filename"], info["format"]) == (str(path), "add-cow")
    assert info["virtual-size"] == case["virtual_size"]
    assert info["cluster-size"] == case["cluster_size"]
    assert_backing(info, path, header)
    special = info["format-specific"]
    assert special["type"] == "add-cow"
    data = special["data"]
    assert data["image-filename"] == header["image_file"]
    assert data["full-image-filename"] == str(path.parent / header["image_file"])
    assert data["image-format"] == header["image_fmt"]
    assert data["header-size"] == header["header_size"]
    assert data["compatible-features"] == header["compatible_features"]
    assert data["all-allocated"] is bool(header["compatible_features"] & ALL_ALLOCATED)
    assert data["total-clusters"] == case["total_clusters"]
    assert data["allocated-clusters"] == len(allocated)


def assert_backing(info: Facts, path: Path, header: Facts) -> None:
    if not header["backing_file"]:
        assert not [key for key in info if "backing" in key]
        return
    assert info["backing-filename"] == header["backing_file"]
    assert info["full-backing-filename"] == str(path.parent / header["backing_file"])
    assert info["backing-filename-format"] == header["backing_fmt"]


@each_case
def test_map_covers_the_disk(shelf: Shelf, case: Facts) -> None:
    path = shelf.original(case) / top(case)["file"]
    result = addcow("map", "--output", "json", path)
    assert_warned(result, case)
    extents = json.loads(result.out)
    assert_tiled(extents, case["virtual_size"])
    assert_depths(extents, case)
    guest = oracle.guest_bytes(str(path))
    for extent in extents:
        piece = guest[extent["start"] : extent["start"] + extent["length"]]
        assert extent["data"] or not any(piece)
        assert not (extent["zero"] and any(piece))


def assert_tiled(extents: list[Facts], size: int) -> None:
    """The extents follow each other from 0 to SIZE, no two adjacent ones equal."""
    at = 0
    last = None
    for extent in extents:
        kind = [extent[key] for key in ("depth", "present", "zero", "data")]
        assert extent["start"] == at
        assert extent["length"] > 0
        assert kind != last
        at += extent["length"]
        last = kind
    assert at == size


def assert_depths(extents: list[Facts], case: Facts) -> None:
    """Every piece of 4 KiB comes from the layer that the bitmaps say, or from none."""
    wanted = [wanted_depth(at, case) for at in range(0, case["virtual_size"], 4 * KiB)]
    seen: list[int | None] = []
    for extent in extents:
        stop = extent["start"] + extent["length"]
        depth = extent["depth"] if extent["present"] else None
        seen += [depth] * (-(-stop // (4 * KiB)) - len(seen))
    assert seen == wanted


def wanted_depth(at: int, case: Facts) -> int | None:
    """Return the number of the layer that holds byte AT, counted from the top."""
    for depth, layer in enumerate(reversed(case["layers"])):
        cluster = at // layer["cluster_size"]
        if any(first <= cluster < stop for first, stop in layer["allocated"]):
            return depth
    return len(case["layers"]) if at < (case["backing_size"] or 0) else None


@each_case
def test_check_separates_clean_from_damaged_files(shelf: Shelf, case: Facts) -> None:
    path = shelf.original(case) / top(case)["file"]
    result = addcow("check", path)
    assert result.exit == case["exit"]["check"], result
    assert ("No errors were found on the image." in result.out) is not is_short(case)
    report = addcow_mp.check(path)
    assert (report.exit_code, report.corruptions > 0) == (result.exit, is_short(case))


# commit


@each_case
@each_jobs
def test_commit_keeps_the_guest_s_view(shelf: Shelf, case: Facts, jobs: int, room: Path) -> None:
    path = copy_case(shelf, case, room)
    before = snapshot(path.parent)
    header = path.read_bytes()[: case["header"]["header_size"]]
    result = addcow("commit", "--jobs", str(jobs), path)
    if case["exit"]["commit"] != 0:
        assert_refused(result, path, case["exit"]["commit"])
        assert snapshot(path.parent) == before
        return
    assert (result.exit, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "Image committed."
    assert_view(path, case)
    assert_emptied(path, header, case)
    assert_committed(path.parent, before, case)
    assert addcow_mp.check(path).exit_code == 0


def assert_emptied(path: Path, header: bytes, case: Facts) -> None:
    """The overlay's bits are clear, its header as before, its image as long and empty."""
    after = path.read_bytes()
    assert len(after) == case["files"][path.name]["length"]
    assert after[: len(header)] == header
    assert not any(after[len(header) :])
    image = path.parent / top(case)["image"]
    assert image.stat().st_size == case["files"][image.name]["length"]
    assert not any(image.read_bytes())


def assert_committed(folder: Path, before: dict[str, tuple[int, str]], case: Facts) -> None:
    """The backing shows what the guest saw; a layer below it was not touched."""
    backing = folder / top(case)["backing"]
    reference = case["reference_commit"]
    if top(case)["backing_format"] == "raw":
        # As long as the overlay, where it was shorter; there the reference's commit failed.
        assert backing.stat().st_size == case["virtual_size"]
        assert file_sha256(backing) == case["expected_sha256"]
        return
    assert oracle.digest(str(backing)) == reference["backing_view_sha256"]
    assert oracle.allocated(str(backing)) == expand(reference["backing_allocated"])
    assert file_sha256(backing) == reference["backing_sha256"]
    root: str = case["base"]["file"]
    assert snapshot(folder)[root] == before[root]


# flatten


@each_case
@each_jobs
def test_flatten_keeps_the_guest_s_view(shelf: Shelf, case: Facts, jobs: int, room: Path) -> None:
    path = copy_case(shelf, case, room)
    before = snapshot(path.parent)
    header = bytearray(path.read_bytes()[: case["header"]["header_size"]])
    result = addcow("flatten", "--jobs", str(jobs), path)
    if case["exit"]["flatten"] != 0:
        assert_refused(result, path, case["exit"]["flatten"])
        assert snapshot(path.parent) == before
        return
    assert (result.exit, result.err) == (0, "")
    assert_view(path, case)
    if case["all_allocated"]:  # there is nothing to do, so nothing is done
        assert snapshot(path.parent) == before
        return
    header[COMPATIBLE_FEATURES] |= ALL_ALLOCATED
    assert_flattened(path, bytes(header), before, case)
    assert addcow_mp.check(path).exit_code == 0


def assert_flattened(
    path: Path, header: bytes, before: dict[str, tuple[int, str]], case: Facts
) -> None:
    """All bits and the flag are set, the image is the disk, the layers below as before."""
    bitmap = bitmap_bytes(range(case["total_clusters"]), case["cluster_size"])
    assert path.read_bytes() == header + bitmap
    image = path.parent / top(case)["image"]
    assert file_sha256(image) == case["expected_sha256"]
    after = snapshot(path.parent)
    for name in before.keys() - {path.name, image.name}:
        assert after[name] == before[name], name


# Files with one forbidden edit

COMMANDS: dict[str, list[str]] = {
    "info": ["info", "FILE"],
    "map": ["map", "FILE"],
    "check": ["check", "--output", "json", "FILE"],
    "convert": ["convert", "-O", "raw", "FILE", "OUT"],
    "commit": ["commit", "FILE"],
    "flatten": ["flatten", "FILE"],
    "io": ["io", "-r", "-c", "read 0 512", "FILE"],
}


def test_invalid_files_are_those_of_the_reference(shelf: Shelf, room: Path) -> None:
    for case in INVALID["cases"]:
        path = shelf.invalid(case, room / case["file"])
        assert file_sha256(path) == case["sha256"], case["file"]
        for name in ("base.img", "top.raw"):
            assert file_sha256(path.parent / name) == INVALID["files"][name]["sha256"]


@each_invalid
def test_every_command_refuses_an_invalid_file(shelf: Shelf, case: Facts, room: Path) -> None:
    paths = {name: shelf.invalid(case, room / name / "in") for name in COMMANDS}
    # Each command has files of its own, so two may run at a time without meeting a lock.
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(run_on, paths, paths.values()))
    for (name, path), result in zip(paths.items(), results, strict=True):
        assert_met(name, result, path, case)


def run_on(name: str, path: Path) -> Result:
    """Run one of COMMANDS on PATH and see that it leaves the folder alone."""
    before = snapshot(path.parent)
    output = path.parent.parent / "out"
    output.mkdir()
    places = {"FILE": path, "OUT": output / "out.raw"}
    result = addcow(*[places.get(word, word) for word in COMMANDS[name]])
    assert snapshot(path.parent) == before, name
    assert name == "convert" or not os.listdir(output)
    return result


def assert_met(name: str, result: Result, path: Path, case: Facts) -> None:
    wanted = case["exit"][name]
    assert "Traceback" not in result.out + result.err
    if wanted == 0:
        assert_read_with_warning(name, result, path)
        return
    if wanted == "nonzero":
        assert result.exit in {1, 2, 3, 63}, result
        wanted = result.exit
    assert result.exit == wanted, (name, result)
    if name == "check":
        assert_reported(result, path)
        return
    assert_refused(result, path, wanted)
    assert not os.listdir(path.parent.parent / "out")


def assert_reported(result: Result, path: Path) -> None:
    """The report of `check` names the file and says what is wrong with it."""
    report = json.loads(result.out)
    assert (report["filename"], result.err) == (str(path), "")
    number, severity = "corruptions", "corruption"
    if result.exit == NOT_ADD_COW:  # nothing is damaged: there is nothing to look at
        assert report["corruptions"] == 0
        number, severity = "check-errors", "check-error"
    assert report[number] >= 1
    assert severity in {finding["severity"] for finding in report["findings"]}
    assert all(finding["name"] and finding["message"] for finding in report["findings"])


def assert_read_with_warning(name: str, result: Result, path: Path) -> None:
    """A missing bitmap is read as zeros: the guest sees the base."""
    assert result.exit == 0, result
    assert result.err.startswith("addcow: warning: "), result
    assert result.err.count("\n") == 1, result
    if name == "convert":
        output = path.parent.parent / "out" / "out.raw"
        assert file_sha256(output) == INVALID["files"]["base.img"]["sha256"]


@each_invalid
def test_library_refuses_an_invalid_file_with_its_own_error(
    shelf: Shelf, case: Facts, room: Path
) -> None:
    path = shelf.invalid(case, room / "in")
    before = snapshot(path.parent)
    if case["exit"]["io"] == 0:
        with addcow_mp.open(path) as device:
            assert device.read(0, 512) == (path.parent / "base.img").read_bytes()[:512]
    else:
        with pytest.raises(addcow_mp.AddcowError, match=path.name):
            addcow_mp.open(path)
    assert snapshot(path.parent) == before
