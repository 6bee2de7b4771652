"""Tests of `addcow farm plan`, `farm commit` and `farm flatten`: many images in one command.

The farms are made by hand or grown from a seed. Independent readers compute the guest's views.
Where nothing may change, no modification time may change.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    PATIENCE,
    USAGE,
    KiB,
    MiB,
    Result,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    local_clusters,
    look,
    overlay_bytes,
    put,
    ran,
    read_header,
    refused,
    same_content,
    snapshot,
    stored_bytes,
    succeed,
    tool,
)
from support.fault_rules import Rules, rule
from support.processes import running
from support.seed import SEED

pytestmark = pytest.mark.sample(1)

LIMIT_REACHED = 75
TERMINATED = 143

BOTH = pytest.mark.parametrize("operation", ["commit", "flatten"])
IN_OTHERS_AND_HERE = pytest.mark.parametrize("jobs", ["0", "2"])

STATES = ("done", "nothing-to-do", "refused", "failed", "stopped", "not-begun")
PLANNED = ("ready", "nothing-to-do", "refused")
ALWAYS = {"filename", "operation", "state"}
WHEN_DONE = {"bytes-moved", "clusters-moved", "bytes-zeroed", "clusters-zeroed", "seconds"}
WHEN_READY = {"target", "bytes", "space-needed", "space-kept", "space-freed"}
IN_PROGRESS = {
    *("images-done", "images", "bytes-done", "bytes", "bytes-per-second"),
    *("seconds", "seconds-left"),
}

#: What could forge lines or steer a terminal.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")

#: A descriptor that is not open.
CLOSED = 57


# ---- commands ----


def worked(operation: str, *words: str, cwd: Path, status: int = 0) -> dict[str, Any]:
    """Run a farm job; return its report, of which all that must always hold is asserted."""
    result = addcow("farm", operation, "--output", "json", *words, cwd=cwd)
    assert result.status == status, result
    report: dict[str, Any] = result.json
    assert set(report) == {"images", "summary"}
    for one in report["images"]:
        assert one["operation"] == operation
        assert one["state"] in STATES
        assert set(one) >= ALWAYS | (WHEN_DONE if one["state"] == "done" else set()), one
        assert one.get("problem") or one["state"] not in ("refused", "failed"), one
    assert_counted(report, STATES)
    moved = sum(one.get("bytes-moved", 0) for one in report["images"])
    assert report["summary"]["bytes-moved"] == moved
    return report


def planned(operation: str, *words: str, cwd: Path) -> dict[str, Any]:
    """Ask for a plan, which never changes anything and never fails; return it."""
    with untouched(cwd):
        result = succeed("farm", "plan", operation, "--output", "json", *words, cwd=cwd)
    report: dict[str, Any] = result.json
    assert set(report) == {"images", "filesystems", "summary"}
    for one in report["images"]:
        assert one["operation"] == operation
        assert one["state"] in PLANNED
        assert set(one) >= ALWAYS | (WHEN_READY if one["state"] == "ready" else set()), one
        assert one.get("problem") or one["state"] != "refused", one
    for disk in report["filesystems"]:
        assert set(disk) == {"path", "free", "peak", "kept"}
    assert set(report["summary"]) == {"images", *PLANNED, "bytes"}
    assert_counted(report, PLANNED)
    assert report["summary"]["bytes"] == sum(one.get("bytes", 0) for one in report["images"])
    return report


def assert_counted(report: dict[str, Any], states: tuple[str, ...]) -> None:
    counted = Counter(one["state"] for one in report["images"])
    summary = report["summary"]
    assert {state: summary[state] for state in states} == {each: counted[each] for each in states}
    assert summary.get("images", len(report["images"])) == len(report["images"])


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is said of each image; no image may be there twice."""
    names = [one["filename"].removeprefix("./") for one in report["images"]]
    assert len(names) == len(set(names))
    return dict(zip(names, report["images"], strict=True))


def states(report: dict[str, Any]) -> dict[str, str]:
    return {name.removesuffix(".add-cow"): one["state"] for name, one in by_name(report).items()}


def problem(report: dict[str, Any], name: str) -> str:
    told: str = by_name(report)[f"{name}.add-cow"]["problem"]
    return told


