"""Tests of `resize`: what a guest sees afterwards, and what is refused.

The model, the oracle and qemu-img say what a guest sees. A copy as qcow2 over the same base is
resized by qemu-img and compared.
"""

from __future__ import annotations

import json
import os
import random
import resource
from pathlib import Path

import pytest

import addcow_mp
import oracle
from support.call_trace import Trace, judge
from support.chains import wild_chain
from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    GiB,
    KiB,
    MiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    io,
    local_clusters,
    overlay_bytes,
    pair,
    patch,
    refused,
    snapshot,
    succeed,
    tool,
    virtual_size,
)
from support.file_systems import fill, mounted
from support.loops import loops
from support.model import build, read_view, stray_bits

SECTOR = 512
TOP = "top.add-cow"
SIZES = {  # of a disk of three clusters
    "256k": 256 * KiB,
    "+64k": 256 * KiB,
    "+1": 192 * KiB + SECTOR,
    "1M": MiB,
    "1.5M": 3 * MiB // 2,
    "262144": 256 * KiB,
    "-64k": 128 * KiB,
    "-1": 192 * KiB,
    "-1K": 191 * KiB,
    "-191k": KiB,
    "192k": 192 * KiB,
}


def resized(path: Path, *words: str) -> None:
    result = succeed("resize", path.name, *words, cwd=path.parent)
    assert (result.stdout, result.stderr) == ("Image resized.\n", "")


# ---- the command line ----


@pytest.mark.parametrize(("words", "size"), SIZES.items())
def test_size_is_read_as_by_qemu_img(tmp_path: Path, words: str, size: int) -> None:
    """At every place, a word such as -64k is a size and no option."""
    top = pair(tmp_path, "ABCDE", "-X-")
    orders = [(TOP, words, "--shrink"), ("--shrink", TOP, words), ("--shrink", TOP, "--", words)]
    succeed("resize", *orders[[*SIZES].index(words) % 3], cwd=tmp_path)
    assert virtual_size(top) == size
    (tmp_path / "q.raw").write_bytes(bytes(192 * KiB))
    qemu = ["--", words] if words[0] == "-" else [words]
    tool("qemu-img", "resize", "-q", "-f", "raw", "--shrink", "q.raw", *qemu, cwd=tmp_path)
    assert -(-(tmp_path / "q.raw").stat().st_size // SECTOR) * SECTOR == size


def test_resize_prints_what_it_did(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    resized(top, "+64k")
    assert succeed("resize", "-q", TOP, "+64k", cwd=tmp_path).stdout == ""
    result = succeed("resize", "--output", "json", TOP, "1M", cwd=tmp_path)
    assert (result.json["operation"], result.json["virtual-size"]) == ("resize", MiB)
    assert result.json["filename"] == TOP


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ((TOP, "-1k"), 1),
        ((TOP, "64k"), 1),
        ((TOP, "--shrink", "-1G"), 64),
        ((TOP, "--shrink", "-192k"), 64),
        ((TOP, "--shrink", "0"), 64),
        ((TOP, "9E"), 64),
        ((TOP, "+8E"), 64),
        ((TOP, "ten"), 64),
        ((TOP, "-"), 64),
        ((TOP, "+-1k"), 64),
        ((TOP, ""), 64),
        ((TOP,), 64),
        ((TOP, "--shrnk", "1k"), 64),
        ((TOP, "-1.add-cow"), 64),
        (("base.img", "1M"), 1),
        (("missing.add-cow", "1M"), 1),
    ],
)
def test_resize_refuses_in_one_line(tmp_path: Path, words: tuple[str, ...], status: int) -> None:
    pair(tmp_path, "ABC", "-X-")
    before = snapshot(tmp_path)
    refused("resize", *words, cwd=tmp_path, status=status)
    assert snapshot(tmp_path) == before


def test_shrinking_needs_its_option(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "-X-")
    line = refused("resize", TOP, "-1k", cwd=tmp_path)
    assert line == (
        f"addcow: {TOP}: shrinking it from 196608 to 195584 bytes deletes what lies behind; "
        "allow it with --shrink"
    )


# ---- what the guest sees ----


