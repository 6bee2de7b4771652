"""Tests of dependants: commit, flatten and --discard refuse to change files of other overlays.

A refusal exits with 1, lists the dependants in one line and changes nothing. --force overrides
it, except for an image file of two overlays. Two overlays of one base do not hinder each other's
flatten.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    TiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    look,
    overlay_bytes,
    pair,
    patch,
    ran,
    refused,
    snapshot,
    succeed,
)
from support.file_systems import nest, unnest

pytestmark = pytest.mark.sample(1)

TOP, BASE, OTHER = "top.add-cow", "base.img", "other.add-cow"
DEEP = 1200


def named(image: str = "other.raw", backing: str = BASE, backing_format: str = "raw") -> bytes:
    """Return an overlay file of three clusters that names these files."""
    return overlay_bytes(
        image=image,
        size=3 * CLUSTER,
        backing=backing,
        backing_format=backing_format,
        compatible=0 if backing else ALL_ALLOCATED,
    )


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with a base and one overlay over it."""
    draw_raw(tmp_path / BASE, "ABC")
    draw(tmp_path / TOP, "-X-")
    return tmp_path


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """The same with an overlay in the middle."""
    draw_raw(tmp_path / BASE, "ABC")
    draw(tmp_path / "mid.add-cow", "M--")
    draw(tmp_path / TOP, "-X-", "mid.add-cow", backing_format="add-cow")
    return tmp_path


def assert_refused(here: Path, *words: str, of: str, dependants: tuple[str | Path, ...]) -> str:
    """Insist on a refusal that names the file and lists exactly these, and on no change."""
    before = snapshot(here)
    line = refused(*words, cwd=here)
    listed = ", ".join(sorted(os.path.realpath(here / each) for each in dependants))
    assert f"{of}: other overlays depend on it: {listed}; " in line
    assert snapshot(here) == before
    return line


def assert_alone(here: Path, *words: str) -> None:
    """Insist that the job finds no dependant, and does what it is for."""
    succeed(*words, cwd=here)


# ---- what is asked for ----


def test_commit_checks_for_dependants_of_its_raw_backing(here: Path) -> None:
    (here / OTHER).write_bytes(named())
    line = assert_refused(here, "commit", TOP, of=BASE, dependants=(OTHER,))
    assert "--force" in line
    succeed("commit", "--force", TOP, cwd=here)
    assert look(here / BASE) == "AXC"
    assert bits(here / TOP) == "..."


def test_commit_d_checks_for_dependants_too(here: Path) -> None:
    (here / OTHER).write_bytes(named())
    assert_refused(here, "commit", "-d", TOP, of=BASE, dependants=(OTHER,))


def test_commit_checks_for_dependants_of_its_add_cow_backing(chain: Path) -> None:
    (chain / OTHER).write_bytes(named(backing="mid.add-cow", backing_format="add-cow"))
    assert_refused(chain, "commit", TOP, of="mid.add-cow", dependants=(OTHER,))
    succeed("commit", "--force", TOP, cwd=chain)
    assert guest_picture(chain / "mid.add-cow") == "MXC"


@pytest.mark.long
def test_commit_checks_for_dependants_of_the_backings_image(chain: Path) -> None:
    (chain / OTHER).write_bytes(named(backing="mid.raw"))
    assert_refused(chain, "commit", TOP, of="mid.raw", dependants=(OTHER,))
    succeed("commit", "--force", TOP, cwd=chain)


@pytest.mark.long
def test_commit_checks_for_dependants_of_the_overlays_image(here: Path) -> None:
    (here / OTHER).write_bytes(named(backing="top.raw"))
    assert_refused(here, "commit", TOP, of="top.raw", dependants=(OTHER,))
    succeed("commit", "--force", TOP, cwd=here)


def test_commit_ignores_dependants_of_files_below_its_backing(chain: Path) -> None:
    (chain / OTHER).write_bytes(named(backing=BASE))
    assert_alone(chain, "commit", TOP)
    assert guest_picture(chain / "mid.add-cow") == "MXC"


@pytest.mark.long
def test_flatten_checks_for_dependants_of_its_image(here: Path) -> None:
    (here / OTHER).write_bytes(named(backing="top.raw"))
    assert_refused(here, "flatten", TOP, of="top.raw", dependants=(OTHER,))
    succeed("flatten", "--force", TOP, cwd=here)
    assert look(here / "top.raw") == "AXC"


