"""Tests of overlays that are reached through links: every path means the same overlay.

Links stand in another directory than their overlays, beside files of the same names with other
content. A command that follows the link's directory would show or change the wrong data.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import addcow_mp
from support.command import (
    CLUSTER,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    look,
    read_header,
    refused,
    snapshot,
    succeed,
)

pytestmark = pytest.mark.sample(1)

TOP = "top.add-cow"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A chain of three in ``store``; in ``desk`` files with the names of its files."""
    home, desk = tmp_path / "store", tmp_path / "desk"
    for directory in (home, desk):
        directory.mkdir()
    draw_raw(home / "base.img", "ABC")
    draw(home / "mid.add-cow", "M--", "base.img")
    draw(home / TOP, "-X-", "mid.add-cow", backing_format="add-cow")
    for name in ("base.img", "mid.raw", "top.raw"):
        draw_raw(desk / name, "SSS")
    return home


def linked_file(store: Path) -> str:
    (store.parent / "desk" / TOP).symlink_to(f"../store/{TOP}")
    return f"desk/{TOP}"


def link_to_a_link(store: Path) -> str:
    (store.parent / "desk" / "again").symlink_to(store / TOP)
    (store.parent / "desk" / TOP).symlink_to("again")
    return f"desk/{TOP}"


def linked_directory(store: Path) -> str:
    (store.parent / "desk" / "dir").symlink_to("../store")
    return f"desk/dir/{TOP}"


def back_out_of_a_directory(store: Path) -> str:
    # As text this is desk/top.add-cow; for the kernel ".." is the parent of where the link leads.
    (store / "sub").mkdir()
    (store.parent / "desk" / "dir").symlink_to(store / "sub")
    return f"desk/dir/../{TOP}"


def absolute(store: Path) -> str:
    return str(store.parent / linked_file(store))


WAYS = pytest.mark.parametrize(
    "way", [linked_file, link_to_a_link, linked_directory, back_out_of_a_directory, absolute]
)
CopyMethod = Callable[[Path], str]


def strangers(store: Path) -> str:
    desk = store.parent / "desk"
    return "".join(look(desk / name) for name in ("base.img", "mid.raw", "top.raw"))


@WAYS
def test_every_command_reads_the_same_through_a_link(store: Path, way: CopyMethod) -> None:
    here, path = store.parent, way(store)
    succeed("manifest", "create", "-q", path, cwd=here)
    assert (store / f"{TOP}.manifest").exists()
    before = snapshot(here)
    assert "No errors" in succeed("check", path, cwd=here).stdout
    succeed("verify", path, cwd=here)
    succeed("io", "-r", "-c", f"read -P 0x4d 0 {CLUSTER}", path, cwd=here)
    chain = succeed("info", "--output", "json", "--backing-chain", path, cwd=here).json
    assert (here / chain[0]["full-backing-filename"]).samefile(store / "mid.add-cow")
    assert [Path(one["filename"]).name for one in chain] == [TOP, "mid.add-cow", "base.img"]
    assert str(store / "mid.raw") in succeed("map", path, cwd=here).stdout
    succeed("compare", path, f"store/{TOP}", cwd=here)
    assert snapshot(here) == before
    succeed("convert", "-O", "raw", path, "new.raw", cwd=here)
    assert look(here / "new.raw") == "MXC"


@WAYS
def test_commit_through_a_link_writes_into_its_own_base(store: Path, way: CopyMethod) -> None:
    succeed("commit", way(store), cwd=store.parent)
    assert guest_picture(store / "mid.add-cow") == "MXC"
    assert bits(store / TOP) == "..."
    assert strangers(store) == "SSS" * 3


@WAYS
def test_flatten_and_discard_through_a_link_keep_the_link(store: Path, way: CopyMethod) -> None:
    path = way(store)
    succeed("flatten", "--verify", "--discard", path, cwd=store.parent)
    assert look(store / "top.raw") == "MXC"
    assert not (store / TOP).exists()
    assert strangers(store) == "SSS" * 3


