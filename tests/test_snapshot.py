"""Tests of `snapshot`: a new overlay over a disk, which stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import addcow_mp
import oracle
from support.command import (
    CLUSTER,
    KiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    io,
    pair,
    put,
    read_header,
    refused,
    snapshot,
    succeed,
    virtual_size,
)

TOP, NEW = "top.add-cow", "new.add-cow"


def unchanged(here: Path, before: dict[str, str]) -> None:
    now = snapshot(here)
    assert {name: now[name] for name in before} == before


@pytest.mark.parametrize("cluster", [4 * KiB, CLUSTER])
def test_snapshot_shows_the_disk_and_takes_what_is_written(tmp_path: Path, cluster: int) -> None:
    draw_raw(tmp_path / "base.img", "ABCD", cluster=cluster)
    draw(tmp_path / TOP, "-X0", cluster=cluster)
    os.truncate(tmp_path / "top.raw", 3 * cluster - 512)
    before, view = snapshot(tmp_path), oracle.guest_bytes(str(tmp_path / TOP))
    result = succeed("snapshot", TOP, NEW, cwd=tmp_path)
    assert result.stdout == (
        f"Formatting '{NEW}', fmt=add-cow size={len(view)} backing_file='{TOP}' "
        f"image_file='new.raw' cluster_size={cluster}\n"
    )
    assert oracle.guest_bytes(str(tmp_path / NEW)) == view
    assert bits(tmp_path / NEW) == "..."
    header = read_header(tmp_path / NEW)
    assert (header.backing, header.backing_format, header.image) == (TOP, "add-cow", "new.raw")
    assert header.cluster == cluster
    io(NEW, "write -P 1 0 512", cwd=tmp_path)
    unchanged(tmp_path, before)
    assert oracle.guest_bytes(str(tmp_path / NEW)) == b"\1" * 512 + view[512:]
    assert addcow("check", NEW, cwd=tmp_path).status == 0


def test_snapshot_of_a_raw_disk_needs_its_format(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"A" * 1000)
    assert "disk.raw" in refused("snapshot", "disk.raw", NEW, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["disk.raw"]
    succeed("snapshot", "-q", "-F", "raw", "disk.raw", NEW, cwd=tmp_path)
    assert oracle.guest_bytes(str(tmp_path / NEW)) == (b"A" * 1000).ljust(1024, b"\0")


def test_names_are_stored_relative_to_the_new_overlay(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "-X")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / TOP).write_bytes(b"another file of this name")
    words = ("snapshot", "--output", "json", TOP, f"deep/{NEW}")
    result = succeed(*words, cwd=tmp_path)
    assert result.json["backing-filename"] == f"../{TOP}"
    assert result.json["virtual-size"] == 2 * CLUSTER
    assert "--root" in result.stderr
    assert guest_picture(tmp_path / "deep" / NEW) == "AX"
    succeed("snapshot", str(top), "other.add-cow", cwd=tmp_path)
    assert read_header(tmp_path / "other.add-cow").backing == str(top)


def test_snapshot_of_a_snapshot_makes_a_chain(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "-X-")
    for old, new in ((TOP, "one.add-cow"), ("one.add-cow", "two.add-cow")):
        succeed("snapshot", old, new, cwd=tmp_path)
        io(new, "write -P 0x4e 128k 64k" if new[0] == "o" else "write -P 0x4d 0 64k", cwd=tmp_path)
    assert guest_picture(tmp_path / "two.add-cow") == "MXN"
    assert guest_picture(tmp_path / TOP) == "AXC"


def test_snapshot_keeps_a_manifest(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-X")
    succeed("manifest", "create", TOP, cwd=tmp_path)
    succeed("snapshot", TOP, NEW, cwd=tmp_path)
    succeed("verify", TOP, cwd=tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((TOP, TOP), "it exists already"),
        ((TOP, "base.img"), "it exists already"),
        ((TOP, "top.x"), "top.raw: it exists already"),
        (("gone.add-cow", NEW), "gone.add-cow"),
        ((TOP, f"gone/{NEW}"), "gone"),
        (("lent.add-cow", NEW), "lent"),
        (("broken.add-cow", NEW), "broken.add-cow"),
        (("-F", "raw", TOP, NEW), TOP),
    ],
)
def test_snapshot_refuses_what_create_refuses(
    tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    pair(tmp_path, "ABC", "-X-")
    draw(tmp_path / "lent.add-cow", "---")
    succeed("qemu", "export", "lent.add-cow", cwd=tmp_path)
    draw(tmp_path / "broken.add-cow", "---")
    put(tmp_path / "broken.add-cow", 24, b"\1")
    before = snapshot(tmp_path)
    assert says in refused("snapshot", *words, cwd=tmp_path)
    assert snapshot(tmp_path) == before


def test_disk_in_use_is_refused(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with addcow_mp.open(top, writable=True):
        assert "in use" in refused("snapshot", TOP, NEW, cwd=tmp_path)
    with addcow_mp.open(top):
        made = addcow_mp.snapshot(top, tmp_path / NEW)
    assert (made.size, made.cluster_size, made.backing) == (3 * CLUSTER, CLUSTER, str(top))
    assert virtual_size(tmp_path / NEW) == 3 * CLUSTER