def test_flatten_ignores_overlays_above_and_siblings(here: Path) -> None:
    (here / OTHER).write_bytes(named())
    (here / "above.add-cow").write_bytes(named(backing=TOP, backing_format="add-cow"))
    assert_alone(here, "flatten", TOP)


@pytest.mark.long
def test_discard_checks_for_dependants_of_the_add_cow_file(here: Path) -> None:
    (here / "above.add-cow").write_bytes(named(backing=TOP, backing_format="add-cow"))
    assert_refused(here, "flatten", "--discard", TOP, of=TOP, dependants=("above.add-cow",))
    succeed("flatten", TOP, cwd=here)
    assert_refused(here, "flatten", "--discard", TOP, of=TOP, dependants=("above.add-cow",))
    succeed("flatten", "--discard", "--force", TOP, cwd=here)
    assert not (here / TOP).exists()


@pytest.mark.long
def test_reading_commands_do_not_check_for_dependants(here: Path) -> None:
    (here / OTHER).write_bytes(named(image="top.raw"))
    for words in (("info",), ("map",), ("io", "-r", "-c", "map")):
        succeed(*words, TOP, cwd=here)
    succeed("convert", "-O", "raw", TOP, "new.raw", cwd=here)


# ---- found by content, whatever the name ----


@pytest.mark.parametrize(
    "name",
    [
        *("photo.jpg", ".hidden", "no suffix", "base.img.bak", "x\ny", "é\u202e.add-cow", "-r"),
        "top.add-cow.backup-1",  # what repair calls its backups, but this one has its own image
    ],
)
def test_dependant_is_found_whatever_its_name(here: Path, name: str) -> None:
    (here / name).write_bytes(named())
    before = snapshot(here)
    line = refused("commit", TOP, cwd=here)
    assert name.replace("\n", "\\n") in line
    assert snapshot(here) == before


def test_refusal_lists_all_dependants(here: Path) -> None:
    names = tuple(f"vm{number}.add-cow" for number in range(12))
    for name in names:
        (here / name).write_bytes(named())
    assert_refused(here, "commit", TOP, of=BASE, dependants=names)


def test_file_with_the_suffix_only_is_no_dependant(here: Path) -> None:
    (here / OTHER).write_bytes(b"QFI\xfb" + named()[4:])
    assert_alone(here, "commit", TOP)


def test_overlay_of_another_base_is_no_dependant(here: Path) -> None:
    draw_raw(here / "other-base.img", "ABC")
    (here / OTHER).write_bytes(named(backing="other-base.img"))
    (here / "lone.add-cow").write_bytes(named(image="lone.raw", backing=""))
    (here / "broken.add-cow").write_bytes(named(image="gone.raw", backing="gone.img"))
    assert_alone(here, "commit", TOP)


# ---- named by inode ----


def hard_link(here: Path) -> str:
    (here / "same.img").hardlink_to(here / BASE)
    return "same.img"


def symbolic_link(here: Path) -> str:
    (here / "link.img").symlink_to(BASE)
    return "link.img"


def linked_directory(here: Path) -> str:
    (here / "dir").symlink_to(here)
    return f"dir/dir/{BASE}"


def way_round(here: Path) -> str:
    (here / "sub").mkdir()
    return f"sub/..//./sub/../{BASE}"


def absolute(here: Path) -> str:
    return str(here / BASE)


def dotted(here: Path) -> str:
    return f"./{BASE}"


SPELLINGS = (hard_link, symbolic_link, linked_directory, way_round, absolute, dotted)


@pytest.mark.parametrize("spell", SPELLINGS)
def test_dependant_is_found_however_it_spells_the_name(
    here: Path, spell: Callable[[Path], str]
) -> None:
    (here / OTHER).write_bytes(named(backing=spell(here)))
    assert_refused(here, "commit", TOP, of=BASE, dependants=(OTHER,))


@pytest.mark.parametrize("spell", SPELLINGS)
def test_dependant_is_found_however_the_chain_spells_the_name(
    here: Path, spell: Callable[[Path], str]
) -> None:
    (here / OTHER).write_bytes(named())
    (here / TOP).write_bytes(named(image="top.raw", backing=spell(here)))
    assert "other overlays depend on it" in refused("commit", TOP, cwd=here)


# ---- where ----