@pytest.mark.parametrize("mark", ["-", "x", "X", "0"])
@pytest.mark.parametrize("cut", [0, 1, SECTOR, 5 * KiB + 3])
@pytest.mark.sample(4)
@pytest.mark.parametrize("new", [3 * CLUSTER - 4 * KiB, 3 * CLUSTER, 4 * CLUSTER + SECTOR])
def test_new_part_reads_zeros_over_a_longer_backing(
    tmp_path: Path, mark: str, cut: int, new: int
) -> None:
    """Also in the old last cluster, and where the image held bytes behind the old end."""
    top = pair(tmp_path, "ABCDEF", f"-X{mark}")
    size = 3 * CLUSTER - 8 * KiB
    os.truncate(tmp_path / "top.raw", size + cut % SECTOR)
    patch(tmp_path / "top.raw", size, b"t" * (cut % SECTOR))
    old = read_view(str(top))
    resized(top, str(new))
    assert read_view(str(top)) == old.ljust(new, b"\0")
    assert addcow("check", TOP, cwd=tmp_path).status in ((0, 3) if mark == "x" else (0,))
    assert succeed("flatten", "--discard", TOP, cwd=tmp_path)
    assert (tmp_path / "top.raw").read_bytes() == old.ljust(new, b"\0")


def test_only_clusters_that_the_backing_covers_become_allocated(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "-X")
    resized(top, "512k")
    assert bits(top) == ".111...."
    assert guest_picture(top) == "AX000000"


