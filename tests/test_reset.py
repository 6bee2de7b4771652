"""Tests of `addcow reset` and `addcow farm reset`: overlays go back to their backing files.

A guest sees all that it saw before, or the backing file; never a mixture, whatever interrupts it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import addcow_mp
import oracle
from addcow_mp.device.fault_rules import EVENTS
from addcow_mp.jobs.options import RunOptions
from addcow_mp.jobs.reset import reset
from support import model
from support.availability import missing
from support.call_trace import Trace
from support.chains import wild_chain
from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    look,
    pair,
    read_header,
    refused,
    same_content,
    snapshot,
    stored_bytes,
    succeed,
)
from support.fault_rules import Rules, rule
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

TOP = "top.add-cow"


def shown_by(files: model.Files) -> bytes:
    """What a guest sees of a layer; of a raw file all of its bytes."""
    if files.path == files.image:
        return Path(files.path).read_bytes()
    return oracle.guest_bytes(files.path)


# One overlay


@pytest.mark.sample(3)
@pytest.mark.parametrize("number", range(30))
def test_reset_shows_the_backing_file_again(
    tmp_path: Path, rng: random.Random, number: int
) -> None:
    files = model.build(wild_chain(rng, 256 * KiB), str(tmp_path))
    if files.backing is None:
        assert "no backing file" in refused("reset", "--force", TOP, cwd=tmp_path)
        return
    size, below = len(oracle.guest_bytes(files.path)), shown_by(files.backing)
    others = {path: Path(path).read_bytes() for path in files.below}
    length = os.path.getsize(files.image)
    told = succeed("reset", "--force", TOP, cwd=tmp_path)
    assert told.stdout == "Image reset.\n"
    assert oracle.guest_bytes(files.path) == below[:size].ljust(size, b"\0")
    assert oracle.allocated(files.path) == []
    assert os.path.getsize(files.image) == length
    assert {path: Path(path).read_bytes() for path in files.below} == others
    assert addcow("check", TOP, cwd=tmp_path).status == 0
    before = snapshot(tmp_path)
    succeed("reset", TOP, cwd=tmp_path)
    assert snapshot(tmp_path) == before


def test_reset_equals_the_base_for_qemu_and_frees_the_image(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "X-0b")
    succeed("manifest", "create", TOP, cwd=tmp_path)
    told = succeed("reset", "--output", "json", TOP, cwd=tmp_path).json
    assert (told["operation"], told["bytes-freed"]) == ("reset", 3 * CLUSTER)
    assert bits(top) == "...."
    assert stored_bytes(tmp_path / "top.raw") == 0
    succeed("verify", TOP, cwd=tmp_path)
    succeed("convert", "-O", "raw", TOP, "new.raw", cwd=tmp_path)
    same_content("new.raw", "base.img", cwd=tmp_path)
    succeed("verify", "-f", "raw", "base.img", cwd=tmp_path)


def test_leaf_of_a_chain_goes_back_to_its_parent(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "mid.add-cow", "-M--")
    draw(tmp_path / TOP, "T---", "mid.add-cow", backing_format="add-cow")
    succeed("reset", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / TOP) == "AMCD"


def test_reset_of_an_all_allocated_overlay_needs_force(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / TOP, "X-Y-", compatible=ALL_ALLOCATED)
    assert "go back to that with --force" in refused("reset", TOP, cwd=tmp_path)
    succeed("reset", "--force", TOP, cwd=tmp_path)
    assert guest_picture(tmp_path / TOP) == "ABCD"
    assert read_header(tmp_path / TOP).compatible == 0


def test_reset_accepts_a_file_that_ends_inside_its_bitmap(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "X---")
    whole = top.stat().st_size
    os.truncate(top, read_header(top).header_size)
    succeed("reset", TOP, cwd=tmp_path)
    assert top.stat().st_size == whole
    assert guest_picture(top) == "ABCD"
    assert stored_bytes(tmp_path / "top.raw") == 0


def test_reset_leaves_bytes_behind_the_virtual_size_alone(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "XXXX")
    with (tmp_path / "top.raw").open("ab") as file:
        file.write(b"tail" * 25)
    succeed("reset", TOP, cwd=tmp_path)
    assert (tmp_path / "top.raw").read_bytes() == bytes(4 * CLUSTER) + b"tail" * 25


def without_backing(here: Path) -> None:
    draw(here / TOP, "X-", "", compatible=ALL_ALLOCATED)


def above(here: Path) -> None:
    draw(here / "up.add-cow", "--", TOP, backing_format="add-cow")


def image_of_two(here: Path) -> None:
    shutil.copy(here / TOP, here / "twin.add-cow")


def lent(here: Path) -> None:
    if shutil.which("qemu-img") is None:
        missing("qemu-img is not installed")
    succeed("qemu", "export", TOP, cwd=here)


REFUSALS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "no backing": (without_backing, "no backing file to go back to", False),
    "backing gone": (lambda here: (here / "base.img").unlink(), "backing file 'base.img'", False),
    "overlay above": (above, "other overlays depend on it", False),
    "image of two": (image_of_two, "twin.add-cow", False),
    "lent": (lent, "'addcow qemu import' takes it back", False),
    "hard link": (lambda here: os.link(here / "top.raw", here / "x"), "2 hard links", True),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", REFUSALS)
def test_reset_is_refused_and_changes_nothing(tmp_path: Path, name: str) -> None:
    pair(tmp_path, "AB", "X-")
    arrange, words, yields = REFUSALS[name]
    arrange(tmp_path)
    before = snapshot(tmp_path)
    for options in ((), ("--dry-run",), *([] if yields else [("--force",)])):
        assert words in refused("reset", *options, TOP, cwd=tmp_path)
    assert snapshot(tmp_path) == before
    if yields:
        succeed("reset", "--force", TOP, cwd=tmp_path)


def test_reset_of_a_layer_below_a_lent_overlay_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "X-")
    draw(tmp_path / "up.add-cow", "-U", TOP, backing_format="add-cow")
    succeed("qemu", "export", "up.add-cow", cwd=tmp_path)
    assert "'addcow qemu import' takes it back" in refused("reset", "--force", TOP, cwd=tmp_path)


def test_dry_run_of_reset_says_what_it_frees_and_changes_nothing(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "X-")
    before = snapshot(tmp_path)
    told = succeed("reset", "--dry-run", TOP, cwd=tmp_path)
    assert told.stdout == "top.add-cow: reset; frees 64 KiB\n"
    told = succeed("reset", "--dry-run", "--output", "json", TOP, cwd=tmp_path)
    assert told.json["state"] == "ready"
    assert told.json["space-freed"] == CLUSTER
    assert snapshot(tmp_path) == before
    succeed("reset", TOP, cwd=tmp_path)
    assert "nothing to do" in succeed("reset", "--dry-run", TOP, cwd=tmp_path).stdout


# Several files


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three overlays of one base; ``b`` has another one above it."""
    draw_raw(tmp_path / "base.img", "ABCD")
    for name in "abc":
        draw(tmp_path / f"{name}.add-cow", "X---")
    draw(tmp_path / "up.add-cow", "-U--", "b.add-cow", backing_format="add-cow")
    return tmp_path