def farm(tmp_path: Path) -> None:
    """Make directories for bases, overlays and images, as large farms have them."""
    for name in ("bases", "overlays", "images", "elsewhere/a/b"):
        (tmp_path / name).mkdir(parents=True)
    draw_raw(tmp_path / "bases" / BASE, "ABC")
    draw_raw(tmp_path / "images" / "top.raw", "-X-")
    top = tmp_path / "overlays" / TOP
    top.write_bytes(named(image="../images/top.raw", backing=f"../bases/{BASE}"))
    patch(top, CLUSTER, b"\2")


ROOTS = ("--root", "bases", "--root", "images")


@pytest.mark.parametrize("place", ["bases", "overlays", "images"])
@pytest.mark.parametrize("keep", [(), ("-d",)])
def test_dependants_are_searched_in_every_directory_of_the_chain(
    tmp_path: Path, place: str, keep: tuple[str, ...]
) -> None:
    farm(tmp_path)
    other = Path(place, OTHER)
    (tmp_path / other).write_bytes(named(backing=f"../bases/{BASE}"))
    words = ("commit", *keep, *ROOTS, f"overlays/{TOP}")
    assert_refused(tmp_path, *words, of=BASE, dependants=(other,))


def test_flatten_searches_beside_the_overlay(tmp_path: Path) -> None:
    farm(tmp_path)
    other = Path("overlays", OTHER)
    (tmp_path / other).write_bytes(named(backing="../images/top.raw"))
    words = ("flatten", *ROOTS, f"overlays/{TOP}")
    assert_refused(tmp_path, *words, of="top.raw", dependants=(other,))