def addcow_with(*arguments: str, cwd: Path, descriptors: tuple[int, ...] = ()) -> Result:
    """Run addcow with descriptors that the caller has opened."""
    done = ran(
        [sys.executable, "-m", "addcow_mp", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


@contextmanager
def faults(monkeypatch: pytest.MonkeyPatch, place: Path, *sections: str) -> Iterator[Rules]:
    """Let these rules hold for all commands in the block."""
    rules = Rules.write(place, *sections)
    with monkeypatch.context() as patch:
        patch.setenv("ADDCOW_FAULTS", str(rules.path))
        yield rules


@contextmanager
def held(path: Path, *options: str) -> Iterator[None]:
    """Let qemu-io hold a file."""
    tool("qemu-io", "--version", cwd=path.parent)
    with subprocess.Popen(
        ["qemu-io", *options, "-f", "raw", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        watchdog = Timer(PATIENCE, holder.kill)
        watchdog.start()
        try:
            holder.stdin.write("length\n")
            holder.stdin.flush()
            assert "iB" in holder.stdout.readline()
            yield
        finally:
            watchdog.cancel()
            holder.stdin.close()
            holder.wait(PATIENCE)


# ---- farms ----


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty farm, with room beside it."""
    place = tmp_path / "farm"
    place.mkdir()
    return place


def single(here: Path, name: str, base: str = "AB--", top: str = "-XY-") -> Path:
    """Make one overlay over a base of its own: name.img, name.add-cow, name.raw."""
    path = here / f"{name}.add-cow"
    draw_raw(here / f"{name}.img", base)
    draw(path, top, f"{path.stem}.img")
    return path


def many(here: Path, count: int) -> list[str]:
    """Make so many overlays that each have a base of their own."""
    names = [f"vm{number:02}" for number in range(count)]
    for name in names:
        single(here, name)
    return names


def over(here: Path, name: str, below: str, picture: str, cluster: int = CLUSTER) -> Path:
    """Make an overlay over another one."""
    path = here / f"{name}.add-cow"
    draw(path, picture, f"{below}.add-cow", backing_format="add-cow", cluster=cluster)
    return path


def chain(here: Path, name: str = "vm") -> None:
    """Make name-top over name-mid over name.img; the guest on top sees APX0."""
    draw_raw(here / f"{name}.img", "ABCD")
    draw(here / f"{name}-mid.add-cow", "-P--", f"{name}.img")
    over(here, f"{name}-top", f"{name}-mid", "--X0")


def siblings(here: Path) -> None:
    """Make one and two over base.img, and up over one."""
    draw_raw(here / "base.img", "ABCD")
    draw(here / "one.add-cow", "P---", "base.img")
    draw(here / "two.add-cow", "-Q--", "base.img")
    over(here, "up", "one", "---U")


@dataclass
class Grown:
    """A farm grown from a seed: each overlay with what it stands on, bases with nothing."""

    here: Path
    bases: list[str] = field(default_factory=list)
    stands: dict[str, str] = field(default_factory=dict)

    def above(self, name: str) -> list[str]:
        return [one for one, below in self.stands.items() if below == name]

    def is_refused(self, name: str) -> bool:
        """Whether another overlay needs what a commit of the overlay would change."""
        return len(self.above(self.stands[name])) > 1

    def views(self) -> dict[str, bytes]:
        """Return what each file shows; those that stand on nothing come first."""
        content = {name: (self.here / name).read_bytes() for name in self.bases}
        seen = {
            name: each.ljust(-(-len(each) // 512) * 512, b"\0") for name, each in content.items()
        }
        for name, below in self.stands.items():
            seen[name] = seen_over(self.here / name, seen[below])
        return seen


CLUSTERS = [4 * KiB, 16 * KiB, 64 * KiB, 512 * KiB, 2 * MiB]


def grow(here: Path, seed: str) -> Grown:
    """Make trees of any shape over three bases, in several directories, clusters mixed."""
    chance, grown = random.Random(seed), Grown(here)
    places = ["", "a", "a/b", "c"]
    for place in places:
        (here / place).mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    for number, mark in enumerate("XYZ"):
        name = os.path.join(chance.choice(places), f"base{number}.img")
        sizes[name] = chance.choice([1, 2, 4]) * MiB
        draw_raw(here / name, cells(chance, mark, sizes[name] // CLUSTER))
        # A last sector that is not whole shows its bytes, then zeros.
        sizes[name] -= chance.choice([0, 0, 1, 512, 700])
        os.truncate(here / name, sizes[name])
        grown.bases.append(name)
    for number in range(14):
        everybody = [*grown.bases, *grown.stands]
        free = [one for one in everybody if not grown.above(one)]
        below = chance.choice(free if chance.random() < 0.8 else everybody)
        kind = "raw" if below in grown.bases else "add-cow"
        name = os.path.join(chance.choice(places), f"vm{number}.add-cow")
        # Nothing can be committed into a shorter overlay; a raw file grows.
        most = 4 * MiB if kind == "raw" else sizes[below]
        sizes[name] = min(most, chance.choice([2, 4]) * MiB) - chance.choice(
            [0, 0, 0, 512, 3 * KiB]
        )
        cluster = chance.choice(CLUSTERS)
        draw(
            here / name,
            cells(chance, chr(ord("A") + number), -(-sizes[name] // cluster)),
            os.path.relpath(here / below, (here / name).parent),
            backing_format=kind,
            cluster=cluster,
            compatible=ALL_ALLOCATED if chance.random() < 0.1 else 0,
        )
        os.truncate((here / name).with_suffix(".raw"), sizes[name])
        grown.stands[name] = below
    return grown


def cells(chance: random.Random, mark: str, count: int) -> str:
    """Return a picture with runs of everything, and one cell at least that is allocated data."""
    picture = ""
    while len(picture) < count:
        picture += chance.choice(f"{mark}{mark}---0{mark.lower()}") * chance.randint(1, 9)
    place = chance.randrange(count)
    return picture[:place] + mark + picture[place + 1 : count]


def seen_over(path: Path, below: bytes) -> bytes:
    """Return what a guest sees in an overlay, given what it sees in what lies below.

    `guest` of command.py looks at the bitmaps of the chain once a cluster: here they are large.
    """
    header = read_header(path)
    image = (path.parent / header.image).read_bytes()
    if header.compatible & ALL_ALLOCATED:
        return image
    seen = bytearray(below[: len(image)].ljust(len(image), b"\0"))
    for start in (number * header.cluster for number in local_clusters(path)):
        seen[start : start + header.cluster] = image[start : start + header.cluster]
    return bytes(seen)


def shown_after_commit(grown: Grown, before: dict[str, bytes], name: str) -> bytes:
    """Return what a file shows when whatever stands on it alone has gone down into it."""
    above = grown.above(name)
    if len(above) != 1:
        return before[name]
    arrived = shown_after_commit(grown, before, above[0])
    return arrived + before[name][len(arrived) :]


def is_committed(path: Path) -> bool:
    """Whether no cluster is allocated, and the image takes no space."""
    image = path.parent / read_header(path).image
    assert read_header(path).compatible & ALL_ALLOCATED == 0
    # A file system may keep the last block when it is not whole, and one to say where it is.
    kept = 8 * KiB if image.stat().st_size % (4 * KiB) else 0
    return local_clusters(path) == [] and stored_bytes(image) <= kept


def is_flat(path: Path) -> bool:
    return bool(read_header(path).compatible & ALL_ALLOCATED)


def stamps(directory: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in directory.rglob("*")}


@contextmanager
def untouched(directory: Path) -> Iterator[None]:
    """Insist on it that no byte and no time of change is another after the block."""
    before = snapshot(directory), stamps(directory)
    yield
    assert (snapshot(directory), stamps(directory)) == before


def assert_nothing_is_left(operation: str, *words: str, cwd: Path) -> None:
    """Insist on it that the same command again finds nothing to do, and does nothing."""
    with untouched(cwd):
        report = worked(operation, *words, cwd=cwd)
    assert set(states(report).values()) <= {"nothing-to-do"}


# ---- commit ----


def test_farm_commit_commits_a_chain_down_to_its_base(here: Path) -> None:
    chain(here)
    report = worked("commit", ".", cwd=here)
    assert states(report) == {"vm-top": "done", "vm-mid": "done"}
    assert look(here / "vm.img") == "APX0"
    for name in ("vm-top", "vm-mid"):
        assert guest_picture(here / f"{name}.add-cow") == "APX0"
        assert is_committed(here / f"{name}.add-cow")
    assert_nothing_is_left("commit", ".", cwd=here)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [CLUSTERS, CLUSTERS[::-1]], ids=["larger", "smaller"])
def test_farm_commit_handles_all_cluster_sizes_in_one_chain(here: Path, sizes: list[int]) -> None:
    draw_raw(here / "base.img", "Z" * 64)
    grown = Grown(here, ["base.img"])
    below = "base.img"
    for depth, size in enumerate(sizes):
        name = f"vm{depth}.add-cow"
        # Each has one cluster, somewhere in a half mebibyte of its own.
        count, local = 4 * MiB // size, (2 * depth + 1) * 256 * KiB // size
        picture = "-" * local + "ABCDE"[depth] + "-" * (count - local - 1)
        kind = "add-cow" if depth else "raw"
        draw(here / name, picture, below, backing_format=kind, cluster=size)
        grown.stands[name] = below
        below = name
    before = grown.views()
    assert set(states(worked("commit", ".", cwd=here)).values()) == {"done"}
    assert set(grown.views().values()) == {before[below]}
    assert all(is_committed(here / name) for name in grown.stands)


@pytest.mark.long
def test_farm_commit_handles_the_deepest_chain(here: Path) -> None:
    depth = 30
    draw_raw(here / "base.img", "-" * depth, cluster=4 * KiB)
    marks = "".join(chr(ord("A") + number % 26) for number in range(depth))
    below, kind = "base.img", "raw"
    for number, mark in enumerate(marks):
        name = f"vm{number:02}.add-cow"
        picture = "-" * number + mark + "-" * (depth - number - 1)
        draw(here / name, picture, below, backing_format=kind, cluster=4 * KiB)
        below, kind = name, "add-cow"
    report = worked("commit", ".", cwd=here)
    assert report["summary"]["done"] == depth
    assert look(here / "base.img", 4 * KiB) == marks
    assert_nothing_is_left("commit", ".", cwd=here)


@pytest.mark.long
@pytest.mark.parametrize("turn", range(4))
def test_farm_commit_handles_random_trees(here: Path, turn: int) -> None:
    grown = grow(here, f"{SEED}-{turn}")
    before, files = grown.views(), snapshot(here)
    refusals = {name for name in grown.stands if grown.is_refused(name)}
    report = worked("commit", ".", cwd=here, status=1 if refusals else 0)
    told = {name: one["state"] for name, one in by_name(report).items()}
    assert told == {name: "refused" if name in refusals else "done" for name in grown.stands}
    for name, shown in grown.views().items():
        assert shown == shown_after_commit(grown, before, name), name
    after = snapshot(here)
    for name, below in grown.stands.items():
        if name not in refusals:
            assert is_committed(here / name), name
            continue
        if not grown.above(name):
            assert after[name] == files[name]
        if below in grown.bases:
            assert after[below] == files[below]
    if not refusals:
        assert_nothing_is_left("commit", ".", cwd=here)


def test_farm_commit_works_across_directories(here: Path) -> None:
    for name in ("bases", "mids", "tops"):
        (here / name).mkdir()
    draw_raw(here / "bases" / "base.img", "ABC")
    draw(here / "mids" / "mid.add-cow", "-P-", "../bases/base.img")
    top = here / "tops" / "top.add-cow"
    draw(top, "--X", "../mids/mid.add-cow", backing_format="add-cow")
    report = worked("commit", "bases", "mids", "tops", cwd=here)
    assert states(report) == {"mids/mid": "done", "tops/top": "done"}
    assert look(here / "bases" / "base.img") == guest_picture(top) == "APX"


@pytest.mark.long
def test_farm_commit_commits_an_overlay_that_only_receives_data(here: Path) -> None:
    """No cluster of mid is allocated before top is committed into it."""
    draw_raw(here / "base.img", "ABC")
    draw(here / "mid.add-cow", "---", "base.img")
    over(here, "top", "mid", "-X-")
    assert states(planned("commit", ".", cwd=here)) == {"top": "ready", "mid": "ready"}
    assert states(worked("commit", ".", cwd=here)) == {"top": "done", "mid": "done"}
    assert look(here / "base.img") == "AXC"
    assert is_committed(here / "mid.add-cow")


def test_farm_commit_grows_a_shorter_base(here: Path) -> None:
    single(here, "vm", "AB", "-X-Y--")
    worked("commit", ".", cwd=here)
    assert look(here / "vm.img") == "AX0Y00"


def test_farm_commit_refuses_a_longer_top_and_commits_its_backing(here: Path) -> None:
    single(here, "low", "ABC", "-P-")
    over(here, "high", "low", "X---")
    before = snapshot(here)
    report = worked("commit", ".", cwd=here, status=1)
    assert states(report) == {"high": "refused", "low": "done"}
    assert "low.add-cow" in problem(report, "high")
    assert look(here / "low.img") == "APC"
    assert guest_picture(here / "high.add-cow") == "XPC0"
    after = snapshot(here)
    assert [after[each] for each in ("high.add-cow", "high.raw")] == [
        before[each] for each in ("high.add-cow", "high.raw")
    ]


def test_farm_commit_reports_moved_and_zeroed_bytes_of_each_image(here: Path) -> None:
    single(here, "one", "ABCDEF", "-XY0--")
    # A allocated cluster that is a hole in the image file: the backing's data has to go.
    draw_raw(here / "one.raw", "-XY---")
    single(here, "two", "ABC", "X--")
    told = by_name(worked("commit", ".", cwd=here))
    wanted = {"bytes-moved": 2 * CLUSTER, "clusters-moved": 2}
    wanted |= {"bytes-zeroed": CLUSTER, "clusters-zeroed": 1}
    assert {key: told["one.add-cow"][key] for key in wanted} == wanted
    assert told["two.add-cow"]["bytes-moved"] == CLUSTER
    assert told["two.add-cow"]["seconds"] >= 0
    assert look(here / "one.img") == "AXY0EF"


@pytest.mark.long
@pytest.mark.parametrize("words", [("commit",), ("flatten", "--discard")], ids=" ".join)
def test_farm_job_starts_an_image_after_the_overlays_above_it(
    here: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    grown = grow(here, SEED)
    log = tmp_path / "log"
    addcow("farm", *words, "--jobs", "2", "--log", str(log), ".", cwd=here)
    at = {(one["event"], one.get("filename")): n for n, one in enumerate(logged(log))}
    for name, below in grown.stands.items():
        begun, done = at.get(("image-begun", f"./{below}")), at.get(("image-done", f"./{name}"))
        assert begun is None or done is None or done < begun, (name, below)


WAYS = [
    *(("-t", "none"), ("-t", "unsafe"), ("--copy", "range"), ("--copy", "map")),
    ("--copy", "buffer"),
    *(("-S", "4k"), ("--idle",), ("-r", "1G")),
]


@BOTH
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_farm_job_result_is_equal_with_every_copy_method(
    here: Path, operation: str, way: tuple[str, ...]
) -> None:
    chain(here)
    single(here, "other")
    assert set(states(worked(operation, *way, ".", cwd=here)).values()) == {"done"}
    assert look(here / ("vm.img" if operation == "commit" else "vm-top.raw")) == "APX0"
    assert look(here / ("other.img" if operation == "commit" else "other.raw")) == "AXY0"


# ---- siblings ----


def test_farm_commit_refuses_siblings(here: Path) -> None:
    draw_raw(here / "base.img", "ABCD")
    draw(here / "one.add-cow", "P---", "base.img")
    draw(here / "two.add-cow", "-Q--", "base.img")
    with untouched(here):
        report = worked("commit", ".", cwd=here, status=1)
    assert states(report) == {"one": "refused", "two": "refused"}
    for name, other in (("one", "two"), ("two", "one")):
        assert "other overlays depend on it" in problem(report, name)
        assert f"{other}.add-cow" in problem(report, name)


def test_farm_commit_commits_an_overlay_above_a_refused_sibling(here: Path) -> None:
    siblings(here)
    before = snapshot(here)
    report = worked("commit", ".", cwd=here, status=1)
    assert states(report) == {"one": "refused", "two": "refused", "up": "done"}
    assert guest_picture(here / "one.add-cow") == guest_picture(here / "up.add-cow") == "PBCU"
    assert bits(here / "one.add-cow") == "1..1"
    assert is_committed(here / "up.add-cow")
    after = snapshot(here)
    for name in ("base.img", "two.add-cow", "two.raw"):
        assert after[name] == before[name]


@pytest.mark.long
def test_farm_commit_finds_dependants_that_are_not_named(here: Path) -> None:
    for name in ("bases", "vms"):
        (here / name).mkdir()
    draw_raw(here / "bases" / "base.img", "ABC")
    draw(here / "vms" / "top.add-cow", "X--", "../bases/base.img")
    draw(here / "bases" / "other.add-cow", "-Y-", "base.img")
    with untouched(here):
        report = worked("commit", "--root", "bases", "vms", cwd=here, status=1)
    assert states(report) == {"vms/top": "refused"}
    assert "bases/other.add-cow" in problem(report, "vms/top")
    (here / "bases" / "other.add-cow").unlink()
    draw(here / "vms" / "other", "-Y-", "../bases/base.img")
    with untouched(here):
        report = worked("commit", "--root", "bases", "vms/top.add-cow", cwd=here, status=1)
    assert "vms/other" in problem(report, "vms/top")


@pytest.mark.long
@pytest.mark.parametrize("below", ["base.img", "mid.add-cow"])
def test_farm_commit_force_commits_siblings_one_after_the_other(
    here: Path, tmp_path: Path, below: str
) -> None:
    """Each has a small cluster in the same large ones of mid: two at a time would lose some."""
    draw_raw(here / "base.img", "ABCD")
    draw(here / "mid.add-cow", "----", "base.img")
    marks = "EFGHIJKLMNOPQRST"
    kind = "raw" if below == "base.img" else "add-cow"
    for number, mark in enumerate(marks):
        picture = ("-" * number + mark).ljust(16, "-") * 4
        path = here / f"vm{number:02}.add-cow"
        draw(path, picture, below, backing_format=kind, cluster=4 * KiB)
    log = tmp_path / "log"
    worked("commit", "--force", "--jobs", "2", "--log", str(log), ".", cwd=here)
    assert look(here / "base.img", 4 * KiB) == marks * 4
    assert all(is_committed(path) for path in here.glob("*.add-cow"))
    at_work: set[str] = set()
    for one in logged(log):
        if one["event"] == "image-begun":
            assert not at_work
            at_work.add(one["filename"])
        elif one["event"] == "image-done":
            at_work.remove(one["filename"])


@pytest.mark.long
def test_farm_job_refuses_a_shared_image_even_with_force(here: Path) -> None:
    single(here, "one")
    single(here, "fine")
    shutil.copy(here / "one.add-cow", here / "thief.add-cow")
    for force in ((), ("--force",)):
        report = worked("flatten", *force, ".", cwd=here, status=1)
        told = states(report)
        assert (told["one"], told["thief"]) == ("refused", "refused")
    assert guest_picture(here / "one.add-cow") == "AXY0"
    assert is_flat(here / "fine.add-cow")


@pytest.mark.long
@pytest.mark.parametrize("spell", [Path.hardlink_to, Path.symlink_to])
def test_farm_commit_identifies_siblings_by_inode(
    here: Path, spell: Callable[[Path, Path], None]
) -> None:
    draw_raw(here / "base.img", "ABCD")
    spell(here / "same.img", here / "base.img")
    draw(here / "one.add-cow", "P---", "base.img")
    draw(here / "two.add-cow", "-Q--", "same.img")
    with untouched(here):
        report = worked("commit", ".", cwd=here, status=1)
    assert states(report) == {"one": "refused", "two": "refused"}
    worked("commit", "--force", "--jobs", "2", ".", cwd=here)
    assert look(here / "base.img") == "PQCD"


@pytest.mark.long
@pytest.mark.parametrize("spell", [Path.hardlink_to, Path.symlink_to])
@pytest.mark.parametrize("words", [("commit",), ("flatten", "--discard")], ids=" ".join)
def test_farm_commit_identifies_a_chain_by_inode(
    here: Path, words: tuple[str, ...], spell: Callable[[Path, Path], None]
) -> None:
    draw_raw(here / "base.img", "ABCD")
    draw(here / "a-mid.add-cow", "-P--", "base.img")
    spell(here / "link", here / "a-mid.add-cow")
    draw(here / "b-top.add-cow", "--X-", "link", backing_format="add-cow")
    # Of files with two names, what is written is written by force alone.
    force = ("--force",) if spell is Path.hardlink_to else ()
    if force:
        report = addcow("farm", *words, "--dry-run", "--output", "json", ".", cwd=here).json
        assert states(report)["a-mid"] == "refused"
    report = worked(*words, *force, "a-mid.add-cow", "b-top.add-cow", cwd=here)
    assert set(states(report).values()) == {"done"}
    assert look(here / ("base.img" if words == ("commit",) else "b-top.raw")) == "APXD"


# ---- nothing to do ----


@pytest.mark.long
def test_farm_commit_has_nothing_to_do_without_a_backing(here: Path) -> None:
    draw(here / "lone.add-cow", "XY-", "")
    draw(here / "flat.add-cow", "XY-", "", compatible=ALL_ALLOCATED)
    single(here, "empty", "ABC", "---")
    with untouched(here):
        report = worked("commit", ".", cwd=here)
    assert set(states(report).values()) == {"nothing-to-do"}
    assert set(states(planned("commit", ".", cwd=here)).values()) == {"nothing-to-do"}


def test_farm_flatten_has_nothing_to_do_for_a_flat_image(here: Path) -> None:
    single(here, "vm")
    draw(here / "flat.add-cow", "XY-", "vm.img", compatible=ALL_ALLOCATED)
    before = snapshot(here)
    assert states(worked("flatten", ".", cwd=here)) == {"vm": "done", "flat": "nothing-to-do"}
    after = snapshot(here)
    for name in ("flat.add-cow", "flat.raw", "vm.img"):
        assert after[name] == before[name]


@BOTH
def test_farm_job_again_does_only_the_remaining_images(here: Path, operation: str) -> None:
    chain(here, "old")
    worked(operation, ".", cwd=here)
    files, times = snapshot(here), stamps(here)
    single(here, "new")
    told = states(worked(operation, ".", cwd=here))
    assert told == {"old-top": "nothing-to-do", "old-mid": "nothing-to-do", "new": "done"}
    assert snapshot(here).items() >= files.items()
    assert stamps(here).items() >= times.items()


@pytest.mark.long
@BOTH
def test_farm_job_is_done_once_with_a_partial_last_block(here: Path, operation: str) -> None:
    """A file system keeps a part of a block that was freed: no work is left because of that."""
    single(here, "vm", "ABCD", "-XYZ")
    os.truncate(here / "vm.raw", 4 * CLUSTER - 512)
    assert states(worked(operation, ".", cwd=here)) == {"vm": "done"}
    assert_nothing_is_left(operation, ".", cwd=here)


@pytest.mark.long
@pytest.mark.parametrize("words", [("commit",), ("flatten",), ("flatten", "--discard")])
def test_farm_job_on_an_empty_farm_succeeds(here: Path, words: tuple[str, ...]) -> None:
    (here / "notes.txt").write_text("no overlay")
    with untouched(here):
        assert worked(*words, ".", cwd=here)["images"] == []
        assert planned(*words, ".", cwd=here)["images"] == []
        assert addcow("farm", *words, ".", cwd=here).status == 0


# ---- flatten ----


@pytest.mark.long
@pytest.mark.parametrize("turn", range(2))
def test_farm_flatten_handles_random_trees(here: Path, turn: int) -> None:
    grown = grow(here, f"{SEED}-{turn}")
    before, flat = grown.views(), {name for name in grown.stands if is_flat(here / name)}
    report = worked("flatten", ".", cwd=here)
    told = {name: one["state"] for name, one in by_name(report).items()}
    assert told == {name: "nothing-to-do" if name in flat else "done" for name in grown.stands}
    assert grown.views() == before
    for name in grown.stands:
        assert is_flat(here / name)
        assert (here / name).with_suffix(".raw").read_bytes() == before[name]
    assert_nothing_is_left("flatten", ".", cwd=here)


@pytest.mark.long
def test_farm_discard_leaves_only_raw_files(here: Path, tmp_path: Path) -> None:
    grown = grow(here, SEED)
    before, bases = grown.views(), {name: snapshot(here)[name] for name in grown.bases}
    (tmp_path / "view.raw").touch()
    report = worked("flatten", "--discard", ".", cwd=here)
    assert set(states(report).values()) == {"done"}
    assert list(here.rglob("*.add-cow")) == []
    for name in grown.stands:
        (tmp_path / "view.raw").write_bytes(before[name])
        disk = (here / name).with_suffix(".raw")
        same_content("view.raw", str(disk), cwd=tmp_path)
        assert disk.stat().st_size == len(before[name])
    assert {name: snapshot(here)[name] for name in grown.bases} == bases
    with untouched(here):
        assert worked("flatten", "--discard", ".", cwd=here)["images"] == []


@pytest.mark.long
def test_farm_discard_removes_overlays_that_are_flat(here: Path) -> None:
    chain(here)
    worked("flatten", ".", cwd=here)
    assert set(states(planned("flatten", "--discard", ".", cwd=here)).values()) == {"ready"}
    assert set(states(worked("flatten", "--discard", ".", cwd=here)).values()) == {"done"}
    assert set(snapshot(here)) == {"vm.img", "vm-mid.raw", "vm-top.raw"}
    assert (look(here / "vm-mid.raw"), look(here / "vm-top.raw")) == ("APCD", "APX0")


def miss_image(path: Path) -> None:
    path.with_suffix(".raw").unlink()


def damage(path: Path) -> None:
    put(path, 24, b"\xff")


@pytest.mark.long
@pytest.mark.parametrize("harm", [miss_image, damage])
def test_farm_discard_keeps_the_backing_of_an_unflattened_child(
    here: Path, harm: Callable[[Path], None]
) -> None:
    chain(here)
    chain(here, "other")
    over(here, "vm-twin", "vm-mid", "T---")
    harm(here / "vm-top.add-cow")
    # That these would be refused is known before anything is done.
    wanted = {"vm-top": "refused", "vm-mid": "refused", "vm-twin": "done"}
    wanted |= {"other-top": "done", "other-mid": "done"}
    plan = states(planned("flatten", "--discard", ".", cwd=here))
    assert plan == {name: one.replace("done", "ready") for name, one in wanted.items()}
    report = worked("flatten", "--discard", ".", cwd=here, status=1)
    assert states(report) == wanted
    assert "vm-top.add-cow" in problem(report, "vm-mid")
    assert {path.name for path in here.glob("*.add-cow")} == {"vm-top.add-cow", "vm-mid.add-cow"}
    assert guest_picture(here / "vm-mid.add-cow") == "APCD"
    assert look(here / "vm-twin.raw") == "TPCD"
    assert look(here / "other-top.raw") == "APX0"


def test_farm_flatten_flattens_the_backing_of_a_refused_overlay(here: Path) -> None:
    chain(here)
    miss_image(here / "vm-top.add-cow")
    report = worked("flatten", ".", cwd=here, status=1)
    assert states(report) == {"vm-top": "refused", "vm-mid": "done"}
    assert look(here / "vm-mid.raw") == "APCD"


def test_farm_discard_keeps_files_that_unnamed_overlays_need(here: Path) -> None:
    chain(here)
    with untouched(here):
        report = worked("flatten", "--discard", "vm-mid.add-cow", cwd=here, status=1)
    assert states(report) == {"vm-mid": "refused"}
    assert "vm-top.add-cow" in problem(report, "vm-mid")


@pytest.mark.long
def test_farm_discard_keeps_the_backing_of_a_failed_child(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_raw(here / "base.img", "A" * 64)
    draw(here / "mid.add-cow", "-" * 32 + "P" * 32)
    over(here, "top", "mid", "X" + "-" * 63)
    single(here, "other")
    # Of these, only top has to write there.
    broken = rule("image_write", cluster=50)
    with faults(monkeypatch, tmp_path / "rules", broken):
        report = worked("flatten", "--discard", ".", cwd=here, status=1)
    told = states(report)
    assert (told["top"], told["other"]) == ("failed", "done")
    assert told["mid"] in ("refused", "failed", "not-begun")
    assert {path.name for path in here.glob("*.add-cow")} == {"top.add-cow", "mid.add-cow"}
    assert guest_picture(here / "mid.add-cow") == "A" * 32 + "P" * 32
    assert guest_picture(here / "top.add-cow") == "X" + "A" * 31 + "P" * 32
    worked("flatten", "--discard", ".", cwd=here)
    assert look(here / "top.raw") == "X" + "A" * 31 + "P" * 32
    assert look(here / "mid.raw") == "A" * 32 + "P" * 32
    assert list(here.glob("*.add-cow")) == []


# ---- the plan ----


PLANS = [("commit",), ("commit", "--force"), ("flatten",), ("flatten", "--discard")]


def without_free(report: dict[str, Any]) -> dict[str, Any]:
    """Others take and give space on the same disk meanwhile."""
    disks = [{**disk, "free": None} for disk in report["filesystems"]]
    return {**report, "filesystems": disks}


@pytest.mark.parametrize("words", PLANS, ids=" ".join)
def test_farm_plan_equals_dry_run_and_the_job_follows_it(
    here: Path, words: tuple[str, ...]
) -> None:
    grown = grow(here, SEED)
    plan = planned(*words, ".", cwd=here)
    with untouched(here):
        dry = succeed("farm", *words, "--dry-run", "--output", "json", ".", cwd=here).json
    assert without_free(dry) == without_free(plan)
    place = {name: number for number, name in enumerate(by_name(plan))}
    assert set(place) == set(grown.stands)
    for name, below in grown.stands.items():
        assert below not in place or place[name] < place[below]
    ready = {name: state.replace("ready", "done") for name, state in states(plan).items()}
    status = 1 if "refused" in ready.values() else 0
    assert states(worked(*words, ".", cwd=here, status=status)) == ready


@pytest.mark.long
def test_farm_plan_with_refusals_exits_with_0(here: Path) -> None:
    siblings(here)
    single(here, "bad")
    (here / "bad.img").unlink()
    plan = planned("commit", ".", cwd=here)
    told = {"one": "refused", "two": "refused", "up": "ready", "bad": "refused"}
    assert states(plan) == told
    assert "bad.img" in problem(plan, "bad")
    with untouched(here):
        for words in (("plan", "commit"), ("commit", "--dry-run")):
            said = succeed("farm", *words, ".", cwd=here)
            assert all(f"{name}.add-cow" in said.said for name in told)


@pytest.mark.long
@pytest.mark.parametrize(
    ("operation", "base", "top", "needed", "freed"),
    [
        ("commit", "A---", "-XY-", 2, 2),
        ("commit", "AB--", "-XY-", 1, 2),
        ("commit", "A", "-X-Y", 2, 2),
        ("commit", "ABCD", "XY--", 0, 2),
        ("flatten", "AB-D", "X---", 2, 0),
        ("flatten", "ABCD", "Xb--", 2, 0),
        ("flatten", "----", "X---", 0, 0),
    ],
)
def test_farm_plan_states_the_exact_space_of_one_overlay(
    here: Path, operation: str, base: str, top: str, needed: int, freed: int
) -> None:
    path = single(here, "vm", base, top)
    target = here / "vm.img" if operation == "commit" else path.with_suffix(".raw")
    taken = -stored_bytes(target)
    plan = planned(operation, ".", cwd=here)
    (one,) = plan["images"]
    assert (here / one["target"]).samefile(target)
    space = {key: one[f"space-{key}"] for key in ("needed", "kept", "freed")}
    wanted = {"needed": needed, "kept": needed, "freed": freed}
    assert space == {key: count * CLUSTER for key, count in wanted.items()}
    (disk,) = plan["filesystems"]
    assert disk["peak"] == needed * CLUSTER
    assert disk["free"] > 0
    if operation == "flatten":
        assert disk["kept"] == needed * CLUSTER
    worked(operation, ".", cwd=here)
    taken += stored_bytes(target)
    assert taken == needed * CLUSTER


def test_farm_plan_states_an_upper_bound_for_a_chain(here: Path) -> None:
    draw_raw(here / "base.img", "A---")
    draw(here / "mid.add-cow", "-P--", "base.img")
    over(here, "top", "mid", "--X-")
    plan = planned("commit", ".", cwd=here)
    told = by_name(plan)
    assert told["top.add-cow"]["space-needed"] == CLUSTER
    # Both of its own and of what it receives go into holes of the base; no more is there.
    assert 2 * CLUSTER <= told["mid.add-cow"]["space-needed"] <= 4 * CLUSTER
    (disk,) = plan["filesystems"]
    assert 2 * CLUSTER <= disk["peak"] <= 5 * CLUSTER
    assert plan["summary"]["bytes"] >= 2 * CLUSTER


@pytest.mark.long
def test_farm_plan_states_the_bytes_to_move(here: Path) -> None:
    for name in many(here, 3):
        assert (here / f"{name}.add-cow").exists()
    plan = planned("commit", ".", cwd=here)
    assert [one["bytes"] for one in plan["images"]] == [2 * CLUSTER] * 3
    assert plan["summary"]["bytes"] == worked("commit", ".", cwd=here)["summary"]["bytes-moved"]


# ---- what they print ----


def test_farm_jsonl_has_a_line_for_each_image_and_a_summary(here: Path) -> None:
    siblings(here)
    single(here, "idle", "AB", "--")
    result = addcow("farm", "commit", "--output", "jsonl", ".", cwd=here)
    assert result.status == 1
    *images, last = map(json.loads, result.stdout.splitlines())
    assert {one["filename"]: one["state"] for one in images} == {
        "./one.add-cow": "refused",
        "./two.add-cow": "refused",
        "./up.add-cow": "done",
        "./idle.add-cow": "nothing-to-do",
    }
    assert set(last) == {"summary"}
    assert (last["summary"]["done"], last["summary"]["refused"]) == (1, 2)


@BOTH
def test_farm_job_prints_a_line_for_each_image(here: Path, operation: str) -> None:
    names = many(here, 3)
    draw(here / "idle.add-cow", "XY", "", compatible=ALL_ALLOCATED)
    single(here, "bad")
    (here / "bad.raw").unlink()
    result = addcow("farm", operation, ".", cwd=here)
    assert result.status == 1
    for name in (*names, "idle"):
        (line,) = (line for line in result.lines if f"{name}.add-cow" in line)
    (line,) = result.stderr.splitlines()
    assert line.startswith("addcow: refused: ")
    assert "bad.raw" in line


@pytest.mark.long
def test_farm_job_prints_a_line_for_a_failure(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide(here)
    with faults(monkeypatch, tmp_path / "rules", rule("backing_write", cluster=51)):
        result = addcow("farm", "commit", ".", cwd=here)
    assert result.status == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("addcow: failed: ")
    assert "bad.add-cow" in line
    assert "Input/output error" in line


@pytest.mark.long
@BOTH
def test_farm_job_with_quiet_prints_only_errors(here: Path, operation: str) -> None:
    single(here, "fine")
    single(here, "bad")
    (here / "bad.raw").unlink()
    result = addcow("farm", operation, "-q", ".", cwd=here)
    assert (result.status, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("addcow: refused: ")
    (here / "bad.add-cow").unlink()
    assert succeed("farm", operation, "-q", ".", cwd=here).said == ""


EVIL = ("o\nne", "addcow: failed\naddcow: failed: x", "\x1b[2J\rtwo", "th\x9bree\x7f", "a\u202eb")


def many_called(here: Path, names: tuple[str, ...]) -> None:
    """Make overlays of which some are done, some are refused, and some have nothing to do."""
    here.mkdir()
    for number, name in enumerate(names):
        for kind in ("", ".bad", ".idle"):
            called = f"{number}{name}{kind}"
            content = overlay_bytes(
                image=f"./{called}.raw",  # without the dot, a colon means a protocol
                size=3 * CLUSTER,
                backing=f"./{called}.img" if kind != ".idle" else "",
                compatible=ALL_ALLOCATED if kind == ".idle" else 0,
                local=[1],
            )
            (here / f"{called}.add-cow").write_bytes(content)
            draw_raw(here / f"{called}.raw", "-X-")
            if kind != ".bad":
                draw_raw(here / f"{called}.img", "ABC")


@pytest.mark.long
@pytest.mark.parametrize(
    "words", [("plan", "commit"), ("commit", "-p"), ("flatten",)], ids=" ".join
)
def test_file_name_cannot_forge_lines_of_a_farm_job(tmp_path: Path, words: tuple[str, ...]) -> None:
    lines = []
    for number, names in enumerate((("one", "two", "three", "four", "five"), EVIL)):
        many_called(tmp_path / f"farm{number}", names)
        result = addcow("farm", *words, ".", cwd=tmp_path / f"farm{number}")
        assert result.status == (0 if words[0] == "plan" else 1)
        assert CONTROL.search(result.said) is None
        errors = [line for line in result.stderr.splitlines() if line.startswith("addcow: ")]
        lines.append((len(result.stdout.split("\n")), len(errors)))
        if "-p" not in words:
            assert len(errors) == result.stderr.count("\n")
    assert lines[0] == lines[1]


def test_name_inside_an_image_cannot_forge_a_line_of_a_farm_job(here: Path) -> None:
    content = overlay_bytes(image="gone\naddcow: failed: me\x1b[2J", size=CLUSTER, backing="vm.img")
    single(here, "vm")
    (here / "bad.add-cow").write_bytes(content)
    result = addcow("farm", "flatten", ".", cwd=here)
    (line,) = result.stderr.splitlines()
    assert line.startswith("addcow: refused: ")
    assert CONTROL.search(result.said) is None


def test_farm_job_warns_of_unsafe_once(here: Path) -> None:
    many(here, 5)
    result = succeed("farm", "commit", "-t", "unsafe", "--jobs", "2", ".", cwd=here)
    (line,) = result.stderr.splitlines()
    assert "unsafe" in line
    assert look(here / "vm00.img") == "AXY0"


# ---- one that fails, fails alone ----


def lose_backing(path: Path) -> None:
    path.with_suffix(".img").unlink()


def cut_off(path: Path) -> None:
    os.truncate(path, 50)


def cut_bitmap(path: Path) -> None:
    os.truncate(path, CLUSTER)


def bite_tail(path: Path) -> None:
    draw(path, "X---", path.name, backing_format="add-cow")


def lead_out(path: Path) -> None:
    path.with_suffix(".img").rename(path.parent.parent / "outside.img")
    draw(path, "-XY-", "../outside.img")


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "damaged": (damage, "bad.add-cow"),
    "cut off": (cut_off, "bad.add-cow"),
    "bitmap cut": (cut_bitmap, "bad.add-cow"),
    "image missing": (miss_image, "bad.raw"),
    "backing missing": (lose_backing, "bad.img"),
    "cycle": (bite_tail, "bad.add-cow"),
    "outside": (lead_out, "outside.img"),
}


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("harm", HARMS)
def test_farm_job_refuses_a_damaged_image_and_does_the_others(
    here: Path, operation: str, harm: str
) -> None:
    many(here, 3)
    chain(here)
    harming, told = HARMS[harm]
    harming(single(here, "bad"))
    before = snapshot(here)
    report = worked(operation, ".", cwd=here, status=1)
    others = [state for name, state in states(report).items() if name != "bad"]
    assert others == ["done"] * 5
    assert states(report)["bad"] == "refused"
    assert told in problem(report, "bad")
    after = snapshot(here)
    assert {name: after[name] for name in after if name.startswith("bad")} == {
        name: before[name] for name in before if name.startswith("bad")
    }


def test_farm_job_needs_root_for_an_outside_image(here: Path) -> None:
    path = single(here, "vm")
    lead_out(path)
    assert states(worked("commit", ".", cwd=here, status=1)) == {"vm": "refused"}
    assert states(worked("commit", "--root", "..", ".", cwd=here)) == {"vm": "done"}
    assert look(here.parent / "outside.img") == "AXY0"


def test_farm_commit_refuses_overlays_of_a_damaged_backing(here: Path) -> None:
    chain(here)
    chain(here, "other")
    damage(here / "vm-mid.add-cow")
    report = worked("commit", ".", cwd=here, status=1)
    told = {"vm-top": "refused", "vm-mid": "refused", "other-top": "done", "other-mid": "done"}
    assert states(report) == told
    assert "vm-mid.add-cow" in problem(report, "vm-top")
    assert look(here / "vm.img") == "ABCD"


@BOTH
@IN_OTHERS_AND_HERE
def test_farm_job_refuses_an_image_in_use_and_does_the_others(
    here: Path, operation: str, jobs: str
) -> None:
    names = many(here, 3)
    path = single(here, "bad")
    with held(here / "bad.raw"):
        plan = planned(operation, ".", cwd=here)
        assert states(plan) == {**dict.fromkeys(names, "ready"), "bad": "refused"}
        report = worked(operation, "--jobs", jobs, ".", cwd=here, status=1)
        assert states(report) == {**dict.fromkeys(names, "done"), "bad": "refused"}
        assert "in use" in problem(report, "bad")
        assert "qemu-io" in problem(report, "bad")
    assert guest_picture(path) == "AXY0"
    report = worked(operation, "--jobs", jobs, ".", cwd=here)
    assert states(report) == {**dict.fromkeys(names, "nothing-to-do"), "bad": "done"}
    assert guest_picture(path) == "AXY0"


@pytest.mark.long
def test_farm_commit_does_what_a_guest_on_the_base_allows(here: Path) -> None:
    chain(here)
    with held(here / "vm.img", "-r"):
        report = worked("commit", ".", cwd=here, status=1)
        assert states(report) == {"vm-top": "done", "vm-mid": "refused"}
        assert "in use" in problem(report, "vm-mid")
        assert look(here / "vm.img") == "ABCD"
        assert guest_picture(here / "vm-mid.add-cow") == "APX0"
    assert states(worked("commit", ".", cwd=here)) == {"vm-top": "nothing-to-do", "vm-mid": "done"}
    assert look(here / "vm.img") == "APX0"


@pytest.mark.long
def test_on_error_stop_begins_nothing_after_a_refusal(here: Path) -> None:
    names = many(here, 4)
    miss_image(single(here, "bad"))
    with untouched(here):
        report = worked("commit", "--on-error", "stop", ".", cwd=here, status=1)
    assert states(report) == {**dict.fromkeys(names, "not-begun"), "bad": "refused"}
    report = worked("commit", "--on-error", "skip", ".", cwd=here, status=1)
    assert states(report) == {**dict.fromkeys(names, "done"), "bad": "refused"}


def test_on_error_stop_does_all_images_without_errors(here: Path) -> None:
    names = many(here, 4)
    report = worked("commit", "--on-error", "stop", ".", cwd=here)
    assert states(report) == dict.fromkeys(names, "done")


# ---- faults ----


def wide(here: Path) -> None:
    """Make four small overlays, and bad, which alone has a cluster with the number 50."""
    many(here, 4)
    single(here, "bad", "A" * 64, "-X" * 32)


WRITES = {"commit": "backing_write", "flatten": "image_write"}
WIDE_VIEW = "AX" * 32


@pytest.mark.long
@BOTH
@IN_OTHERS_AND_HERE
def test_farm_job_error_fails_only_its_image(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, jobs: str
) -> None:
    wide(here)
    place = 50 if operation == "flatten" else 51
    broken = rule(WRITES[operation], cluster=place)
    with faults(monkeypatch, tmp_path / "rules", broken):
        report = worked(operation, "--jobs", jobs, ".", cwd=here, status=1)
    others = {f"vm{number:02}": "done" for number in range(4)}
    assert states(report) == {**others, "bad": "failed"}
    told = problem(report, "bad")
    assert "Input/output error" in told
    assert ("bad.img" if operation == "commit" else "bad.raw") in told
    assert guest_picture(here / "bad.add-cow") == WIDE_VIEW
    report = worked(operation, "--jobs", jobs, ".", cwd=here)
    assert states(report) == {**dict.fromkeys(others, "nothing-to-do"), "bad": "done"}
    assert guest_picture(here / "bad.add-cow") == WIDE_VIEW
    assert look(here / ("bad.img" if operation == "commit" else "bad.raw")) == WIDE_VIEW


@pytest.mark.long
def test_farm_job_failed_top_does_not_harm_its_chain(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_raw(here / "base.img", "A" * 64)
    draw(here / "mid.add-cow", "P" * 32 + "-" * 32)
    over(here, "top", "mid", "-X" * 32)
    seen = "PX" * 16 + "AX" * 16
    # Bits of top are cleared after its data has come down into mid: the first sync is its own.
    with faults(monkeypatch, tmp_path / "rules", rule("image_read", cluster=51)):
        report = worked("commit", ".", cwd=here, status=1)
    assert states(report)["top"] == "failed"
    assert guest_picture(here / "top.add-cow") == seen
    worked("commit", ".", cwd=here)
    assert look(here / "base.img") == seen
    assert all(is_committed(here / f"{name}.add-cow") for name in ("top", "mid"))


@IN_OTHERS_AND_HERE
def test_on_error_stop_begins_nothing_after_a_failure(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    names = many(here, 60)
    with faults(monkeypatch, tmp_path / "rules", rule("backing_write", once="on")):
        words = ("--on-error", "stop", "--jobs", jobs, ".")
        report = worked("commit", *words, cwd=here, status=1)
    told = Counter(states(report).values())
    assert told["failed"] == 1
    assert set(told) <= {"failed", "done", "not-begun"}
    if jobs == "0":
        assert told["not-begun"] == 59
    assert told["not-begun"] > 0
    for name, state in states(report).items():
        path = here / f"{name}.add-cow"
        assert guest_picture(path) == "AXY0"
        assert state != "not-begun" or bits(path) == ".11."
    worked("commit", ".", cwd=here)
    assert all(look(here / f"{name}.img") == "AXY0" for name in names)


@pytest.mark.long
@IN_OTHERS_AND_HERE
def test_stopped_farm_job_continues_with_the_same_command(
    here: Path, tmp_path: Path, jobs: str
) -> None:
    names = many(here, 80)  # more than the groups of images that are done side by side
    processes = max(1, int(jobs))
    # One rule for each process that works: none does more while this test looks.
    each = [rule("backing_write", "stop", after=2, once="on") for _ in range(processes)]
    rules = Rules.write(tmp_path / "rules", *each)
    words = ("farm", "commit", "--output", "json", "--jobs", jobs, ".")
    with running(*words, cwd=here, rules=rules) as job:
        stopped = job.stopped(processes)
        job.signal(signal.SIGTERM)
        job.signal(signal.SIGCONT, *stopped)
        ended = job.end()
    assert ended.status == TERMINATED
    assert len(ended.stderr.splitlines()) == 1
    told = Counter(states(json.loads(ended.stdout)).values())
    assert set(told) <= {"done", "stopped", "not-begun"}
    assert told["not-begun"] > 0
    for name in names:
        assert guest_picture(here / f"{name}.add-cow") == "AXY0"
    worked("commit", ".", cwd=here)
    assert all(look(here / f"{name}.img") == "AXY0" for name in names)
    assert_nothing_is_left("commit", ".", cwd=here)


@pytest.mark.long
def test_farm_discard_keeps_the_backing_of_an_undiscarded_overlay(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(here)
    with faults(monkeypatch, tmp_path / "rules", rule("discard", once="on")) as rules:
        report = worked("flatten", "--discard", "--jobs", "1", ".", cwd=here, status=1)
        assert rules.struck
    assert states(report)["vm-top"] == "failed"
    assert {path.name for path in here.glob("*.add-cow")} == {"vm-top.add-cow", "vm-mid.add-cow"}
    assert guest_picture(here / "vm-top.add-cow") == "APX0"
    worked("flatten", "--discard", ".", cwd=here)
    assert list(here.glob("*.add-cow")) == []
    assert look(here / "vm-top.raw") == "APX0"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of four MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    done = ran(mount)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@IN_OTHERS_AND_HERE
def test_farm_job_refuses_an_image_that_does_not_fit_and_does_the_others(
    small: Path, jobs: str
) -> None:
    names = many(small, 3)
    large = single(small, "large", "A" * 20, "-" * 19 + "X")
    with (small / "filler").open("wb") as filler:
        filler.write(b"f" * (2 * MiB - 15 * CLUSTER))
    report = worked("flatten", "--jobs", jobs, ".", cwd=small, status=1)
    told = states(report)
    assert told.pop("large") in ("refused", "failed")
    assert told == dict.fromkeys(names, "done")
    assert "space" in problem(report, "large")
    assert guest_picture(large) == "A" * 19 + "X"
    (small / "filler").unlink()
    assert states(worked("flatten", "--jobs", jobs, ".", cwd=small))["large"] == "done"
    assert look(small / "large.raw") == "A" * 19 + "X"


@pytest.mark.long
def test_two_farm_jobs_on_one_farm_do_no_harm(here: Path, tmp_path: Path) -> None:
    names = many(here, 6)
    rules = Rules.write(tmp_path / "rules", rule("backing_write", "stop", after=1, once="on"))
    with running("farm", "commit", "--jobs", "1", ".", cwd=here, rules=rules) as first:
        (stopped,) = first.stopped()
        told = Counter(states(worked("commit", ".", cwd=here, status=1)).values())
        assert 1 <= told["refused"] < len(names)
        assert set(told) <= {"refused", "done", "nothing-to-do"}
        first.signal(signal.SIGCONT, stopped)
        assert first.end().status == 0
    for name in names:
        assert look(here / f"{name}.img") == "AXY0"
        assert is_committed(here / f"{name}.add-cow")


# ---- processes ----


@pytest.mark.long
@pytest.mark.parametrize("words", PLANS, ids=" ".join)
def test_number_of_processes_does_not_change_a_farm_job(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    outcomes = []
    for number in ("0", "1", "2", "5", ""):
        here = tmp_path / f"farm{number}"
        here.mkdir()
        grow(here, SEED)
        jobs = ("--jobs", number) if number else ()
        result = addcow("farm", *words, "--output", "json", *jobs, ".", cwd=here)
        told = {one["filename"]: one["state"] for one in result.json["images"]}
        outcomes.append((result.status, told, snapshot(here)))
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_farm_job_splits_a_large_image_among_processes(here: Path, tmp_path: Path) -> None:
    count = 300
    (here / "big").mkdir()
    with (here / "big" / "base.img").open("wb") as base:
        base.truncate(count * MiB)
    with (here / "big" / "top.raw").open("wb") as image:
        for number in range(count):
            image.write(numbered(number))
    content = overlay_bytes(
        image="top.raw", size=count * MiB, backing="base.img", local=range(count * 16)
    )
    (here / "big" / "top.add-cow").write_bytes(content)
    names = many(here, 20)
    rules = Rules.write(tmp_path / "rules", rule("backing_write", "stop"))
    with running("farm", "commit", "--jobs", "2", "big", cwd=here, rules=rules) as job:
        job.stopped(2)
    report = worked("commit", "--jobs", "2", ".", cwd=here)
    assert states(report) == {**dict.fromkeys(names, "done"), "big/top": "done"}
    with (here / "big" / "base.img").open("rb") as base:
        assert all(base.read(MiB) == numbered(number) for number in range(count))
        assert base.read() == b""
    assert is_committed(here / "big" / "top.add-cow")
    assert all(look(here / f"{name}.img") == "AXY0" for name in names)


def numbered(number: int) -> bytes:
    return struct.pack("<I", number + 1) * (MiB // 4)


# ---- limits ----


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("limit", ["0.000001", "0s"])
def test_time_limit_of_zero_begins_nothing(here: Path, operation: str, limit: str) -> None:
    names = many(here, 3)
    words = ("farm", operation, "--output", "json", "--time-limit", limit, ".")
    with untouched(here):
        result = addcow(*words, cwd=here)
    assert result.status == LIMIT_REACHED
    assert states(result.json) == dict.fromkeys(names, "not-begun")
    (line,) = result.stderr.splitlines()
    assert line.startswith("addcow: ")
    assert states(worked(operation, ".", cwd=here)) == dict.fromkeys(names, "done")


def test_time_limit_leaves_the_remaining_images(here: Path) -> None:
    """At this rate it would take ten seconds; how much is done in one is left to chance."""
    names = many(here, 20)
    words = ("--time-limit", "1s", "-r", "256k", "--jobs", "2", ".")
    report = worked("commit", *words, cwd=here, status=LIMIT_REACHED)
    told = states(report)
    assert set(told.values()) <= {"done", "stopped", "not-begun"}
    assert "not-begun" in told.values()
    for name in names:
        assert guest_picture(here / f"{name}.add-cow") == "AXY0"
        assert told[name] != "done" or is_committed(here / f"{name}.add-cow")
    again = states(worked("commit", ".", cwd=here))
    for name in names:
        assert again[name] != ("done" if told[name] == "done" else "nothing-to-do") or (
            told[name] == "stopped"
        )
        assert look(here / f"{name}.img") == "AXY0"


def test_time_limit_that_is_not_reached_does_all_images(here: Path) -> None:
    names = many(here, 3)
    report = worked("commit", "--time-limit", "2h", ".", cwd=here)
    assert states(report) == dict.fromkeys(names, "done")


@pytest.mark.long
def test_rate_limit_applies_to_all_processes_together(here: Path) -> None:
    names = [f"vm{number}" for number in range(12)]
    for name in names:
        single(here, name)
    begun = time.monotonic()
    report = worked("commit", "-r", "1M", "--jobs", "2", ".", cwd=here)
    # Each worker may have moved one step before it keeps back.
    assert time.monotonic() - begun >= 1.2
    assert report["summary"]["bytes-moved"] == 1.5 * MiB
    assert all(look(here / f"{name}.img") == "AXY0" for name in names)


# ---- progress ----


def assert_is_progress(text: str, images: int) -> None:
    """Insist on JSON lines that go up to the end."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(set(one) == IN_PROGRESS for one in lines)
    for key in ("images-done", "bytes-done", "seconds"):
        assert [one[key] for one in lines] == sorted(one[key] for one in lines)
    assert all(one["images-done"] <= one["images"] for one in lines)
    assert (lines[-1]["images-done"], lines[-1]["images"]) == (images, images)


VERBS = pytest.mark.parametrize("verb", ["commit", "flatten", "check"])


@VERBS
@IN_OTHERS_AND_HERE
def test_farm_job_progress_is_json_on_stderr(here: Path, verb: str, jobs: str) -> None:
    many(here, 6)
    result = succeed("farm", verb, "--progress-format", "json", "--jobs", jobs, ".", cwd=here)
    assert_is_progress(result.stderr, 6)


@VERBS
def test_farm_job_progress_goes_to_a_descriptor(here: Path, verb: str) -> None:
    many(here, 6)
    ours, theirs = os.pipe()
    with open(ours, encoding="utf-8") as told:
        words = ("farm", verb, "--progress-fd", str(theirs), "--jobs", "2", ".")
        result = addcow_with(*words, cwd=here, descriptors=(theirs,))
        os.close(theirs)
        assert (result.status, result.stderr) == (0, "")
        assert_is_progress(told.read(), 6)


@VERBS
def test_closed_progress_descriptor_is_a_usage_error(here: Path, verb: str) -> None:
    many(here, 2)
    with untouched(here):
        line = refused("farm", verb, "--progress-fd", str(CLOSED), ".", cwd=here, status=USAGE)
    assert str(CLOSED) in line


@VERBS
def test_progress_pipe_without_a_reader_does_no_harm(here: Path, verb: str) -> None:
    names = many(here, 6)
    ours, theirs = os.pipe()
    os.close(ours)
    words = ("farm", verb, "--progress-fd", str(theirs), "--output", "json", ".")
    result = addcow_with(*words, cwd=here, descriptors=(theirs,))
    os.close(theirs)
    assert result.status == 0, result
    if verb != "check":
        assert states(result.json) == dict.fromkeys(names, "done")


@VERBS
def test_farm_job_progress_without_a_terminal_is_lines(here: Path, verb: str) -> None:
    many(here, 6)
    result = succeed("farm", verb, "-p", ".", cwd=here)
    lines = result.stderr.splitlines()
    assert lines
    assert all("images" in line for line in lines)
    assert CONTROL.search(result.said) is None


@pytest.mark.long
def test_progress_of_an_empty_farm_reaches_its_end(here: Path) -> None:
    many(here, 3)
    worked("commit", ".", cwd=here)
    result = succeed("farm", "commit", "--progress", "json", ".", cwd=here)
    assert_is_progress(result.stderr, 3)


def test_progress_counts_refused_images(here: Path) -> None:
    many(here, 3)
    miss_image(single(here, "bad"))
    words = ("farm", "commit", "--progress", "json", "--output", "json", ".")
    result = addcow(*words, cwd=here)
    assert result.status == 1
    last = json.loads([line for line in result.stderr.splitlines() if line.startswith("{")][-1])
    assert last["images-done"] == last["images"]


# ---- the log ----


def logged(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log: all objects, in the order of time."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert all({"time", "event"} <= set(one) for one in lines)
    assert all("filename" in one for one in lines if one["event"].startswith("image-"))
    assert [one["time"] for one in lines] == sorted(one["time"] for one in lines)
    return lines


def events(log: Path, name: str) -> list[str]:
    """Return what happened to an image."""
    return [one["event"] for one in logged(log) if one.get("filename") == f"./{name}.add-cow"]


def test_farm_log_has_every_event(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide(here)
    single(here, "idle", "AB", "--")
    miss_image(single(here, "gone"))
    log = tmp_path / "log"
    with faults(monkeypatch, tmp_path / "rules", rule("backing_write", cluster=51)):
        worked("commit", "--jobs", "2", "--log", str(log), ".", cwd=here, status=1)
    told = [one["event"] for one in logged(log)]
    assert (told[0], told[-1]) == ("farm-begun", "farm-ended")
    assert Counter(told) == {
        "farm-begun": 1,
        "image-begun": 5,
        "image-done": 4,
        "image-failed": 1,
        "image-refused": 1,
        "image-idle": 1,
        "farm-ended": 1,
    }
    assert events(log, "vm00") == ["image-begun", "image-done"]
    assert events(log, "bad") == ["image-begun", "image-failed"]
    assert events(log, "gone") == ["image-refused"]
    assert events(log, "idle") == ["image-idle"]
    before = log.read_bytes()
    worked("commit", "--log", str(log), ".", cwd=here, status=1)
    assert log.read_bytes().startswith(before)
    again = [one["event"] for one in logged(log)][len(told) :]
    assert (again[0], again[-1]) == ("farm-begun", "farm-ended")
    assert again.count("image-done") == 1


def test_farm_log_has_the_remaining_images(here: Path, tmp_path: Path) -> None:
    many(here, 2)
    log = tmp_path / "log"
    words = ("--time-limit", "0s", "--log", str(log), ".")
    worked("commit", *words, cwd=here, status=LIMIT_REACHED)
    told = [one["event"] for one in logged(log)]
    assert told == ["farm-begun", "image-left", "image-left", "farm-ended"]


def test_farm_log_has_whole_names_on_one_line(here: Path, tmp_path: Path) -> None:
    name = "o\nne\x1b[2J"
    single(here, name)
    log = tmp_path / "log"
    worked("commit", "--log", str(log), ".", cwd=here)
    assert events(log, name) == ["image-begun", "image-done"]


@pytest.mark.parametrize("name", ["nowhere/log", "."])
def test_farm_log_that_cannot_be_opened_is_an_error(here: Path, tmp_path: Path, name: str) -> None:
    many(here, 2)
    with untouched(here):
        refused("farm", "commit", "--log", str(tmp_path / name), ".", cwd=here)


# ---- places and words ----


PLACES: dict[str, tuple[tuple[str, ...], str, set[str]]] = {
    "a directory": (("sub",), "", {"sub/three"}),
    "all": ((".",), "", {"one", "two", "sub/three"}),
    "files": (("one.add-cow", "sub/three.add-cow"), "", {"one", "sub/three"}),
    "a pattern": (("*.add-cow",), "", {"one", "two"}),
    "the same twice": (("one.add-cow", "./one.add-cow", "o*w"), "", {"one"}),
    "stdin": (("--from-file", "-"), "two.add-cow\nsub\n", {"two", "sub/three"}),
    "stdin and words": (("--from-file", "-", "sub"), "one.add-cow\n", {"one", "sub/three"}),
}


@BOTH
@pytest.mark.parametrize("kind", PLACES)
def test_farm_job_does_only_named_images(here: Path, operation: str, kind: str) -> None:
    (here / "sub").mkdir()
    every = [single(here, name) for name in ("one", "two", "sub/three")]
    words, stdin, wanted = PLACES[kind]
    result = succeed("farm", operation, "--output", "json", *words, cwd=here, stdin=stdin)
    assert states(result.json) == dict.fromkeys(wanted, "done")
    for path in every:
        name = str(path.relative_to(here).with_suffix(""))
        done = "...." if operation == "commit" else "1111"
        assert bits(path) == (done if name in wanted else ".11.")


def test_farm_job_does_a_hard_linked_image_once(here: Path) -> None:
    path = single(here, "vm")
    (here / "also.add-cow").symlink_to(path)
    (here / "link.add-cow").symlink_to(path.name)
    report = worked("commit", ".", "vm.add-cow", str(here), cwd=here)
    assert [one["state"] for one in report["images"]] == ["done"]
    assert look(here / "vm.img") == "AXY0"


@pytest.mark.long
def test_farm_job_reads_names_from_a_file(here: Path) -> None:
    many(here, 3)
    (here / "list").write_text("vm00.add-cow\nvm02.add-cow\n")
    told = states(planned("commit", "--from-file", "list", cwd=here))
    assert told == {"vm00": "ready", "vm02": "ready"}
    assert set(states(worked("commit", "--from-file", "list", cwd=here))) == {"vm00", "vm02"}


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("commit",), USAGE, "name at least one directory or file"),
        (("flatten",), USAGE, "name at least one directory or file"),
        (("plan", "commit"), USAGE, "name at least one directory or file"),
        (("plan", "sideways", "."), USAGE, "sideways"),
        (("commit", "--discard", "."), USAGE, "--discard"),
        (("commit", "--on-error", "weep", "."), USAGE, "--on-error"),
        (("commit", "--progress-format", "morse", "."), USAGE, "--progress-format"),
        (("commit", "--progress-fd", "-1", "."), USAGE, "--progress-fd"),
        (("commit", "--time-limit", "2x", "."), USAGE, "2x"),
        (("commit", "--time-limit", "-1", "."), USAGE, "-1"),
        (("commit", "--time-limit", "", "."), USAGE, "time"),
        (("flatten", "--time-limit", "soon", "."), USAGE, "soon"),
        (("commit", "-r", "x", "."), USAGE, "x"),
        (("commit", "--jobs", "-1", "."), USAGE, "--jobs"),
        (("commit", "--output", "yaml", "."), USAGE, "--output"),
        (("flatten", "--no-such", "."), USAGE, "--no-such"),
        (("commit", "nowhere"), 1, "nowhere: no such file or directory"),
        (("flatten", "*.nothing"), 1, "*.nothing: no such file or directory"),
        (("commit", "--from-file", "nowhere"), 1, "nowhere: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_invalid_farm_job_options_are_usage_errors(
    here: Path, words: tuple[str, ...], status: int, told: str
) -> None:
    single(here, "vm")
    with untouched(here):
        assert told in refused("farm", *words, cwd=here, status=status)
