"""Tests of `addcow drop`: it removes an .add-cow file only where the image file is the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    addcow,
    draw,
    draw_raw,
    look,
    overlay_bytes,
    pair,
    read_header,
    refused,
    snapshot,
    succeed,
)

TOP = "top.add-cow"


def flagged(here: Path) -> None:
    draw_raw(here / "base.img", "AB")
    draw(here / TOP, "X-", compatible=ALL_ALLOCATED)


def by_bits(here: Path) -> None:
    pair(here, "AB", "XY")


@pytest.mark.parametrize("make", [flagged, by_bits])
def test_drop_leaves_the_raw_file_alone(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    succeed("manifest", "create", TOP, cwd=tmp_path)
    before = look(tmp_path / "top.raw")
    dropped, removed = succeed("drop", TOP, cwd=tmp_path).stdout.splitlines()
    assert dropped == "Image dropped."
    assert removed == f"Removed the manifest '{TOP}.manifest', which no longer applies."
    assert (
        {"base.img", "top.raw"}
        <= set(os.listdir(tmp_path))
        <= {*("base.img", "top.raw", "base.img.manifest")}
    )
    assert look(tmp_path / "top.raw") == before


def test_drop_cuts_bytes_that_no_guest_has_seen(tmp_path: Path) -> None:
    by_bits(tmp_path)
    with (tmp_path / "top.raw").open("ab") as file:
        file.write(b"tail" * 25)
    succeed("drop", TOP, cwd=tmp_path)
    assert (tmp_path / "top.raw").stat().st_size == 2 * CLUSTER


def partial(here: Path) -> None:
    pair(here, "AB", "X-")


def short(here: Path) -> None:
    """Eight clusters of which every bit that is in the file is set: there is none."""
    by_bits(here)
    os.truncate(here / TOP, read_header(here / TOP).header_size)


def needed(here: Path) -> None:
    by_bits(here)
    draw(here / "up.add-cow", "--", TOP, backing_format="add-cow")


def image_is_a_base(here: Path) -> None:
    """Another overlay stands on the raw file, of which the drop would cut the tail off."""
    by_bits(here)
    with (here / "top.raw").open("ab") as file:
        file.write(b"tail" * 25)
    (here / "up.raw").write_bytes(bytes(CLUSTER))
    (here / "up.add-cow").write_bytes(
        overlay_bytes(image="up.raw", size=CLUSTER, backing="top.raw")
    )


REFUSALS = {
    "partial": (partial, "not every cluster is allocated"),
    "short": (short, "not every cluster is allocated"),
    "needed": (needed, "other overlays depend on it"),
    "image is a base": (image_is_a_base, "other overlays depend on it"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_drop_is_refused_and_changes_nothing(tmp_path: Path, name: str) -> None:
    make, words = REFUSALS[name]
    make(tmp_path)
    before = snapshot(tmp_path)
    assert words in refused("drop", TOP, cwd=tmp_path)
    if words.startswith("not every"):
        assert words in refused("drop", "--force", TOP, cwd=tmp_path)
    assert snapshot(tmp_path) == before


def test_drop_of_several_files_goes_on_behind_a_refusal(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    for name, picture in (("a", "XY"), ("b", "X-"), ("mid", "XY")):
        draw(tmp_path / f"{name}.add-cow", picture)
    draw(tmp_path / "up.add-cow", "XY", "mid.add-cow", backing_format="add-cow")
    files = ("mid.add-cow", "a.add-cow", "b.add-cow", "up.add-cow", "mid.add-cow")
    result = addcow("drop", "--output", "json", *files, cwd=tmp_path)
    assert result.status == 1
    assert [one["filename"] for one in result.json] == list(files)
    # The layer is needed until the overlay above it is gone.
    assert ["error" in one for one in result.json] == [True, False, True, False, False]
    assert sorted(tmp_path.glob("*.add-cow")) == [tmp_path / "b.add-cow"]


def test_import_with_discard_keeps_an_overlay_that_another_one_needs(tmp_path: Path) -> None:
    by_bits(tmp_path)
    succeed("qemu", "export", TOP, cwd=tmp_path)
    draw(tmp_path / "up.add-cow", "--", TOP, backing_format="add-cow")
    message = refused("qemu", "import", "--discard", TOP, cwd=tmp_path)
    assert "other overlays depend on it" in message
    assert "taken back from QEMU; the .add-cow file was not removed" in message
    assert (tmp_path / TOP).exists()