@WAYS
def test_write_through_a_link_goes_into_its_own_image(store: Path, way: CopyMethod) -> None:
    succeed("io", "-c", f"write -P 0x59 0 {CLUSTER}", way(store), cwd=store.parent)
    assert guest_picture(store / TOP) == "YXC"
    assert strangers(store) == "SSS" * 3


def test_repair_through_a_link_keeps_its_backup_beside_the_file(store: Path) -> None:
    path = linked_file(store)
    with open(store / TOP, "r+b") as file:
        file.seek(CLUSTER)
        file.write(b"\xff")
    succeed("check", "-r", "all", path, cwd=store.parent)
    assert (store / f"{TOP}.backup-1").exists()
    assert not list((store.parent / "desk").glob("*.backup-*"))
    succeed("commit", path, cwd=store.parent)


@pytest.mark.long
def test_layers_of_a_chain_may_be_links(store: Path) -> None:
    here = store.parent
    (here / "deep").mkdir()
    draw(here / "deep" / "lower.add-cow", "L--", "../store/base.img")
    (store / "link.add-cow").symlink_to("../deep/lower.add-cow")
    draw_raw(store / "lower.raw", "SSS")
    draw(store / "upper.add-cow", "-U-", "link.add-cow", backing_format="add-cow")
    roots = ("--root", "deep", "store/upper.add-cow")
    succeed("check", *roots, cwd=here)
    succeed("convert", "-O", "raw", *roots, "new.raw", cwd=here)
    assert look(here / "new.raw") == "LUC"
    succeed("commit", *roots, cwd=here)
    assert guest_picture(here / "deep" / "lower.add-cow") == "LUC"
    assert look(store / "lower.raw") == "SSS"


# ---- where names may lead ----


@pytest.mark.long
def test_directory_of_a_link_is_no_root(store: Path) -> None:
    here = store.parent
    draw(store / "out.add-cow", "X--", "../desk/base.img")
    (here / "desk" / "out.add-cow").symlink_to("../store/out.add-cow")
    before = snapshot(here)
    for words in (("map",), ("commit",), ("io", "-r", "-c", "read 0 512")):
        assert f"--root {here / 'desk'}" in refused(*words, "desk/out.add-cow", cwd=here)
    assert snapshot(here) == before


@pytest.mark.parametrize("words", [("commit",), ("flatten",), ("flatten", "--discard")])
def test_link_in_a_farm_leads_only_beneath_its_directories(
    store: Path, words: tuple[str, ...]
) -> None:
    """Who may make a link in a farm must not have another's images written."""
    here = store.parent
    (here / "desk" / "trap.add-cow").symlink_to(f"../store/{TOP}")
    (here / "desk" / "notes").symlink_to("../store/base.img")
    draw(here / "desk" / "own.add-cow", "X--", "base.img")
    before = snapshot(store)
    report = succeed("farm", "ls", "--output", "json", "desk", cwd=here).json
    assert {one["filename"]: one["state"] for one in report["images"]} == {
        "desk/own.add-cow": "overlay",
        "desk/trap.add-cow": "unexamined",
    }
    checked = addcow("farm", "check", "--output", "json", "desk", cwd=here)
    assert checked.status == 1
    (trap,) = [one for one in checked.json["images"] if one["exit"]]
    assert f"--root {store}" in trap["findings"][0]["message"]
    done = addcow("farm", *words, "--output", "json", "desk", cwd=here)
    states = {one["filename"]: one["state"] for one in done.json["images"]}
    assert states == {"desk/own.add-cow": "done", "desk/trap.add-cow": "refused"}
    assert snapshot(store) == before
    succeed("farm", words[0], "--root", "store", "desk/trap.add-cow", cwd=here)


# ---- farms ----