NAMES = ("a.add-cow", "missing", "b.add-cow", "base.img", "c.add-cow")


def test_refused_files_are_a_line_each_and_the_others_go_on(three: Path) -> None:
    result = addcow("reset", *NAMES, cwd=three)
    assert result.status == 1
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()] == [
        "missing",
        "b.add-cow",
        "base.img",
    ]
    assert result.stdout.splitlines() == [
        "a.add-cow: reset, 64 KiB freed",
        "c.add-cow: reset, 64 KiB freed",
    ]
    assert [bits(three / f"{name}.add-cow") for name in "abc"] == ["....", "1...", "...."]


def test_results_of_several_files_are_one_list(three: Path) -> None:
    told = addcow("reset", "--output", "json", *NAMES, cwd=three).json
    assert [one["filename"] for one in told] == list(NAMES)
    assert ["error" in one for one in told] == [False, True, True, True, False]


# A farm


def farm_reset(here: Path, *words: str, status: int) -> dict[str, Any]:
    """What `farm reset` counts."""
    result = addcow("farm", "reset", "--output", "json", *words, ".", cwd=here)
    assert result.status == status, result
    counts: dict[str, Any] = result.json["summary"]
    return counts


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_farm_reset_refuses_inner_layers_and_counts_them(
    three: Path, force: tuple[str, ...]
) -> None:
    planned = addcow("farm", "plan", "reset", "--output", "json", *force, ".", cwd=three).json
    assert (planned["summary"]["ready"], planned["summary"]["refused"]) == (3, 1)
    counts = farm_reset(three, *force, status=1)
    assert (counts["done"], counts["refused"], counts["images"]) == (3, 1, 4)
    assert guest_picture(three / "up.add-cow") == "XBCD"
    assert guest_picture(three / "a.add-cow") == "ABCD"
    counts = farm_reset(three, status=1)
    assert (counts["nothing-to-do"], counts["refused"]) == (3, 1)


