"""Tests of `addcow rebase` and `addcow farm rebase`: overlays get another backing file.

A guest sees the same disk before, during and after the job. Only clusters in which the old and the
new backing file differ are copied.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import oracle
from addcow_mp.device.fiemap import places
from addcow_mp.jobs.options import RunOptions
from addcow_mp.jobs.rebase import NewBacking, rebase
from support import model
from support.availability import missing
from support.call_trace import Trace
from support.chains import random_raw, wild_chain
from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    USAGE,
    KiB,
    MiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    look,
    overlay_bytes,
    pair,
    read_header,
    refused,
    same_content,
    snapshot,
    succeed,
    tool,
)
from support.fault_rules import Rules, rule
from support.file_systems import made_disk
from support.powercut import Disk
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

TOP = "top.add-cow"


def content_of(path: Path) -> bytes:
    """What the guest of an overlay sees; of a raw file all of its bytes."""
    return oracle.guest_bytes(str(path)) if path.suffix == ".add-cow" else path.read_bytes()


def changed(rng: random.Random, content: bytes) -> bytes:
    """A new version of a disk: some bytes are changed or zeros, and its length may differ."""
    new = bytearray(content)
    for _ in range(rng.randint(0, 6)):
        at = rng.randrange(max(1, len(new)))
        length = rng.choice([1, 512, 4 * KiB, 70 * KiB])
        fill = rng.choice([b"\0", b"N", b"n"])
        new[at : at + length] = fill * len(new[at : at + length])
    end = rng.choice([0, 0, 0, 1, 512, 5000])
    return bytes(new[: len(new) - end] if rng.random() < 0.5 else new.ljust(len(new) + end, b"N"))


def sparse(path: Path, content: bytes) -> None:
    """Write a file with holes where there are zeros."""
    with path.open("wb") as file:
        for at in range(0, len(content), 4 * KiB):
            part = content[at : at + 4 * KiB]
            if any(part):
                file.seek(at)
                file.write(part)
        file.truncate(len(content))


# One overlay, at random


def new_version(rng: random.Random, here: Path, old: bytes) -> tuple[str, str]:
    """Make the new backing file, a raw file or an overlay; returns its name and its format."""
    content = changed(rng, old)
    if rng.random() < 0.5:
        sparse(here / "new.img", content)
        return "new.img", "raw"
    base = random_raw(rng, max(len(content), 4 * KiB))
    model.build(base, str(here), "below")
    clusters = -(-len(content) // (4 * KiB))
    size = clusters * 4 * KiB
    sparse(here / "over.raw", content.ljust(size, b"\0"))
    allocated = [one for one in range(clusters) if rng.random() < 0.9]
    (here / "new.add-cow").write_bytes(
        overlay_bytes(
            image="over.raw", size=size, backing="below.raw", cluster=4 * KiB, local=allocated
        )
    )
    return "new.add-cow", "add-cow"


def differing(old: bytes, new: bytes, cluster: int, size: int) -> set[int]:
    """The clusters of a disk of ``size`` bytes in which two backing files differ."""
    old, new = (one[:size].ljust(size, b"\0") for one in (old, new))
    return {
        at // cluster
        for at in range(0, size, cluster)
        if old[at : at + cluster] != new[at : at + cluster]
    }


@pytest.mark.sample(5)
@pytest.mark.parametrize("number", range(60))
def test_rebase_shows_the_same_disk_and_copies_only_what_differs(
    tmp_path: Path, rng: random.Random, number: int
) -> None:
    files = model.build(wild_chain(rng, 300 * KiB), str(tmp_path))
    old = b"" if files.backing is None else content_of(Path(files.backing.path))
    name, format_ = new_version(rng, tmp_path, old or bytes(50 * KiB))
    seen, new = oracle.guest_bytes(files.path), content_of(tmp_path / name)
    before, header = set(oracle.allocated(files.path)), oracle.read_header(files.path)
    others = {path: digest for path, digest in snapshot(tmp_path).items() if "top." not in path}
    words: tuple[str, ...] = ("--jobs", rng.choice("012"), "-b", name, "-F", format_)
    if files.backing is not None and rng.random() < 0.3:
        for path in (files.backing.path, name):
            kind = "add-cow" if path.endswith(".add-cow") else "raw"
            succeed("manifest", "create", "-q", "-f", kind, path, cwd=tmp_path)
        words += ("--trust-manifests",)
    succeed("rebase", *words, TOP, cwd=tmp_path)
    assert oracle.guest_bytes(files.path) == seen
    after = set(oracle.allocated(files.path))
    expected = before | differing(old, new, header.cluster_size, len(seen))
    assert expected <= after
    if "--trust-manifests" not in words:  # leaves may be larger than clusters
        assert after == expected
    assert read_header(Path(files.path)).backing == name
    now = snapshot(tmp_path)
    assert {path: now[path] for path in others} == others
    # A job that publishes no bits leaves stray bits in place, and the check reports them.
    assert addcow("check", TOP, cwd=tmp_path).status in ((0, 2, 3) if after == before else (0, 3))
    before_again = snapshot(tmp_path)
    succeed("rebase", "-b", name, "-F", format_, TOP, cwd=tmp_path)
    assert snapshot(tmp_path) == before_again


@pytest.mark.sample(3)
@pytest.mark.parametrize("number", range(20))
def test_rebase_to_nothing_makes_the_overlay_stand_alone(
    tmp_path: Path, rng: random.Random, number: int
) -> None:
    chain = wild_chain(rng, 300 * KiB)
    files = model.build(chain, str(tmp_path))
    seen = oracle.guest_bytes(files.path)
    succeed("rebase", "--jobs", rng.choice("02"), "-b", "", TOP, cwd=tmp_path)
    for path in files.below:
        os.unlink(path)
    assert oracle.guest_bytes(files.path) == seen
    assert Path(files.image).read_bytes()[: len(seen)] == seen
    header = read_header(Path(files.path))
    assert (header.backing, header.backing_format) == ("", "")
    assert header.compatible & ALL_ALLOCATED
    # With ALL_ALLOCATED no bits are published, so stray bits stay.
    expected = 2 if chain.all_allocated and chain.stray and chain.clusters else 0
    assert addcow("check", TOP, cwd=tmp_path).status == expected


@pytest.mark.parametrize("new", ["ABCXEFGH", "ABC", "ABCDEFGHIJ", ""])
def test_rebase_does_what_qemu_img_does(tmp_path: Path, new: str) -> None:
    top = pair(tmp_path, "ABCDEFGH", "-X0-----")
    draw_raw(tmp_path / "new.img", new or "A")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "t.qcow2",
         cwd=tmp_path)  # fmt: skip
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 88 64k 64k", "-c", "write -z 128k 64k",
         "t.qcow2", cwd=tmp_path)  # fmt: skip
    format_ = ("-F", "raw") if new else ()
    name = "new.img" if new else ""
    tool("qemu-img", "rebase", "-q", "-f", "qcow2", "-b", name, *format_, "t.qcow2", cwd=tmp_path)
    succeed("rebase", "-b", name, TOP, cwd=tmp_path)
    succeed("convert", "-q", "-O", "raw", TOP, "ours.raw", cwd=tmp_path)
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "t.qcow2", "theirs.raw", cwd=tmp_path)
    same_content("ours.raw", "theirs.raw", cwd=tmp_path)
    assert guest_picture(top) == "AX0DEFGH"


@pytest.mark.long
def test_rebase_moves_an_overlay_over_its_own_grandparent(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "mid.add-cow", "-M--")
    draw(tmp_path / TOP, "T---", "mid.add-cow", backing_format="add-cow")
    succeed("rebase", "-b", "base.img", "-F", "raw", TOP, cwd=tmp_path)
    assert (bits(tmp_path / TOP), guest_picture(tmp_path / TOP)) == ("11..", "TMCD")
    succeed("rebase", "-b", "mid.add-cow", "-F", "add-cow", TOP, cwd=tmp_path)
    assert (bits(tmp_path / TOP), guest_picture(tmp_path / TOP)) == ("11..", "TMCD")


@pytest.mark.long
def test_rebase_keeps_the_view_of_overlays_above(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X---")
    draw(tmp_path / "up.add-cow", "-U--", TOP, backing_format="add-cow")
    draw_raw(tmp_path / "new.img", "ABZZ")
    succeed("rebase", "-b", "new.img", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / "up.add-cow") == "XUCD"


def test_garbage_is_neither_shown_nor_kept_by_a_rebase(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB-D", "gggg")
    draw_raw(tmp_path / "new.img", "ABCZ")
    succeed("rebase", "-b", "new.img", TOP, cwd=tmp_path)
    assert (bits(top), guest_picture(top)) == ("..11", "AB0D")


def test_all_allocated_overlay_is_renamed_without_its_old_backing_file(tmp_path: Path) -> None:
    draw_raw(tmp_path / "new.img", "ZZ")
    draw(tmp_path / TOP, "XY", "gone.img", compatible=ALL_ALLOCATED)
    succeed("rebase", "-b", "new.img", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / TOP) == "XY"
    assert read_header(tmp_path / TOP).backing == "new.img"


@pytest.mark.long
def test_verify_reads_the_disk_back(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X---")
    (tmp_path / "elsewhere").mkdir()
    draw_raw(tmp_path / "elsewhere" / "new.img", "ABZD")
    told = succeed("rebase", "--verify", "-b", "elsewhere/new.img", TOP, cwd=tmp_path)
    assert "Read back from the disk as it was before: guest digest" in told.stdout
    assert guest_picture(tmp_path / TOP) == "XBCD"


# Only the name


def test_unsafe_rebase_writes_the_name_and_nothing_else(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "X---")
    (tmp_path / "base.img").rename(tmp_path / "golden-2.img")
    said = refused("rebase", "-b", "golden-2.img", TOP, cwd=tmp_path)
    assert "if it was renamed or moved, rebase with -u" in said
    image = (tmp_path / "top.raw").read_bytes()
    succeed("rebase", "-u", "-b", "golden-2.img", TOP, cwd=tmp_path)
    assert (bits(top), guest_picture(top)) == ("1...", "XBCD")
    assert (tmp_path / "top.raw").read_bytes() == image
    succeed("check", TOP, cwd=tmp_path)


def test_unsafe_rebase_shows_what_the_new_backing_file_holds(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "X---")
    draw_raw(tmp_path / "new.img", "EFGH")
    succeed("rebase", "-u", "-b", "new.img", TOP, cwd=tmp_path)
    assert guest_picture(top) == "XFGH"


def test_unsafe_rebase_to_nothing_shows_zeros_and_no_garbage(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "Xg--")
    succeed("rebase", "-u", "-b", "", TOP, cwd=tmp_path)
    assert guest_picture(top) == "X000"
    assert read_header(top).compatible == 0


def test_unsafe_rebase_to_a_file_that_is_not_there_yet_warns(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X---")
    told = succeed("rebase", "-u", "-b", "later.img", TOP, cwd=tmp_path)
    assert "does not exist yet" in told.stderr
    assert read_header(tmp_path / TOP).backing == "later.img"


@pytest.mark.long
def test_unsafe_rebase_under_another_overlay_needs_force(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X---")
    draw(tmp_path / "up.add-cow", "-U--", TOP, backing_format="add-cow")
    draw_raw(tmp_path / "new.img", "EFGH")
    before = snapshot(tmp_path)
    said = refused("rebase", "-u", "-b", "new.img", TOP, cwd=tmp_path)
    assert "up.add-cow" in said
    assert snapshot(tmp_path) == before
    succeed("rebase", "-u", "--force", "-b", "new.img", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / "up.add-cow") == "XUGH"


@pytest.mark.long
def test_unsafe_rebase_that_shows_the_same_needs_no_force(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X---")
    draw(tmp_path / "up.add-cow", "-U--", TOP, backing_format="add-cow")
    (tmp_path / "link.img").symlink_to("base.img")
    for name in ("base.img", "link.img", "link.img"):
        succeed("rebase", "-u", "-b", name, TOP, cwd=tmp_path)
        assert read_header(tmp_path / TOP).backing == name
    draw_raw(tmp_path / "new.img", "EFGH")
    succeed("flatten", TOP, cwd=tmp_path)
    succeed("rebase", "-u", "-b", "new.img", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / "up.add-cow") == "XUCD"


def test_unsafe_rebase_refuses_a_short_bitmap(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "X-")
    short_bitmap(tmp_path)
    draw_raw(tmp_path / "new.img", "AB")
    before = snapshot(tmp_path)
    assert "'addcow check -r all'" in refused("rebase", "-u", "-b", "new.img", TOP, cwd=tmp_path)
    assert snapshot(tmp_path) == before


def test_rebase_to_a_base_without_a_manifest_says_what_to_do(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X---")
    draw_raw(tmp_path / "new.img", "ABCE")
    succeed("manifest", "create", "-q", TOP, cwd=tmp_path)
    told = succeed("rebase", "-b", "new.img", TOP, cwd=tmp_path)
    assert "no new manifest is made" in told.stderr
    assert "new.img: it, or a layer below it, has no manifest" in told.stderr


@pytest.mark.long
def test_dry_run_reports_missing_space(tmp_path: Path) -> None:
    for disk in made_disk("ext4", tmp_path):
        with disk.directory() as here:
            draw_raw(here / "base.img", "A" * 400)
            draw_raw(here / "new.img", "B" * 400)
            draw(here / TOP, "X" + "-" * 399)
            with (here / "fill").open("wb") as file, suppress(OSError):
                for size in range(MiB, 1024 * MiB, MiB):
                    os.posix_fallocate(file.fileno(), size - MiB, MiB)
            said = refused("rebase", "--dry-run", "-b", "new.img", TOP, cwd=here)
            assert "space" in said


@pytest.mark.long
def test_unsafe_rebase_over_a_manifest_of_another_disk_needs_force(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X---")
    draw_raw(tmp_path / "new.img", "ABCE")
    shutil.copy(tmp_path / "base.img", tmp_path / "same.img")
    succeed("manifest", "create", "-q", TOP, cwd=tmp_path)
    for name in ("new.img", "same.img"):
        succeed("manifest", "create", "-q", "-f", "raw", name, cwd=tmp_path)
    before = snapshot(tmp_path)
    said = refused("rebase", "-u", "-b", "new.img", TOP, cwd=tmp_path)
    assert "its manifest says that this is another disk" in said
    assert snapshot(tmp_path) == before
    succeed("rebase", "-u", "-b", "same.img", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / TOP) == "XBCD"
    succeed("manifest", "create", "-q", TOP, cwd=tmp_path)
    succeed("rebase", "-u", "--force", "-b", "new.img", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / TOP) == "XBCE"


# Names


@pytest.mark.long
def test_new_name_goes_where_the_old_one_is_not_and_the_old_one_is_cleared(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "X-")
    for number in range(20):
        name = "n" * (1 + number * 13 % 31) + ".img"
        shutil.copy(tmp_path / "base.img", tmp_path / name)
        succeed("rebase", "-b", name, TOP, cwd=tmp_path)
        assert read_header(top).backing == name
        region = top.read_bytes()[76 : read_header(top).header_size]
        assert len(region.replace(b"\0", b"")) == len(name) + len("top.raw")
        succeed("check", TOP, cwd=tmp_path)


def test_name_that_does_not_fit_is_refused_first(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB", cluster=4 * KiB)
    draw_raw(tmp_path / "new.img", "AB", cluster=4 * KiB)
    draw_raw(tmp_path / "top.raw", "XY", cluster=4 * KiB)
    free = 4 * KiB - 76 - len("base.img") - len("top.raw")
    image = "./" * (free // 2) + "top.raw"  # leaves at most one free byte
    (tmp_path / TOP).write_bytes(
        overlay_bytes(image=image, size=8 * KiB, backing="base.img", cluster=4 * KiB, local=[0])
    )
    before = snapshot(tmp_path)
    assert "no room for another name" in refused("rebase", "-b", "new.img", TOP, cwd=tmp_path)
    assert snapshot(tmp_path) == before


def test_bytes_that_an_interrupted_rebase_leaves_are_a_leak_and_repaired(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "X-")
    with top.open("r+b") as file:
        file.seek(500)
        file.write(b"left")
    result = addcow("check", TOP, cwd=tmp_path)
    assert result.status == 3
    assert "4 bytes of the header that no name uses are not 0, the first at 500" in result.said
    succeed("check", "-r", "leaks", TOP, cwd=tmp_path)
    succeed("check", TOP, cwd=tmp_path)


# Refusals


def circle(here: Path) -> None:
    draw(here / "up.add-cow", "-U", TOP, backing_format="add-cow")


def hard_link(here: Path) -> None:
    os.link(here / "top.raw", here / "x")


def disguised(here: Path) -> None:
    (here / "new.img").write_bytes(b"QFI\xfb".ljust(2 * CLUSTER, b"\0"))


def image_of_an_overlay(here: Path) -> None:
    draw(here / "other.add-cow", "-U")


def lent(here: Path) -> None:
    if shutil.which("qemu-img") is None:
        missing("qemu-img is not installed")
    succeed("qemu", "export", TOP, cwd=here)


def short_bitmap(here: Path) -> None:
    os.truncate(here / TOP, CLUSTER + 1)


def nothing(_: Path) -> None:
    """Change nothing."""


REFUSALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str, bool]] = {
    "itself": (nothing, ("-b", TOP, "-F", "add-cow"), "in the chain already", False),
    "circle": (circle, ("-b", "up.add-cow", "-F", "add-cow"), "in the chain already", False),
    "own image": (nothing, ("-b", "top.raw", "-F", "raw"), "top.raw: it is", False),
    "missing": (nothing, ("-b", "gone.img"), "gone.img", False),
    "not an overlay": (nothing, ("-b", "new.img", "-F", "add-cow"), "not an add-cow file", False),
    "protocol": (nothing, ("-b", "nbd:host:1"), "names a protocol", False),
    "hard link": (hard_link, ("-b", "new.img"), "2 hard links", True),
    "other format": (disguised, ("-b", "new.img"), "new.img", True),
    "image": (image_of_an_overlay, ("-b", "other.raw"), "not a whole disk", True),
    "lent": (lent, ("-b", "new.img"), "'addcow qemu import' takes it back", False),
    "short bitmap": (short_bitmap, ("-b", "new.img"), "ends inside its bitmap", False),
    "no manifest": (
        nothing,
        ("--trust-manifests", "-b", "new.img"),
        "it has no manifest; make one",
        False,
    ),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", REFUSALS)
def test_rebase_is_refused_and_changes_nothing(tmp_path: Path, name: str) -> None:
    pair(tmp_path, "AB", "X-")
    draw_raw(tmp_path / "new.img", "AZ")
    arrange, words, expected, yields = REFUSALS[name]
    arrange(tmp_path)
    before = snapshot(tmp_path)
    for options in ((), ("--dry-run",), *([] if yields else [("--force",)])):
        assert expected in refused("rebase", *options, *words, TOP, cwd=tmp_path)
    assert snapshot(tmp_path) == before
    if yields:
        succeed("rebase", "--force", *words, TOP, cwd=tmp_path)


MISUSES = [
    ("-b", "new.img", "-F", "qcow2"),
    ("-b", "", "-F", "raw"),
    ("-b", "-"),
    ("-u", "--trust-manifests", "-b", "new.img"),
    ("-u", "--verify", "-b", "new.img"),
    (),
]


@pytest.mark.parametrize("words", MISUSES)
def test_misuse_of_rebase_is_explained(tmp_path: Path, words: tuple[str, ...]) -> None:
    pair(tmp_path, "AB", "X-")
    refused("rebase", *words, TOP, cwd=tmp_path, status=USAGE)


def test_overlay_without_a_backing_file_needs_the_format(tmp_path: Path) -> None:
    draw(tmp_path / TOP, "XY", "", compatible=ALL_ALLOCATED)
    draw_raw(tmp_path / "new.img", "AB")
    said = refused("rebase", "-b", "new.img", TOP, cwd=tmp_path, status=USAGE)
    assert "-F raw or -F add-cow" in said
    succeed("rebase", "-b", "new.img", "-F", "raw", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / TOP) == "XY"


@pytest.mark.long
def test_dry_run_counts_what_differs_and_changes_nothing(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X---")
    draw_raw(tmp_path / "new.img", "ZZZD")
    before = snapshot(tmp_path)
    assert (
        "copies 128 KiB"
        in succeed("rebase", "--dry-run", "-b", "new.img", TOP, cwd=tmp_path).stdout
    )
    words = ("rebase", "--dry-run", "--output", "json", "-b", "new.img", TOP)
    told = succeed(*words, cwd=tmp_path).json
    assert (told["state"], told["bytes"]) == ("ready", 2 * CLUSTER)
    assert snapshot(tmp_path) == before
    succeed("rebase", "-b", "new.img", TOP, cwd=tmp_path)
    assert succeed(*words, cwd=tmp_path).json["state"] == "nothing-to-do"


# What is not read


def unreadable(here: Path) -> Rules:
    """Rules under which no byte of a backing file can be read."""
    return Rules.write(here.parent / "rules", rule("backing_read"))


def test_with_manifests_no_byte_of_a_backing_file_is_read(warm: Warm, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    pair(here, "ABCDABCD", "X-------")
    draw_raw(here / "new.img", "ABCDABCD")
    words = ("rebase", "--force", "--jobs", "0", "-b", "new.img")
    assert warm.run(*words, TOP, cwd=here, rules=unreadable(here)).status == 1
    succeed("manifest", "create", "-q", TOP, cwd=here)
    succeed("manifest", "create", "-q", "-f", "raw", "new.img", cwd=here)
    ended = warm.run(*words, "--trust-manifests", TOP, cwd=here, rules=unreadable(here))
    assert ended.status == 0, ended
    assert (bits(here / TOP), guest_picture(here / TOP)) == ("1.......", "XBCDABCD")


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    yield from made_disk("xfs", tmp_path_factory.mktemp("disk"))


@pytest.mark.long
def test_shared_blocks_are_equal_and_not_read(warm: Warm, tmp_path: Path, xfs: Disk) -> None:
    with xfs.directory() as here:
        pair(here, "ABCDABCD", "X-------")
        tool("cp", "--reflink=always", "base.img", "new.img", cwd=here)
        words = ("rebase", "--force", "--jobs", "0", "-b", "new.img", TOP)
        rules = Rules.write(tmp_path / "rules", rule("backing_read"))
        ended = warm.run(*words, cwd=here, rules=rules)
        assert ended.status == 0, ended
        assert bits(here / TOP) == "1......."


@pytest.mark.long
def test_write_into_a_clone_is_seen_while_it_is_only_in_memory(xfs: Disk) -> None:
    with xfs.directory() as here:
        pair(here, "ABCDABCD", "X-------")
        os.sync()
        tool("cp", "--reflink=always", "base.img", "new.img", cwd=here)
        with (here / "new.img").open("r+b") as file:
            file.seek(3 * CLUSTER)
            file.write(b"Z" * CLUSTER)
        succeed("rebase", "-b", "new.img", TOP, cwd=here)
        assert (bits(here / TOP), guest_picture(here / TOP)) == ("1..1....", "XBCDABCD")


@pytest.mark.parametrize(
    ("flags", "is_shared"),
    [(0x2000, True), (0x2001, True), (0x3001, True), (0, False), (1, False), (0x2800, False),
     (0x2008, False), (0x2200, False), (0x2004, False), (0x2002, False)],
)  # fmt: skip
def test_flags_of_extents_decide_whether_blocks_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int, is_shared: bool
) -> None:
    """The kernel marks an extent that is unwritten, compressed or not placed yet with a flag."""

    def answer(fd: int, request: int, room: bytearray) -> int:
        struct.pack_into("QQIIII", room, 0, 0, 1 << 20, 1, 1, 1024, 0)
        struct.pack_into("QQQ16xI12x", room, 32, 0, 1 << 30, 1 << 20, flags)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", answer)
    (found,) = places(0, 0, 1 << 20)
    assert found == (0, 1 << 20, 1 << 30, is_shared)


# Order


def test_rebase_keeps_the_order(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABCD", "X---")
    draw_raw(tmp_path / "new.img", "ABZD")
    (tmp_path / f"{TOP}.manifest").write_bytes(b"ADDCOW")
    rebase(str(top), NewBacking("new.img"), options=RunOptions(0))
    calls = [(call.word, call.file) for call in trace.calls]
    assert calls.index(("synced", "new.img")) < calls.index(("data", "top.raw"))
    assert trace.story() == [
        f"sync {tmp_path.name}/",
        *(f"remove {TOP}.manifest", f"sync {tmp_path.name}/"),
        *("data top.raw", "sync top.raw", "bits top.add-cow", "sync top.add-cow"),
        *("header top.add-cow", "sync top.add-cow"),  # the new name
        *("header top.add-cow", "sync top.add-cow"),
        *("header top.add-cow", "sync top.add-cow"),  # the old name is cleared
    ]


def test_rebase_to_nothing_keeps_the_order(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABCD", "X-g-")
    rebase(str(top), NewBacking(""), options=RunOptions(0))
    assert trace.story() == [
        *("data top.raw", "sync top.raw", "bits top.add-cow", "sync top.add-cow"),
        *("header top.add-cow", "sync top.add-cow"),
        *("header top.add-cow", "sync top.add-cow"),
    ]


# A farm


def farm_rebase(here: Path, *words: str, status: int = 0) -> dict[str, Any]:
    """Run `farm rebase`; returns its report."""
    result = addcow("farm", "rebase", "--output", "json", *words, cwd=here)
    assert result.status == status, result
    report: dict[str, Any] = result.json
    return report


def clones(here: Path, count: int) -> None:
    """Make overlays of one base, each with one allocated cluster, and a new version of the base."""
    draw_raw(here / "base.img", "ABCDEFGH")
    draw_raw(here / "new.img", "ABCXEFYH")
    for number in range(count):
        cells = "-" * (number % 8) + "V" + "-" * (7 - number % 8)
        draw(here / f"vm{number:02}.add-cow", cells)


def views(here: Path) -> dict[str, bytes]:
    """What each guest of a farm sees."""
    return {one.name: oracle.guest_bytes(str(one)) for one in here.glob("*.add-cow")}


@pytest.mark.long
@pytest.mark.parametrize("jobs", ["0", "2"])
def test_farm_rebase_brings_a_new_version_to_every_clone(tmp_path: Path, jobs: str) -> None:
    clones(tmp_path, 40)
    before = views(tmp_path)
    planned = farm_rebase(tmp_path, "--dry-run", "-b", "new.img", ".")
    assert {one["bytes"] for one in planned["images"]} == {CLUSTER, 2 * CLUSTER}
    told = farm_rebase(tmp_path, "--jobs", jobs, "-b", "new.img", ".")
    assert told["summary"]["done"] == 40
    assert told["summary"]["bytes-moved"] == (40 * 2 - 10) * CLUSTER
    assert views(tmp_path) == before
    assert {read_header(one).backing for one in tmp_path.glob("*.add-cow")} == {"new.img"}
    (tmp_path / "base.img").unlink()
    assert views(tmp_path) == before
    again = farm_rebase(tmp_path, "-b", "new.img", ".")
    assert again["summary"]["nothing-to-do"] == 40


@pytest.mark.long
def test_farm_rebase_of_several_bases_needs_from(tmp_path: Path) -> None:
    clones(tmp_path, 3)
    draw_raw(tmp_path / "other.img", "AB")
    draw(tmp_path / "else.add-cow", "-X", "other.img")
    before = snapshot(tmp_path)
    said = refused("farm", "rebase", "-b", "new.img", ".", cwd=tmp_path, status=USAGE)
    assert "choose one with --from" in said
    assert snapshot(tmp_path) == before
    told = farm_rebase(tmp_path, "-b", "new.img", "--from", "base.img", ".")
    assert (told["summary"]["images"], told["summary"]["done"]) == (3, 3)
    assert read_header(tmp_path / "else.add-cow").backing == "other.img"


@pytest.mark.long
def test_farm_rebase_leaves_the_new_base_and_its_chain_out(tmp_path: Path) -> None:
    clones(tmp_path, 3)
    draw(tmp_path / "below.add-cow", "---B----")
    draw(tmp_path / "v2.add-cow", "-----N--", "below.add-cow", backing_format="add-cow")
    before = views(tmp_path)
    told = farm_rebase(tmp_path, "-b", "v2.add-cow", "-F", "add-cow", "--from", "base.img", ".")
    assert told["summary"]["done"] == 3
    assert views(tmp_path) == before
    assert read_header(tmp_path / "v2.add-cow").backing == "below.add-cow"
    assert read_header(tmp_path / "below.add-cow").backing == "base.img"


def test_farm_rebase_by_name_where_the_old_base_is_gone(tmp_path: Path) -> None:
    clones(tmp_path, 3)
    before = views(tmp_path)
    (tmp_path / "base.img").rename(tmp_path / "golden.img")
    told = farm_rebase(tmp_path, "-b", "golden.img", "--from", "base.img", ".", status=1)
    assert told["summary"]["refused"] == 3
    told = farm_rebase(tmp_path, "-u", "-b", "golden.img", "--from", "./base.img", ".")
    assert told["summary"]["done"] == 3
    assert views(tmp_path) == before


@pytest.mark.long
def test_farm_rebase_refuses_one_image_and_does_the_others(tmp_path: Path) -> None:
    clones(tmp_path, 4)
    os.link(tmp_path / "vm02.raw", tmp_path / "x")
    told = farm_rebase(tmp_path, "-b", "new.img", ".", status=1)
    assert (told["summary"]["done"], told["summary"]["refused"]) == (3, 1)


@pytest.mark.long
def test_farm_rebase_names_the_new_base_from_each_directory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        draw_raw(tmp_path / "base.img", "ABCD")
        draw(tmp_path / name / TOP, "X---", "../base.img")
    draw_raw(tmp_path / "new.img", "ABCZ")
    told = farm_rebase(tmp_path, "--root", ".", "-b", "new.img", ".")
    assert told["summary"]["done"] == 2
    assert read_header(tmp_path / "a" / TOP).backing == "../new.img"
    assert look(tmp_path / "new.img") == "ABCZ"


def test_plan_of_a_rebase_names_the_command(tmp_path: Path) -> None:
    clones(tmp_path, 1)
    said = refused("farm", "plan", "rebase", ".", cwd=tmp_path, status=USAGE)
    assert "farm rebase --dry-run" in said


@pytest.mark.long
def test_killed_farm_rebase_is_finished_by_the_same_command(warm: Warm, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    clones(here, 12)
    before = views(here)
    words = ("farm", "rebase", "--jobs", "0", "-b", "new.img", ".")
    for event in ("image_write", "bitmap_sync", "header_write", "data_sync"):
        for after in range(0, 24, 5):
            rules = Rules.write(tmp_path / "rules", rule(event, "kill", after=after, once="on"))
            warm.run(*words, cwd=here, rules=rules)
            assert views(here) == before
    succeed(*words, cwd=here)
    assert views(here) == before
    assert {read_header(one).backing for one in here.glob("*.add-cow")} == {"new.img"}


@pytest.mark.long
def test_rebase_on_a_full_disk_changes_no_view(tmp_path: Path) -> None:
    for disk in made_disk("ext4", tmp_path):
        with disk.directory() as here:
            draw_raw(here / "base.img", "A" * 64)
            draw_raw(here / "new.img", "B" * 64)
            draw(here / TOP, "X" + "-" * 63)
            with (here / "fill").open("wb") as file, suppress(OSError):
                for size in range(MiB, 1024 * MiB, MiB):
                    os.posix_fallocate(file.fileno(), size - MiB, MiB)
            os.truncate(here / "fill", (here / "fill").stat().st_size - 2 * MiB)
            before = oracle.guest_bytes(str(here / TOP))
            said = refused("rebase", "-b", "new.img", TOP, cwd=here)
            assert "space" in said
            assert oracle.guest_bytes(str(here / TOP)) == before
            (here / "fill").unlink()
            succeed("rebase", "-b", "new.img", TOP, cwd=here)
            assert oracle.guest_bytes(str(here / TOP)) == before


@pytest.mark.long
def test_farm_rebase_of_named_files_alone(tmp_path: Path) -> None:
    clones(tmp_path, 3)
    draw_raw(tmp_path / "other.img", "AB")
    draw(tmp_path / "else.add-cow", "-X", "other.img")
    words = ("-b", "new.img", "--from", "base.img", "vm00.add-cow", "else.add-cow")
    told = farm_rebase(tmp_path, *words)
    assert (told["summary"]["images"], told["summary"]["done"]) == (1, 1)
    again = addcow("farm", "rebase", *words, cwd=tmp_path)
    assert (again.status, again.stderr) == (0, "")
    assert "1 nothing to do" in again.stdout
    none = addcow("farm", "rebase", "-b", "new.img", "--from", "base.img", "else.add-cow",
                  cwd=tmp_path)  # fmt: skip
    assert none.stderr == (
        "addcow: no overlay in these places stands on the backing file to be replaced\n"
    )


def test_farm_rebase_reads_every_image_back(tmp_path: Path) -> None:
    clones(tmp_path, 3)
    before = views(tmp_path)
    told = farm_rebase(tmp_path, "--verify", "-b", "new.img", ".")
    assert all(len(one["guest-digest"]) == 64 for one in told["images"])
    assert views(tmp_path) == before


@pytest.mark.long
def test_farm_rebase_reports_a_damaged_overlay(tmp_path: Path) -> None:
    clones(tmp_path, 2)
    (tmp_path / "broken.add-cow").write_bytes(b"ACOW and nothing else")
    for words in (("--from", "base.img"), ()):
        told = farm_rebase(tmp_path, "-b", "new.img", *words, ".", status=1)
        assert told["summary"]["refused"] == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        ("-b", "new.img", "--from", "typo.img"),
        ("-b", "typo.img"),
        ("-b", "typo.img", "--from", "base.img"),
    ],
)
def test_farm_rebase_refuses_names_of_nothing(tmp_path: Path, words: tuple[str, ...]) -> None:
    clones(tmp_path, 2)
    before = snapshot(tmp_path)
    assert "typo.img: it does not exist" in refused("farm", "rebase", *words, ".", cwd=tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.long
def test_farm_rebase_warns_of_names_outside_once_they_are_new(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    draw_raw(tmp_path / "base.img", "ABCD")
    draw_raw(tmp_path / "new.img", "ABCE")
    draw(tmp_path / "a" / TOP, "X---", "../base.img")
    words = ("farm", "rebase", "--root", ".", "-b")
    assert succeed(*words, "new.img", ".", cwd=tmp_path).stderr == ""
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "new.img", tmp_path / "b")
    told = succeed(*words, "b/new.img", ".", cwd=tmp_path)
    assert "its users will need --root" in told.stderr