def test_farm_lists_an_image_once_through_links(store: Path) -> None:
    here = store.parent
    desk = here / "desk"
    for number, name in enumerate((TOP, "mid.add-cow", TOP)):
        (desk / f"{number}.add-cow").symlink_to(store / name)
    (desk / "dir").symlink_to(store)
    own = {"store/mid.add-cow", f"store/{TOP}"}
    places = ("desk/0.add-cow", ".", "store", "desk", f"desk/dir/{TOP}")
    for words in (("ls",), ("check",), ("plan", "flatten"), ("graph",)):
        result = succeed("farm", *words, "--output", "json", *places, cwd=here).json
        names = [one["filename"] for one in result["images"]]
        assert {os.path.normpath(name) for name in names} == own, words
        assert len(names) == 2, words
    report = succeed("farm", "ls", "--output", "json", "desk/0.add-cow", cwd=here).json
    assert [one["filename"] for one in report["images"]] == ["desk/0.add-cow"]
    succeed("manifest", "create", "-q", "desk/0.add-cow", cwd=here)
    succeed("farm", "verify", *places, cwd=here)
    report = succeed("farm", "commit", "--output", "json", *places, cwd=here).json
    assert [one["state"] for one in report["images"]] == ["done", "done"]
    assert look(store / "base.img") == "MXC"
    assert strangers(store) == "SSS" * 3


@pytest.mark.long
def test_farm_of_links_changes_the_files_behind_the_links(store: Path) -> None:
    here = store.parent
    (here / "links").mkdir()
    for name in (TOP, "mid.add-cow"):
        (here / "links" / name).symlink_to(store / name)
    words = ("--root", "store", "links")
    graph = succeed("farm", "graph", "--output", "json", *words, cwd=here).json
    assert not any(one["marks"] for one in (*graph["images"], *graph["files"]))
    assert succeed("farm", "check", "--output", "json", *words, cwd=here).json["summary"]["clean"]
    report = succeed("farm", "commit", "--output", "json", *words, cwd=here).json
    assert [one["state"] for one in report["images"]] == ["done", "done"]
    assert look(store / "base.img") == "MXC"


def test_discard_of_a_farm_of_links_removes_the_files(store: Path) -> None:
    here = store.parent
    (here / "links").mkdir()
    (here / "links" / TOP).symlink_to(store / TOP)
    succeed("farm", "flatten", "--discard", "--root", "store", "links", cwd=here)
    assert not (store / TOP).exists()
    assert look(store / "top.raw") == "MXC"


# ---- create ----


def create(name: str, where: str, cwd: Path) -> tuple[str, str]:
    """Create ``where`` over ``name``; which names it holds."""
    result = addcow("create", "-b", name, "-F", "raw", where, cwd=cwd)
    assert result.status == 0, result
    header = read_header(cwd / where)
    return header.backing, header.image


def test_create_refuses_a_name_that_means_two_files(store: Path) -> None:
    here = store.parent
    draw_raw(here / "base.img", "ZZZ")
    before = snapshot(here)
    words = ("create", "-F", "raw", "-b", "base.img", "store/new.add-cow")
    said = refused(*words, cwd=here)
    assert str(store / "base.img") in said
    assert str(here / "base.img") in said
    image = ("create", "-o", "image_file=base.img", "store/new.add-cow")
    assert str(here / "base.img") in refused(*image, cwd=here)
    assert snapshot(here) == before
    (here / "base.img").unlink()
    (here / "base.img").symlink_to("store/base.img")
    assert create("base.img", "store/new.add-cow", here) == ("base.img", "new.raw")


def test_create_stores_a_name_of_the_working_directory_relative_to_the_overlay(store: Path) -> None:
    here = store.parent
    assert create("desk/base.img", "store/new.add-cow", here)[0] == "../desk/base.img"
    succeed("map", "--root", "desk", "store/new.add-cow", cwd=here)