@pytest.mark.long
@pytest.mark.parametrize("place", ["elsewhere", "elsewhere/a/b"])
def test_roots_are_searched_to_the_bottom(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm(tmp_path)
    other = Path(place, "deep")
    (tmp_path / other).write_bytes(named(backing=str(tmp_path / "bases" / BASE)))
    words = ("commit", *ROOTS, "--root", "elsewhere", f"overlays/{TOP}")
    assert_refused(tmp_path, *words, of=BASE, dependants=(other,))
    roots = ":".join(str(tmp_path / name) for name in ("bases", "images", "elsewhere"))
    monkeypatch.setenv("ADDCOW_ROOTS", roots)
    assert_refused(tmp_path, "commit", f"overlays/{TOP}", of=BASE, dependants=(other,))


def test_dependants_outside_the_searched_directories_are_not_found(tmp_path: Path) -> None:
    farm(tmp_path)
    path = tmp_path / "elsewhere" / OTHER
    path.write_bytes(named(backing=str(tmp_path / "bases" / BASE)))
    assert_alone(tmp_path, "commit", *ROOTS, f"overlays/{TOP}")


def test_dependant_found_twice_is_listed_once(here: Path) -> None:
    (here / OTHER).write_bytes(named())
    words = ("commit", "--root", ".", "--root", str(here), TOP)
    assert_refused(here, *words, of=BASE, dependants=(OTHER,))


# ---- members of the own chain ----


@pytest.mark.long
def test_overlays_of_the_chain_are_no_dependants(chain: Path) -> None:
    (chain / "same.add-cow").symlink_to(TOP)
    assert_alone(chain, "commit", "--root", ".", TOP)
    assert_alone(chain, "flatten", "--root", ".", TOP)


@pytest.mark.long
def test_commit_within_a_chain_finds_other_dependants(chain: Path) -> None:
    assert_alone(chain, "flatten", "mid.add-cow")
    draw(chain / "mid.add-cow", "M--")
    draw(chain / OTHER, "---")
    assert_refused(chain, "commit", "mid.add-cow", of=BASE, dependants=(OTHER,))


@pytest.mark.long
def test_backup_of_a_repair_is_no_dependant(here: Path) -> None:
    patch(here / TOP, 300, b"junk")
    succeed("check", "-r", "all", TOP, cwd=here)
    assert_alone(here, "commit", TOP)
    assert_alone(here, "flatten", TOP)
    assert look(here / BASE) == "AXC"


@pytest.mark.long
def test_overlay_named_like_a_backup_is_a_dependant(here: Path) -> None:
    (here / TOP).rename(here / "vm.backup-3")
    assert_alone(here, "commit", "vm.backup-3")
    assert_alone(here, "flatten", "vm.backup-3")
    assert look(here / BASE) == "AXC"


# ---- one image file, two overlays ----

SHARED = "two overlays cannot share an image file"


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("job", [("commit",), ("flatten",), ("flatten", "--discard")])
def test_shared_image_is_refused_even_with_force(
    here: Path, job: tuple[str, ...], force: tuple[str, ...]
) -> None:
    (here / "same.raw").hardlink_to(here / "top.raw")
    (here / OTHER).write_bytes(named(image="same.raw"))
    patch(here / OTHER, 44, b"raw")
    before = snapshot(here)
    line = refused(*job, *force, TOP, cwd=here)
    assert OTHER in line
    assert SHARED in line or not force
    assert snapshot(here) == before


def test_repair_does_not_free_clusters_of_another_overlay(here: Path) -> None:
    (here / OTHER).write_bytes(named(image="top.raw"))
    view, before = guest_picture(here / TOP), snapshot(here)
    done = addcow("check", "-r", "leaks", OTHER, cwd=here)
    assert guest_picture(here / TOP) == view == "AXC"
    assert done.status in (1, 2)
    assert TOP in done.said
    assert snapshot(here) == before


def test_advice_of_a_repair_can_be_followed(here: Path) -> None:
    """An overlay over the image file itself: whether its bytes are garbage is not for us to say."""
    draw(here / TOP, "-Xy")
    (here / OTHER).write_bytes(named(backing="top.raw"))
    before = snapshot(here)
    done = addcow("check", "-r", "leaks", TOP, cwd=here)
    if done.status == 0:
        return
    assert OTHER in done.said
    assert snapshot(here) == before
    if "--force" in done.said:
        succeed("check", "-r", "leaks", "--force", TOP, cwd=here)
        assert look(here / "top.raw") == "0X0"


@pytest.mark.parametrize("spell", ["top.raw", "./top.raw", "same.raw", "link.raw"])
def test_create_refuses_the_image_of_another_overlay(here: Path, spell: str) -> None:
    (here / "same.raw").hardlink_to(here / "top.raw")
    (here / "link.raw").symlink_to("top.raw")
    before = snapshot(here)
    line = refused("create", "-o", f"image_file={spell}", "new.add-cow", cwd=here)
    assert TOP in line
    assert SHARED in line
    assert snapshot(here) == before


def test_create_searches_the_roots_for_users_of_the_image(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / OTHER).write_bytes(named(image="../free.raw", backing=""))
    draw_raw(here / "free.raw", "Q")
    words = ("create", "-o", "image_file=free.raw", "new.add-cow")
    line = refused(*words, "--root", "sub", cwd=here)
    assert OTHER in line
    assert SHARED in line
    assert not (here / "new.add-cow").exists()
    succeed(*words, cwd=here)


@pytest.mark.long
def test_backing_that_is_an_image_of_another_overlay_needs_force(here: Path) -> None:
    (here / OTHER).write_bytes(named(image=BASE, backing=""))
    assert_refused(here, "commit", TOP, of=BASE, dependants=(OTHER,))
    succeed("commit", "--force", TOP, cwd=here)
    assert look(here / BASE) == "AXC"


# ---- candidates that are no good ----


def damaged(here: Path, name: str, at: int, data: bytes) -> None:
    """Write an overlay of the base with some bytes of its header replaced."""
    content = bytearray(named())
    content[at : at + len(data)] = data
    (here / name).write_bytes(content)


def fill_with_rubbish(place: Path) -> None:
    """Put everything into a directory that could disturb a search of it."""
    (place / "magic").write_bytes(b"ACOW")
    (place / "short").write_bytes(named()[:75])
    (place / "empty").write_bytes(b"")
    huge = struct.pack("<I", 2**32 - 1)
    for field in (4, 8):  # where the backing's name is, and how long
        damaged(place, f"huge-{field}", field, huge)
        damaged(place, f"none-{field}", field, bytes(4))
    damaged(place, "far", 4, huge * 4)
    damaged(place, "nul", 76, b"\0")
    for name in (
        "nbd:localhost:1",
        "json:{}",
        "/proc/kmsg",
        "/dev/zero",
        "fifo",
        "a" * 900,
        "loop",
    ):
        (place / f"names-{abs(hash(name))}").write_bytes(named(name, name))
    with (place / "sparse").open("wb") as file:
        file.truncate(TiB)
    (place / "directory.add-cow").mkdir()
    (place / "loop").symlink_to("loop")
    (place / "round").symlink_to(".")
    (place / "dangling").symlink_to("nowhere")
    os.mkfifo(place / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(place / "socket"))


@pytest.mark.parametrize("options", [(), ("--root", ".")])
def test_files_that_are_no_overlays_do_not_stop_the_search(
    here: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)  # the path of a socket is short
    (here / "sub").mkdir()
    fill_with_rubbish(here)
    fill_with_rubbish(here / "sub")
    assert_alone(here, "commit", *options, TOP)
    assert look(here / BASE) == "AXC"


def test_dependant_is_found_among_other_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    fill_with_rubbish(here)
    (here / OTHER).write_bytes(named())
    line = refused("commit", TOP, cwd=here)
    assert str(here / OTHER) in line


@pytest.mark.parametrize(("at", "data"), [(20, b"\xff"), (24, b"\1"), (40, b"\0"), (60, b"\0")])
def test_damaged_overlay_is_a_dependant(here: Path, at: int, data: bytes) -> None:
    damaged(here, OTHER, at, data)
    assert_refused(here, "commit", TOP, of=BASE, dependants=(OTHER,))


@pytest.mark.long
def test_search_of_a_root_with_deeply_nested_directories(here: Path) -> None:
    nest(here, DEEP)
    try:
        assert_alone(here, "commit", "--root", ".", TOP)
    finally:
        unnest(here)
    assert look(here / BASE) == "AXC"


def without_override() -> list[str]:
    """Return what to put before a command so that permissions hold for root too."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed, and root reads everything")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


@pytest.mark.parametrize("size", [100, 64 * KiB])
def test_unreadable_file_counts_as_a_possible_dependant(here: Path, size: int) -> None:
    """Only force goes past it, unless it is too small for an overlay."""
    (here / OTHER).write_bytes(named()[:size])
    (here / OTHER).chmod(0)
    before = look(here / BASE)
    command = [*without_override(), sys.executable, "-m", "addcow_mp", "commit", TOP]
    for options in [[]] if size < 4 * KiB else [[], ["--force"]]:
        done = ran([*command, *options], cwd=here)
        if size >= 4 * KiB and not options:
            assert done.returncode == 1
            assert f"{OTHER}: it cannot be read, and may be an overlay" in done.stderr
            assert look(here / BASE) == before
    assert (done.returncode, done.stderr) == (0, "")
    assert look(here / BASE) == "AXC"


# ---- other names for files ----


def test_dependant_behind_a_link_is_found(tmp_path: Path) -> None:
    """Names inside are relative to where the file lies, and not to where the link is."""
    pair(tmp_path, "ABC", "X--")
    (tmp_path / "store").mkdir()
    draw(tmp_path / "store" / "b.add-cow", "-Y-", "../base.img")
    draw(tmp_path / "store" / "c.add-cow", "-Y-", "base.img")
    (tmp_path / "c.add-cow").symlink_to("store/c.add-cow")
    (tmp_path / "b.add-cow").symlink_to("store/b.add-cow")
    before = snapshot(tmp_path)
    said = refused("commit", "top.add-cow", cwd=tmp_path)
    assert f"depend on it: {tmp_path / 'b.add-cow'};" in said
    assert snapshot(tmp_path) == before


def test_hard_linked_overlay_is_a_dependant_in_each_directory(tmp_path: Path) -> None:
    """A hard link elsewhere has the same names in it, which mean other files there."""
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        directory.mkdir()
        draw_raw(directory / "base.img", "ABC")
    draw(there / "twin.add-cow", "-Y-", "base.img")
    os.link(there / "twin.add-cow", here / "twin.add-cow")
    draw(here / "top.add-cow", "X--", "../there/base.img")
    words = ("commit", "--root", str(there), "top.add-cow")
    assert str(there / "twin.add-cow") in refused(*words, cwd=here)
    assert look(there / "base.img") == "ABC"


@pytest.mark.long
def test_link_to_an_overlay_of_the_chain_is_no_dependant(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "X--")
    os.link(tmp_path / "top.add-cow", tmp_path / "hard.add-cow")
    (tmp_path / "soft.add-cow").symlink_to("top.add-cow")
    assert "2 hard links" in refused("commit", "top.add-cow", cwd=tmp_path)
    succeed("commit", "--force", "top.add-cow", cwd=tmp_path)
    assert look(tmp_path / "base.img") == "XBC"


def test_image_of_two_overlays_is_not_written(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "X--")
    shutil.copy(tmp_path / "top.add-cow", tmp_path / "copy.add-cow")
    before = snapshot(tmp_path)
    said = refused("io", "-c", "write -P 9 0 64k", "top.add-cow", cwd=tmp_path)
    assert "two overlays cannot share an image file" in said
    assert snapshot(tmp_path) == before
    succeed("io", "-r", "-c", "read 0 64k", "top.add-cow", cwd=tmp_path)