def test_shrinking_and_growing_again_shows_zeros(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCDEF", "-XYZ--")
    resized(top, "--shrink", "100k")
    assert bits(top) == ".1"
    resized(top, "384k")
    assert read_view(str(top)) == (b"A" * CLUSTER + b"X" * (36 * KiB)).ljust(384 * KiB, b"\0")


def test_shrinking_to_the_same_bitmap_byte_leaves_no_stray_bit(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCDEF", "XXXXXX")
    resized(top, "--shrink", "192k")
    assert local_clusters(top) == [0, 1, 2]


@pytest.mark.parametrize("name", ["shrunk", "interrupted", "longer"])
def test_bits_in_later_clusters_of_the_bitmap_do_not_come_back(tmp_path: Path, name: str) -> None:
    """A cluster of bitmap has the bits of 128 MiB; the backing file has data at 900 MiB."""
    cluster, place = 4 * KiB, 900 * MiB
    for file in ("base.img", "top.raw"):
        (tmp_path / file).touch()
        os.truncate(tmp_path / file, GiB)
        patch(tmp_path / file, place, b"B" * 4 * KiB)
    local = [place // cluster, place // cluster + 1]
    content = overlay_bytes(
        image="top.raw", size=GiB, backing="base.img", cluster=cluster, local=local
    )
    top = tmp_path / TOP
    top.write_bytes(content)
    if name == "interrupted":  # between the cut of the image and the clearing of bits
        os.truncate(tmp_path / "top.raw", MiB)
    else:
        resized(top, "--shrink", "1M")
        assert top.stat().st_size == 2 * cluster
        assert local_clusters(top) == []
    if name == "longer":  # bytes behind the bitmap, of whatever origin
        patch(top, top.stat().st_size, b"\xff" * 10 * cluster)
    resized(top, "950M")
    assert addcow("check", TOP, cwd=tmp_path).status == 0
    assert oracle.guest_bytes(str(top), place - 4 * KiB, place + 8 * KiB) == bytes(12 * KiB)
    wanted = [*range(MiB // cluster, 950 * MiB // cluster)]
    assert local_clusters(top) == wanted


def test_same_size_finishes_an_interrupted_shrinking(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCDEF", "XXXXXX")
    os.truncate(tmp_path / "top.raw", 192 * KiB)
    resized(top, "192k")
    assert local_clusters(top) == [0, 1, 2]


@pytest.mark.parametrize("backing", ["base.img", ""])
def test_overlay_that_is_allocated_as_a_whole_is_resized(tmp_path: Path, backing: str) -> None:
    draw_raw(tmp_path / "base.img", "ABCDEF")
    draw(tmp_path / TOP, "-X0-", backing, compatible=ALL_ALLOCATED)
    os.truncate(tmp_path / "top.raw", 4 * CLUSTER + 100)
    patch(tmp_path / "top.raw", 4 * CLUSTER, b"t" * 100)
    resized(tmp_path / TOP, "2G")
    assert oracle.guest_bytes(str(tmp_path / TOP), 0, 5 * CLUSTER) == (
        bytes(CLUSTER) + b"X" * CLUSTER + bytes(3 * CLUSTER)
    )
    resized(tmp_path / TOP, "--shrink", "128k")
    assert guest_picture(tmp_path / TOP) == "0X"
    assert addcow("check", TOP, cwd=tmp_path).status == 0


def test_missing_backing_does_not_matter_where_all_is_allocated(tmp_path: Path) -> None:
    draw(tmp_path / TOP, "-X0-", "gone.img", compatible=ALL_ALLOCATED)
    resized(tmp_path / TOP, "+64k")
    assert guest_picture(tmp_path / TOP) == "0X000"


def new_size(rng: random.Random, size: int) -> int:
    near = size + rng.choice([-1, 1]) * rng.choice(
        [SECTOR, 4 * KiB, 64 * KiB, 300 * KiB + 7 * SECTOR]
    )
    return max(SECTOR, rng.choice([near, rng.randrange(2 * MiB) // SECTOR * SECTOR, size]))


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", range(16))
def test_random_sizes_show_what_the_model_and_qemu_img_show(
    tmp_path: Path, rng: random.Random, number: int
) -> None:
    """Chains with odd ends, garbage, stray bits; every step is made on a qcow2 as well."""
    files = build(wild_chain(rng, MiB), str(tmp_path))
    top = Path(files.path)
    view = read_view(files.path)
    below = files.backing
    (tmp_path / "below.img").write_bytes(
        b""
        if below is None
        else read_view(below.path, "raw" if below.path == below.image else "add-cow")
    )
    make_qcow2(tmp_path, view)
    for _ in range(6):
        size = new_size(rng, len(view))
        shrink = ["--shrink"] if size < len(view) else []
        succeed("resize", *shrink, top.name, str(size), cwd=tmp_path)
        if shrink:  # qemu-img shows the rest of the last cluster again when the disk grows
            zeros = f"write -z {size} {len(view) - size}"
            tool("qemu-io", "-f", "qcow2", "-c", zeros, "q.qcow2", cwd=tmp_path)
        tool("qemu-img", "resize", "-q", *shrink, "q.qcow2", str(size), cwd=tmp_path)
        view = view[:size].ljust(size, b"\0")
        assert read_view(files.path) == view, size
        assert not stray_bits(files.path)
        (tmp_path / "seen").write_bytes(oracle.guest_bytes(files.path))
        tool(
            "qemu-img",
            "compare",
            "-q",
            "-f",
            "raw",
            "-F",
            "qcow2",
            "seen",
            "q.qcow2",
            cwd=tmp_path,
        )
        if rng.random() < 0.5:
            view = write_both(rng, tmp_path, top, view)


def make_qcow2(here: Path, view: bytes) -> None:
    """A qcow2 over what lies below, with the same view."""
    words = ["-b", "below.img", "-F", "raw", "q.qcow2", str(len(view))]
    tool("qemu-img", "create", "-q", "-f", "qcow2", *words, cwd=here)
    (here / "view").write_bytes(view)
    if view:
        words = ["-f", "raw", "-O", "qcow2", "-n", "view", "q.qcow2"]
        tool("qemu-img", "convert", *words, cwd=here)


def write_both(rng: random.Random, here: Path, top: Path, view: bytes) -> bytes:
    start = rng.randrange(len(view)) // SECTOR * SECTOR
    length = min(len(view) - start, rng.choice([SECTOR, 5 * KiB, 64 * KiB]))
    line = f"write -P 0x57 {start} {length}"
    io(top.name, line, cwd=here)
    tool("qemu-io", "-f", "qcow2", "-c", line, "q.qcow2", cwd=here)
    return view[:start] + b"W" * length + view[start + length :]


# ---- refusals ----


def above(here: Path) -> Path:
    top = pair(here, "ABCDEF", "-XY")
    draw(here / "above.add-cow", "N-----", TOP, backing_format="add-cow")
    return top


def test_shrinking_is_refused_with_dependants(tmp_path: Path) -> None:
    top = above(tmp_path)
    before = snapshot(tmp_path)
    line = refused("resize", "--shrink", TOP, "64k", cwd=tmp_path)
    assert "above.add-cow" in line
    assert snapshot(tmp_path) == before
    succeed("resize", "--shrink", "--force", TOP, "64k", cwd=tmp_path)
    assert guest_picture(top) == "A"


def test_growing_changes_nothing_for_dependants(tmp_path: Path) -> None:
    top = above(tmp_path)
    old = read_view(str(tmp_path / "above.add-cow"))
    resized(top, "320k")
    assert read_view(str(tmp_path / "above.add-cow")) == old
    assert guest_picture(top) == "AXY00"


@pytest.mark.parametrize("words", [("1M",), ("--shrink", "1k")])
def test_overlay_with_a_shared_image_or_a_raw_user_is_refused(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    pair(tmp_path, "ABCDEF", "-XY")
    draw(tmp_path / "user.add-cow", "---", "top.raw")
    assert "user.add-cow" in refused("resize", TOP, *words, cwd=tmp_path)
    (tmp_path / "user.add-cow").write_bytes((tmp_path / TOP).read_bytes())
    assert "share" in refused("resize", "--force", TOP, *words, cwd=tmp_path)


@pytest.mark.long
def test_linked_short_and_lent_overlays_are_refused(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    os.link(top, tmp_path / "other")
    assert "hard link" in refused("resize", TOP, "1M", cwd=tmp_path)
    os.unlink(tmp_path / "other")
    succeed("qemu", "export", TOP, cwd=tmp_path)
    assert "lent" in refused("resize", TOP, "1M", cwd=tmp_path)
    succeed("qemu", "import", TOP, cwd=tmp_path)
    os.truncate(top, top.stat().st_size - CLUSTER)
    assert "ends inside its bitmap" in refused("resize", TOP, "1M", cwd=tmp_path)


@pytest.mark.parametrize("name", [TOP, "top.raw"])
def test_overlay_in_use_is_not_resized(tmp_path: Path, name: str) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with addcow_mp.open(top):
        assert "in use" in refused("resize", TOP, "1M", cwd=tmp_path)


def test_image_file_that_is_a_device_is_refused(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with loops() as made:
        device = made.bind(tmp_path / "top.raw")
        content = overlay_bytes(image=device, size=3 * CLUSTER, backing="base.img")
        top.write_bytes(content)
        words = ("--allow-device", "--root", "/dev", TOP, "1M")
        assert "block device" in refused("resize", *words, cwd=tmp_path)


def test_full_disk_is_noticed_before_any_change(tmp_path: Path) -> None:
    for here in mounted("tmpfs", tmp_path):
        pair(here, "ABCDEF", "-X-")
        os.truncate(here / "top.raw", 3 * CLUSTER - 4 * KiB)
        fill(here)
        before = snapshot(here)
        assert "free" in refused("resize", TOP, "300k", cwd=here)
        assert snapshot(here) == before


def test_size_that_the_file_system_refuses_leaves_the_old_disk(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCDEF", "-X-")
    before = read_view(str(top))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, usual[1]))
    try:
        line = refused("resize", TOP, "2M", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert "top.raw: cannot set its length to 2097152 bytes: File too large" in line
    assert read_view(str(top)) == before
    assert addcow("check", TOP, cwd=tmp_path).status == 0


def test_manifests_are_removed_first(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "-X-")
    succeed("manifest", "create", TOP, cwd=tmp_path)
    assert (tmp_path / f"{TOP}.manifest").exists()
    succeed("resize", TOP, "1M", cwd=tmp_path)
    assert not (tmp_path / f"{TOP}.manifest").exists()
    assert (tmp_path / "base.img.manifest").exists()


# ---- the order on disk ----


def test_growing_keeps_the_order(tmp_path: Path, trace: Trace) -> None:
    """Data, sync, bits, sync, and only then the length, which is the view."""
    top = pair(tmp_path, "ABCDEF", "-X-")
    os.truncate(tmp_path / "top.raw", 3 * CLUSTER - 4 * KiB)
    addcow_mp.resize(top, "+1M")
    assert trace.story() == [
        "data top.raw",
        "sync top.raw",
        "bits top.add-cow",
        "sync top.add-cow",
        "length top.raw",
        "sync top.raw",
    ]
    assert judge(trace.calls, top, {1: "top.raw"}) == 4


def test_shrinking_keeps_the_order(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABCDEF", "-XXXXX")
    addcow_mp.resize(str(top), 2 * CLUSTER, shrink=True)
    assert trace.story() == [
        "length top.raw",
        "sync top.raw",
        "bits top.add-cow",
        "sync top.add-cow",
    ]


@pytest.mark.parametrize("name", ["top.raw", TOP])
@pytest.mark.parametrize("size", ["+1M", "-64k"])
def test_failed_sync_ends_a_resize(tmp_path: Path, trace: Trace, name: str, size: str) -> None:
    top = pair(tmp_path, "ABCDEF", "-XXX")
    trace.to_be(name)
    with pytest.raises(addcow_mp.SyncError):
        addcow_mp.resize(top, size, shrink=True)
    assert trace.failed == [name]
    changed = {call.file for call in trace.calls if call.word in ("bits", "length")}
    assert (TOP in changed) == (name == TOP)
    trace.failing.clear()
    addcow_mp.resize(top, size, shrink=True)
    assert json.loads(succeed("check", "--output", "json", TOP, cwd=tmp_path).stdout)