@pytest.mark.long
@pytest.mark.parametrize(
    "typed", ["dir/../base.img", "dir/../../store/base.img", "./sub/../base.img"]
)
def test_create_stores_a_working_name_through_links(store: Path, typed: str) -> None:
    here = store.parent
    (store / "sub").mkdir()
    (store / "dir").symlink_to("sub")
    (here / "way").symlink_to("store/sub")
    backing, image = create(typed, "way/../new.add-cow", here)
    assert (backing, image) == ("base.img", "new.raw")
    assert guest_picture(store / "new.add-cow") == "ABC"
    assert create("../base.img", "way/new.add-cow", here) == ("../base.img", "new.raw")
    assert (store / "sub" / "new.raw").exists()


def test_create_stores_absolute_names_as_typed(store: Path) -> None:
    here = store.parent
    (here / "way").symlink_to("store")
    for typed in (
        f"{here}/way/base.img",
        f"/{store}//./base.img",
        f"{here}/desk/../store/base.img",
    ):
        assert create(typed, "store/new.add-cow", here)[0] == typed
        assert guest_picture(store / "new.add-cow") == "ABC"
        succeed("map", "store/new.add-cow", cwd=here)
        (store / "new.add-cow").unlink()


def test_overlay_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    backing, image = create("base.img", "vm:1.add-cow", tmp_path)
    assert (backing, image) == ("base.img", "./vm:1.raw")
    succeed("io", "-r", "-c", f"read -P 0x41 0 {CLUSTER}", "vm:1.add-cow", cwd=tmp_path)


# ---- hard links ----


@pytest.fixture
def twins(store: Path) -> Path:
    """The overlay and its second name, in another directory."""
    os.link(store / TOP, store.parent / "desk" / "twin.add-cow")
    return store


def hard_link_image(store: Path) -> None:
    os.link(store / "top.raw", store.parent / "desk" / "twin.raw")


def hard_link_cow(store: Path) -> None:
    os.link(store / TOP, store.parent / "desk" / "twin.add-cow")


def hard_link_backing(store: Path) -> None:
    os.link(store / "mid.add-cow", store.parent / "desk" / "mid.add-cow")


def hard_link_backing_image(store: Path) -> None:
    os.link(store / "mid.raw", store.parent / "desk" / "twin.raw")


LINKERS = [hard_link_cow, hard_link_image, hard_link_backing, hard_link_backing_image]
WRITERS = (("flatten",), ("flatten", "--discard"), ("io", "-c", "write 0 512"))


@pytest.mark.parametrize("link", LINKERS)
def test_hard_linked_files_are_read_with_a_warning_and_not_written(
    store: Path, link: Callable[[Path], None]
) -> None:
    link(store)
    before = snapshot(store.parent)
    for words in (("info", "--backing-chain"), ("map",), ("io", "-r", "-c", "read 0 512")):
        result = succeed(*words, TOP, cwd=store)
        assert "warning: " in result.stderr
        assert "2 hard links" in result.stderr
    own = link in (hard_link_cow, hard_link_image)
    for words in (("commit",), ("commit", "-d"), *(WRITERS if own else ())):
        if own and words == ("commit", "-d"):
            continue
        said = refused(*words, TOP, cwd=store)
        assert "2 hard links" in said
        assert "--force" in said
    plan = addcow("farm", "plan", "commit", "--output", "json", TOP, cwd=store)
    assert [one["state"] for one in plan.json["images"]] == ["refused"]
    assert snapshot(store.parent) == before
    assert "2 hard links" in succeed("check", TOP, cwd=store).stderr or not own
    succeed("commit", "--force", TOP, cwd=store)
    assert guest_picture(store / "mid.add-cow") == "MXC"