def test_farm_reset_counts_lent_overlays_apart(three: Path) -> None:
    lent_name = "a.add-cow"
    if shutil.which("qemu-img") is None:
        missing("qemu-img is not installed")
    succeed("qemu", "export", lent_name, cwd=three)
    counts = farm_reset(three, status=1)
    assert (counts["done"], counts["refused"], counts["lent"]) == (2, 1, 1)
    assert "1 lent" in addcow("farm", "reset", ".", cwd=three).stdout


def test_farm_reset_by_several_processes_resets_every_image(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    for number in range(40):
        draw(tmp_path / f"vm{number}.add-cow", "XY--")
    result = succeed("farm", "reset", "--jobs", "2", ".", cwd=tmp_path)
    assert "40 images: 40 done" in result.stdout
    assert {bits(one) for one in tmp_path.glob("*.add-cow")} == {"...."}
    assert sum(map(stored_bytes, tmp_path.glob("vm*.raw"))) == 0


# Order and interruptions


def test_reset_keeps_the_order(tmp_path: Path, trace: Trace) -> None:
    draw_raw(tmp_path / "base.img", "ABC")
    top = tmp_path / TOP
    draw(top, "X-Y", compatible=ALL_ALLOCATED)
    (tmp_path / f"{TOP}.manifest").write_bytes(b"ADDCOW")
    reset(str(top), options=RunOptions(0, addcow_mp.Access(force=True)))
    assert trace.story() == [
        *(f"remove {TOP}.manifest", f"sync {tmp_path.name}/"),
        *("length top.add-cow", "sync top.add-cow"),
        *("header top.add-cow", "sync top.add-cow"),
        "free top.raw",
    ]


WALKED = (
    *("bitmap_cut", "bitmap_grow", "bitmap_sync", "header_write", "punch", "directory_sync"),
    *("header_read", "bitmap_load", "manifest_remove"),
)


def scene(here: Path, compatible: int) -> None:
    """An overlay with a manifest, garbage and, where it is set, stale bits.

    The base has no manifest, so that no new one is made; test_manifest_follows walks those.
    """
    draw_raw(here / "base.img", "ABCDEFGH")
    draw(here / TOP, "X-0bY---", compatible=compatible)
    succeed("manifest", "create", TOP, cwd=here)
    (here / "base.img.manifest").unlink(missing_ok=True)


def met(warm: Warm, tmp_path: Path, compatible: int) -> Iterator[str]:
    """The events that a reset meets."""
    for event in EVENTS:
        here = tmp_path / event
        here.mkdir()
        draw_raw(here / "base.img", "ABCDEFGH")
        draw(here / TOP, "X-0bY---", compatible=compatible)
        (here / f"{TOP}.manifest").write_bytes(b"ADDCOW")
        rules = Rules.write(tmp_path / "rules", rule(event))
        if warm.run("reset", "--force", TOP, cwd=here, rules=rules).status:
            yield event


@pytest.mark.parametrize("action", ["error", "kill"])
@pytest.mark.parametrize("event", WALKED)
@pytest.mark.parametrize("compatible", [0, ALL_ALLOCATED], ids=["bits", "flag"])
@pytest.mark.sample(3)
def test_interrupted_reset_shows_all_or_the_base_and_is_finished(
    warm: Warm, tmp_path: Path, compatible: int, event: str, action: str
) -> None:
    original = tmp_path / "original"
    original.mkdir()
    scene(original, compatible)
    old, base = guest_picture(original / TOP), "ABCDEFGH"
    for after in count():
        here = tmp_path / f"images-{after}"
        shutil.copytree(original, here)
        rules = Rules.write(tmp_path / "rules", rule(event, action, after=after, once="on"))
        ended = warm.run("reset", "--force", TOP, cwd=here, rules=rules)
        if not rules.struck:
            assert after or (event, compatible) == ("header_write", 0)
            return
        assert ended.status == (-signal.SIGKILL if action == "kill" else 1), ended
        told = [one for one in ended.stderr.splitlines() if "warning" not in one]
        assert len(told) == (action == "error")
        assert guest_picture(here / TOP) in (old, base)
        assert look(here / "base.img") == base
        succeed("reset", "--force", TOP, cwd=here)
        assert guest_picture(here / TOP) == base
        assert stored_bytes(here / "top.raw") == 0
        assert read_header(here / TOP).compatible == 0
        assert not (here / f"{TOP}.manifest").exists()
        succeed("check", TOP, cwd=here)


@pytest.mark.long
def test_walk_of_reset_covers_every_event(warm: Warm, tmp_path: Path) -> None:
    assert set(met(warm, tmp_path, ALL_ALLOCATED)) == set(WALKED)