@pytest.mark.long
def test_repair_and_create_refuse_hard_linked_files(store: Path) -> None:
    hard_link_image(store)
    draw(store / "leaky.add-cow", "X-y", "base.img")
    os.link(store / "leaky.raw", store / "twin.raw")
    before = snapshot(store.parent)
    assert "2 hard links" in refused("check", "-r", "leaks", "leaky.add-cow", cwd=store)
    os.link(store / "base.img", store / "disk.img")
    words = ("create", "-o", "image_file=disk.img", "new.add-cow")
    assert "2 hard links" in refused(*words, cwd=store)
    (store / "disk.img").unlink()
    assert snapshot(store.parent) == before
    assert addcow("check", "-r", "leaks", "--force", "leaky.add-cow", cwd=store).status == 0
    os.link(store / "base.img", store / "disk.img")
    succeed("create", "--force", "-o", "image_file=disk.img", "new.add-cow", cwd=store)


@pytest.mark.long
def test_hard_link_in_another_directory_is_not_committed(twins: Path) -> None:
    """A commit through it went into the base beside it, and dropped what the first one held."""
    desk = twins.parent / "desk"
    shutil.copy(twins / "mid.add-cow", desk / "mid.add-cow")
    before = snapshot(twins.parent)
    for words in (("commit",), ("flatten",)):
        assert "2 hard links" in refused(*words, "twin.add-cow", cwd=desk)
    assert snapshot(twins.parent) == before
    result = addcow("farm", "commit", "--output", "json", ".", cwd=twins.parent)
    states = {Path(one["filename"]).name: one["state"] for one in result.json["images"]}
    assert states["twin.add-cow"] == "refused"
    assert guest_picture(twins / TOP) == "MXC"


def test_hard_linked_raw_backing_is_reported(store: Path) -> None:
    os.link(store / "base.img", store.parent / "desk" / "golden.img")
    said = succeed("commit", "--force", "mid.add-cow", cwd=store).stderr
    assert "base.img: it has 2 hard links" in said


# ---- io and dependants ----


@pytest.mark.parametrize("name", ["mid.add-cow", "vm.add-cow"])
@pytest.mark.parametrize("word", ["write", "aio_write", "writev", "write -z"])
def test_io_refuses_a_write_beneath_other_overlays(store: Path, name: str, word: str) -> None:
    if name == "vm.add-cow":
        draw(store / name, "V--", "base.img")
        draw(store / "user.add-cow", "---", "vm.raw")
    before = snapshot(store)
    said = refused("io", "-c", f"{word} 0 {CLUSTER}", name, cwd=store)
    assert f"depend on it: {store / ('user.add-cow' if name[0] == 'v' else TOP)}" in said
    assert snapshot(store) == before
    reads = ("io", "-c", "read 0 512", "-c", "flush", "-c", "write 0 0", name)
    assert succeed(*reads, cwd=store).stderr == ""
    succeed("io", "--force", "-c", f"{word} 0 {CLUSTER}", name, cwd=store)


def test_io_continues_after_a_refused_write(store: Path) -> None:
    words = ("io", "-c", "write 0 512", "-c", "read -P 0x4d 0 512", "mid.add-cow")
    result = addcow(*words, cwd=store)
    assert result.status == 1
    assert "read 512/512 bytes at offset 0" in result.stdout
    assert result.stderr.count("\n") == 1


def test_python_interface_refuses_a_write_beneath_other_overlays(store: Path) -> None:
    before = snapshot(store)
    with addcow_mp.open(store / "mid.add-cow", writable=True) as disk:
        assert disk.read(0, 1) == b"M"
        with pytest.raises(addcow_mp.DependantsError):
            disk.write(0, b"x")
        with pytest.raises(addcow_mp.DependantsError):
            disk.write_zeroes(0, 512)
    assert snapshot(store) == before
    forced = addcow_mp.Access(force=True)
    with addcow_mp.open(store / "mid.add-cow", writable=True, access=forced) as disk:
        disk.write(0, b"x" * 512)
    os.link(store / TOP, store / "twin.add-cow")
    with (
        addcow_mp.open(store / TOP, writable=True) as disk,
        pytest.raises(addcow_mp.HardLinksError, match="2 hard links"),
    ):
        disk.write(0, b"x")
