"""An overlay that is lent to QEMU: out through a qcow2 file beside it, and back.

QEMU's own tools judge: what they read through the twin is what the overlay showed, and what they
wrote is what the overlay shows when it is back.
"""

import json
import os
import random
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from support import model
from support.command import (
    ADDCOW,
    PATIENCE,
    addcow,
    draw,
    pair,
    patch,
    refused,
    snapshot,
    succeed,
    tool,
)
from support.fault_rules import VARIABLE, Rules, rule
from support.file_systems import fill, mounted
from support.lending import (
    features,
    node,
    qemu_io,
    random_layer,
    random_session,
    refuses,
    seen_by_qemu,
    twins,
    view,
)

pytestmark = pytest.mark.sample(1)

MiB = 1 << 20
LENT, LENT_FOR_READING = 1 << 63, 1 << 62

#: What a session does to the overlay of :func:`chain`.
SESSION = ("write -P 0x77 64k 4k", "write -z 256k 100k", "discard 0 64k")


def chain(directory: Path) -> bytes:
    """Make an overlay over an overlay over a raw base, with garbage; what its guest reads."""
    base = model.raw("EEEEEE", 64 * 1024)
    middle = model.overlay("-CD-C0", base, cluster_size=64 * 1024)
    top = model.overlay("A-b0-AB-", middle, cluster_size=64 * 1024, cut=512)
    model.build(top, str(directory))
    return bytes(model.view(top))


@pytest.mark.sample(3)
@pytest.mark.parametrize("number", range(60))
def test_random_overlays_go_out_and_come_back(
    tmp_path: Path, rng: random.Random, number: int
) -> None:
    layer = random_layer(rng)
    model.build(layer, str(tmp_path))
    content = model.view(layer)
    crash = rng.choice(["strict", "relaxed"])
    succeed("qemu", "export", "--crash", crash, "top.add-cow", cwd=tmp_path)
    tool("qemu-img", "check", node("top.add-cow", cwd=tmp_path), cwd=tmp_path)
    assert seen_by_qemu("top.add-cow", cwd=tmp_path) == content
    qemu_io("top.add-cow", *random_session(rng, content), cwd=tmp_path)
    tool("qemu-img", "check", node("top.add-cow", cwd=tmp_path), cwd=tmp_path)
    succeed("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert view("top.add-cow", cwd=tmp_path) == content
    succeed("check", "top.add-cow", cwd=tmp_path)
    assert twins(tmp_path) == {}
    assert all(features(one) == 0 for one in tmp_path.glob("*.add-cow"))


def test_export_copies_nothing_and_import_of_an_unused_overlay_changes_nothing(
    tmp_path: Path,
) -> None:
    pair(tmp_path, "ABCD", "A-0-")
    before = snapshot(tmp_path)
    told = succeed("qemu", "export", "--output", "json", "top.add-cow", cwd=tmp_path).json
    assert told["kind"] == "plain"
    assert told["twin"] == "top.qcow2"
    assert (tmp_path / "top.qcow2").stat().st_blocks * 512 <= 64 * 1024
    succeed("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert snapshot(tmp_path) == before


def test_complete_stream_sets_all_allocated_and_discard_leaves_the_raw_file(
    tmp_path: Path,
) -> None:
    content = chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    described = node("top.add-cow", cwd=tmp_path)
    # What block-stream leaves: every cluster allocated, and no backing file.
    for start in range(0, len(content), 64 * 1024):
        part = content[start : start + 64 * 1024]
        (tmp_path / "part").write_bytes(part)
        tool("qemu-io", "-c", f"write -s part {start} {len(part)}", described, cwd=tmp_path)
    _rebase_to_nothing(tmp_path)
    succeed("qemu", "import", "--discard", "top.add-cow", cwd=tmp_path)
    assert not (tmp_path / "top.add-cow").exists()
    assert (tmp_path / "top.raw").read_bytes() == content


def test_import_copies_up_what_qemu_has_not_and_writes_its_zeros(tmp_path: Path) -> None:
    content = bytearray(chain(tmp_path))
    succeed("qemu", "export", "--crash", "relaxed", "top.add-cow", cwd=tmp_path)
    qemu_io("top.add-cow", "write -P 0x77 68k 4k", "write -z 0 4k", cwd=tmp_path)
    content[68 * 1024 : 72 * 1024] = b"\x77" * 4096
    content[: 4 * 1024] = bytes(4096)
    succeed("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert view("top.add-cow", cwd=tmp_path) == content


def test_import_refuses_a_backing_that_was_removed_without_copying(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    _rebase_to_nothing(tmp_path)
    assert "its backing file was removed" in refused("qemu", "import", "top.add-cow", cwd=tmp_path)


def _rebase_to_nothing(directory: Path) -> None:
    """Take the backing file out of the twin's header, as `qemu-img rebase -u -b ""` does."""
    twin = directory / "top.qcow2"
    patch(twin, 8, bytes(12))


# What others see of it


def test_commands_that_change_a_lent_overlay_are_refused(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    before = snapshot(tmp_path)
    for words in (
        ("commit", "top.add-cow"),
        ("flatten", "top.add-cow"),
        ("commit", "--force", "top.add-cow"),
        ("check", "-r", "all", "--force", "top-base.add-cow"),
        ("flatten", "top-base.add-cow"),
        ("commit", "top-base.add-cow"),
        ("convert", "-O", "raw", "-U", "top.add-cow", "new.raw"),
        ("manifest", "create", "top.add-cow"),
        ("qemu", "export", "top.add-cow", "other.qcow2"),
    ):
        result = addcow(*words, cwd=tmp_path)
        assert result.status != 0, words
        assert "qemu import" in result.stderr, (words, result)
    assert snapshot(tmp_path) == before


def test_lent_overlay_is_described_and_clean(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    assert "QEMU through" in succeed("info", "top.add-cow", cwd=tmp_path).stdout
    assert "lent to QEMU" in succeed("check", "top.add-cow", cwd=tmp_path).stdout
    states = {
        os.path.basename(one["filename"]): one["state"]
        for one in succeed("farm", "ls", "--output", "json", ".", cwd=tmp_path).json["images"]
    }
    assert states == {"top.add-cow": "lent", "top-base.add-cow": "lent-for-reading"}
    succeed("farm", "check", ".", cwd=tmp_path)
    succeed("convert", "-O", "raw", "top-base.add-cow", "base.out", cwd=tmp_path)


def test_layer_below_is_lent_until_its_last_overlay_is_back(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("create", "-F", "add-cow", "-b", "top-base.add-cow", "other.add-cow", cwd=tmp_path)
    for name in ("top.add-cow", "other.add-cow"):
        succeed("qemu", "export", name, cwd=tmp_path)
    assert features(tmp_path / "top-base.add-cow") & LENT_FOR_READING
    told = succeed("qemu", "import", "top.add-cow", cwd=tmp_path).stderr
    assert "it was not taken back" in told
    assert features(tmp_path / "top-base.add-cow") & LENT_FOR_READING
    assert refuses("flatten", "top-base.add-cow", cwd=tmp_path)
    succeed("qemu", "import", "other.add-cow", cwd=tmp_path)
    assert features(tmp_path / "top-base.add-cow") == 0
    assert twins(tmp_path) == {}


def test_import_names_the_program_that_holds_the_twin(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    described = node("top.add-cow", cwd=tmp_path)
    with subprocess.Popen(
        ["qemu-io", described], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as holder:
        _until_locked(tmp_path)
        message = refused("qemu", "import", "top.add-cow", cwd=tmp_path)
        assert "qemu-io" in message
        assert f"pid {holder.pid}" in message
        told = succeed("qemu", "status", "--output", "json", "top.add-cow", cwd=tmp_path).json
        assert told["state"] == "lent"
        assert f"pid {holder.pid}" in told["holder"]
        succeed("check", "top.add-cow", cwd=tmp_path)
        holder.communicate(b"quit\n", timeout=PATIENCE)
    succeed("qemu", "import", "top.add-cow", cwd=tmp_path)


def _until_locked(directory: Path) -> None:
    """Wait until a program has the twin open."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        told = succeed("qemu", "status", "--output", "json", "top.add-cow", cwd=directory).json
        if told["holder"] is not None:
            return
    raise AssertionError("qemu-io has not opened the file")


def test_copy_of_a_farm_with_a_lent_overlay_cannot_write_into_the_original(tmp_path: Path) -> None:
    farm, copy = tmp_path / "farm", tmp_path / "copy"
    farm.mkdir()
    content = chain(farm)
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    tool("cp", "-a", "farm", "copy", cwd=tmp_path)
    before = snapshot(farm)
    opened = subprocess.run(
        ["qemu-io", "-c", "write 0 4k", "top.qcow2"], cwd=copy, capture_output=True, check=False
    )
    assert opened.returncode != 0
    assert b"give-data-file" in opened.stderr + opened.stdout
    assert "copy" in refused("qemu", "import", "top.add-cow", cwd=copy)
    succeed("qemu", "import", "--adopt", "top.add-cow", cwd=copy)
    assert view("top.add-cow", cwd=copy) == content
    assert snapshot(farm) == before


def test_copy_of_a_twin_with_an_absolute_name_is_a_finding_and_comes_back_only_when_adopted(
    tmp_path: Path,
) -> None:
    farm, copy = tmp_path / "farm", tmp_path / "copy"
    farm.mkdir()
    content = chain(farm)
    succeed("qemu", "export", "--absolute-data-file", "top.add-cow", cwd=farm)
    succeed("check", "top.add-cow", cwd=farm)
    assert _status(farm)["other-data-file"] is None
    tool("cp", "-a", "farm", "copy", cwd=tmp_path)
    original = str(farm.resolve() / "top.raw")
    assert _status(copy)["other-data-file"] == original
    assert original in succeed("qemu", "status", "top.add-cow", cwd=copy).stdout
    for words in (("check", "top.add-cow"), ("farm", "check", ".")):
        found = addcow(*words, cwd=copy)
        assert found.status == 2, words
        assert original in found.said, words
    for place, is_marked in ((farm, False), (copy, True)):
        drawn = succeed("farm", "graph", ".", cwd=place).stdout
        assert ("other-data-file" in drawn) == is_marked
    succeed("qemu", "import", "--adopt", "top.add-cow", cwd=copy)
    assert view("top.add-cow", cwd=copy) == content
    succeed("check", "top.add-cow", cwd=copy)


def test_twin_whose_data_file_is_another_is_taken_back_only_when_adopted(
    tmp_path: Path,
) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "--absolute-data-file", "top.add-cow", cwd=tmp_path)
    # The image file is restored from a copy, and the one that QEMU writes has its name no more.
    shutil.copy(tmp_path / "top.raw", tmp_path / "restored")
    (tmp_path / "top.raw").rename(tmp_path / "written")
    (tmp_path / "restored").rename(tmp_path / "top.raw")
    succeed("check", "top.add-cow", cwd=tmp_path)  # the name is that of the image file
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("top.add-cow", "top.qcow2", "top-base.add-cow", "top-base.qcow2"):
        (tmp_path / name).rename(moved / name)
    for name in ("top.raw", "top-base.raw", "top-base-base.raw"):
        shutil.copy(tmp_path / name, moved)
    message = refused("qemu", "import", "top.add-cow", cwd=moved)
    assert str(tmp_path.resolve() / "top.raw") in message
    assert "--adopt" in message
    succeed("qemu", "import", "--adopt", "top.add-cow", cwd=moved)


COPIES = {
    "as it is": [],
    "import": ["qemu import --adopt top.add-cow"],
    "import, then write": ["qemu import --adopt top.add-cow", "io -c 'write 0 64k' top.add-cow"],
    "commit": ["qemu import --adopt top.add-cow", "commit top.add-cow", "commit top-base.add-cow"],
    "flatten": ["qemu import --adopt top.add-cow", "flatten --discard top.add-cow"],
    "abandon": ["qemu import --abandon --force top.add-cow"],
    "repair": ["check -r all top.add-cow", "check -r all --force top-base.add-cow"],
    "a layer": ["qemu import --adopt top-base.add-cow", "io -c 'write 0 64k' top-base.add-cow"],
    "the farm": ["farm commit --force .", "farm flatten --force --discard ."],
}


@pytest.mark.parametrize("how", ["plain", "absolute"])
@pytest.mark.parametrize("name", COPIES)
def test_no_command_in_a_copy_of_a_farm_changes_the_original(
    tmp_path: Path, name: str, how: str
) -> None:
    farm, copy = tmp_path / "farm", tmp_path / "copy"
    farm.mkdir()
    chain(farm)
    options = ["--absolute-data-file"] if how == "absolute" else []
    succeed("qemu", "export", *options, "top.add-cow", cwd=farm)
    tool("cp", "-a", "farm", "copy", cwd=tmp_path)
    before = snapshot(farm)
    for step in (*COPIES[name], "qemu export top.add-cow"):
        addcow(*shlex.split(step), cwd=copy)
        if addcow("qemu", "args", "top.add-cow", cwd=copy).status == 0:
            qemu_io("top.add-cow", "write -P 0x55 0 64k", "write -z 128k 64k", cwd=copy)
        assert snapshot(farm) == before, step


def test_qemu_refuses_a_twin_that_is_not_its_own_and_says_what_to_do(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    described = node("top.add-cow", cwd=tmp_path)
    patch(tmp_path / "top.qcow2", 72, b"\x80")
    opened = subprocess.run(
        ["qemu-img", "info", described], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert opened.returncode != 0
    assert "qemu import" in opened.stderr


def test_moved_twin_is_missed_and_can_be_abandoned(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    (tmp_path / "top.qcow2").unlink()
    assert "--abandon --force" in refused("qemu", "import", "top.add-cow", cwd=tmp_path)
    refused("qemu", "import", "--abandon", "top.add-cow", cwd=tmp_path, status=64)
    told = succeed("qemu", "import", "--abandon", "--force", "top.add-cow", cwd=tmp_path).stderr
    assert "mixture" in told
    assert features(tmp_path / "top.add-cow") == 0


def test_restored_add_cow_file_beside_an_enabled_twin_is_not_written(tmp_path: Path) -> None:
    here, kept = tmp_path / "images", tmp_path / "kept"
    here.mkdir()
    pair(here, "ABCD", "A-0-")
    shutil.copy2(here / "top.add-cow", kept)
    succeed("qemu", "export", "top.add-cow", cwd=here)
    shutil.move(kept, here / "top.add-cow")
    for words in (("commit",), ("flatten",), ("io", "-c", "write 0 512"), ("qemu", "import")):
        assert "top.qcow2" in refused(*words, "top.add-cow", cwd=here), words
    for words in (("check", "top.add-cow"), ("farm", "check", ".")):
        found = addcow(*words, cwd=here)
        assert found.status == 2, words
        assert "CORRUPTION twin" in found.stdout, words
    assert "[foreign-twin]" in succeed("farm", "graph", ".", cwd=here).stdout


def test_import_asks_for_the_space_of_its_bits_first(tmp_path: Path) -> None:
    for here in mounted("ext4", tmp_path):
        (here / "base.raw").write_bytes(b"b" * 4096)
        over = ("-b", "base.raw", "-F", "raw", "-o", "cluster_size=4k")
        succeed("create", *over, "top.add-cow", "6G", cwd=here)
        succeed("qemu", "export", "top.add-cow", cwd=here)
        # One cluster for each page of the bitmap, all of which are holes: more than what ext4
        # counts as free and keeps for itself.
        writes = [f"write -P 7 {128 * number}M 4k" for number in range(48)]
        qemu_io("top.add-cow", *writes, cwd=here)
        filler = fill(here)
        before = features(here / "top.add-cow")
        message = refused("qemu", "import", "top.add-cow", cwd=here)
        assert "top.add-cow" in message
        assert "free space" in message
        assert (features(here / "top.add-cow"), twins(here)) == (before, {"top.qcow2": True})
        filler.unlink()
        succeed("qemu", "import", "top.add-cow", cwd=here)
        told = succeed("io", "-r", "-c", "read -P 7 128M 4k", "top.add-cow", cwd=here)
        assert "failed" not in told.said


REFUSALS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "all allocated": ("already flat", lambda here: succeed("flatten", "top.add-cow", cwd=here)),
    "twin exists": ("exists", lambda here: (here / "top.qcow2").write_text("mine")),
    "overlay above": (
        "depend on it",
        lambda here: succeed("create", "-F", "add-cow", "-b", "top.add-cow", "x.add-cow", cwd=here),
    ),
    "qcow2 above its base": (
        "depend on it",
        lambda here: tool(
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "top.raw", "x.qcow2"),
            cwd=here,
        ),
    ),
    "hard links": ("hard links", lambda here: os.link(here / "top.raw", here / "second.raw")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_export_is_refused_and_changes_nothing(tmp_path: Path, name: str) -> None:
    chain(tmp_path)
    words, arrange = REFUSALS[name]
    arrange(tmp_path)
    before = snapshot(tmp_path)
    message = refused("qemu", "export", "top.add-cow", cwd=tmp_path)
    assert (words in message) or name == "all allocated", message
    assert snapshot(tmp_path) == before


def test_twin_must_lie_beside_the_overlay(tmp_path: Path) -> None:
    chain(tmp_path)
    (tmp_path / "sub").mkdir()
    assert "directory" in refused("qemu", "export", "top.add-cow", "sub/t.qcow2", cwd=tmp_path)


def test_args_name_every_file_of_the_chain(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    told = succeed("qemu", "args", "top.add-cow", cwd=tmp_path).stdout
    libvirt = succeed("qemu", "args", "--output", "libvirt", "top.add-cow", cwd=tmp_path).stdout
    for name in ("top.qcow2", "top.raw", "top-base.qcow2", "top-base.raw", "top-base-base.raw"):
        assert str(tmp_path.resolve() / name) in told
        assert str(tmp_path.resolve() / name) in libvirt
    assert libvirt.count("<dataStore") == 2


def test_args_let_the_guest_write_zeros_as_data(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    assert "write-zeroes=off" in succeed("qemu", "args", "top.add-cow", cwd=tmp_path).stdout


# Interruptions

EVENTS = (
    *("header_write", "bitmap_update", "bitmap_sync", "image_write", "data_sync", "punch"),
    *("create", "directory_sync", "twin_write", "twin_link", "twin_unlink", "cow_write"),
)


@pytest.mark.long
@pytest.mark.parametrize("action", ["error", "kill"])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("way", ["export", "import"])
def test_interrupted_lending_is_finished_by_import(
    tmp_path: Path, way: str, event: str, action: str
) -> None:
    for after in count():
        here = tmp_path / f"images-{after}"
        here.mkdir()
        content = chain(here)
        if way == "import":
            succeed("qemu", "export", "top.add-cow", cwd=here)
            qemu_io("top.add-cow", *SESSION, cwd=here)
            content = seen_by_qemu("top.add-cow", cwd=here)
        rules = Rules.write(tmp_path / "rules", rule(event, action, after=after, once="on"))
        if _run_with(rules, "qemu", way, "top.add-cow", cwd=here) == 0:
            return  # the event does not occur that often
        _assert_import_finishes(here, content)


@pytest.mark.parametrize(("way", "event"), [("export", "header_write"), ("import", "twin_unlink")])
def test_overlay_and_twin_can_never_both_be_written(tmp_path: Path, way: str, event: str) -> None:
    pair(tmp_path, "BBBB", "A---")
    if way == "import":
        succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    rules = Rules.write(tmp_path / "rules", rule(event, "kill", once="on"))
    assert _run_with(rules, "qemu", way, "top.add-cow", cwd=tmp_path) != 0
    assert twins(tmp_path) == {"top.qcow2": False}, "a disabled twin"
    succeed("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert (twins(tmp_path), features(tmp_path / "top.add-cow")) == ({}, 0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("event", ["twin_write", "header_write", "twin_unlink"])
def test_layers_below_come_back_when_all_above_is_allocated(tmp_path: Path, event: str) -> None:
    here = tmp_path / "images"
    here.mkdir()
    content = chain(here)
    succeed("qemu", "export", "top.add-cow", cwd=here)
    qemu_io("top.add-cow", f"write -P 7 0 {len(content)}", cwd=here)
    rules = Rules.write(tmp_path / "rules", rule(event, "kill", after=1))
    assert _run_with(rules, "qemu", "import", "top.add-cow", cwd=here) != 0
    assert features(here / "top.add-cow") == 0
    assert "top-base.qcow2" in twins(here)
    _assert_import_finishes(here, b"\7" * len(content))


@pytest.mark.long
def test_leftover_twin_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    here = tmp_path / "images"
    here.mkdir()
    content = chain(here)
    rules = Rules.write(tmp_path / "rules", rule("header_write", "kill", after=1))
    assert _run_with(rules, "qemu", "export", "top.add-cow", cwd=here) != 0
    assert twins(here)["top.qcow2"] is False
    rules = Rules.write(tmp_path / "rules", rule("twin_unlink"))
    done = subprocess.run(
        [*ADDCOW, "qemu", "export", "top.add-cow"],
        cwd=here,
        env={**os.environ, VARIABLE: str(rules.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "top.qcow2" in done.stderr
    assert "remove it" in done.stderr
    _assert_import_finishes(here, content)


def _assert_import_finishes(here: Path, content: bytes) -> None:
    enabled, lent = twins(here).get("top.qcow2", False), features(here / "top.add-cow")
    assert not enabled or lent & LENT, "QEMU and addcow could both write"
    if enabled:
        assert refuses("io", "-c", "write 0 512", "top.add-cow", cwd=here)
    succeed("qemu", "import", "top.add-cow", cwd=here)
    assert view("top.add-cow", cwd=here) == content
    assert addcow("check", "top.add-cow", cwd=here).status in (0, 3)
    assert twins(here) == {}
    assert all(features(one) == 0 for one in here.glob("*.add-cow"))


def _run_with(rules: Rules, *arguments: str, cwd: Path) -> int:
    done = subprocess.run(
        [*ADDCOW, *arguments],
        cwd=cwd,
        env={**os.environ, VARIABLE: str(rules.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


# Hostile twins


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", range(80))
def test_damaged_twin_costs_one_line(tmp_path: Path, rng: random.Random, number: int) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    twin = tmp_path / "top.qcow2"
    twin.chmod(0o644)
    data = twin.read_bytes()
    used = [at for at, byte in enumerate(data) if byte]
    place = rng.choice([rng.randrange(112), rng.choice(used)])
    patch(twin, place, bytes([data[place] ^ 1 << rng.randrange(8)]))
    result = addcow("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert len([one for one in result.stderr.splitlines() if "warning" not in one]) <= 1
    assert result.status in (0, 1)


HUGE = {
    "size": (24, b"\x7f" + bytes(7)),
    "L1 entries": (36, b"\xff\xff\xff\xff"),
    "L1 offset": (40, b"\x00\xff" + bytes(6)),
    "cluster bits": (20, b"\x00\x00\x00\x3f"),
    "snapshots": (60, b"\x00\x00\x00\x01"),
    "encryption": (32, b"\x00\x00\x00\x01"),
    "version": (4, b"\x00\x00\x00\x02"),
    "corrupt": (79, b"\x06"),
}


@pytest.mark.parametrize("field", HUGE)
def test_twin_that_claims_what_it_cannot_be_is_refused(tmp_path: Path, field: str) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    twin = tmp_path / "top.qcow2"
    place, value = HUGE[field]
    patch(twin, place, value)
    before = snapshot(tmp_path)
    message = refused("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert "top.qcow2: " in message, "it names the damaged file"
    assert "marked it as corrupt" in message or field != "corrupt"
    assert snapshot(tmp_path) == before


def test_json_of_status_names_the_state(tmp_path: Path) -> None:
    chain(tmp_path)
    assert _status(tmp_path)["state"] == "here"
    succeed("qemu", "export", "--crash", "relaxed", "top.add-cow", cwd=tmp_path)
    told = _status(tmp_path)
    assert (told["state"], told["kind"], told["holder"]) == ("lent", "sector", None)
    assert (tmp_path / str(told["twin"])).name == "top.qcow2"


def _status(directory: Path) -> dict[str, str | None]:
    told = succeed("qemu", "status", "--output", "json", "top.add-cow", cwd=directory).stdout
    found: dict[str, str | None] = json.loads(told)
    return found


# Layers below overlays in other directories


def spread(directory: Path) -> tuple[Path, Path]:
    """Two lent overlays in directories of their own over one layer; their paths."""
    for name in ("base", "one", "two"):
        (directory / name).mkdir()
    pair(directory / "base", "ABCD", "-B--")
    tops = (directory / "one" / "a.add-cow", directory / "two" / "b.add-cow")
    layer = str(directory / "base" / "top.add-cow")
    for top in tops:
        draw(top, "A---", layer, backing_format="add-cow")
        succeed("qemu", "export", "--root", "base", str(top), cwd=directory)
    return tops


def test_layer_stays_lent_while_overlays_elsewhere_may_need_it(tmp_path: Path) -> None:
    one, two = spread(tmp_path)
    layer = "base/top.add-cow"
    told = succeed("qemu", "import", "--root", "base", str(one), cwd=tmp_path)
    assert "in directories that are not searched" in told.stderr
    assert refuses("io", "-c", "write 0 512", layer, cwd=tmp_path)
    assert "--root DIR" in refused("qemu", "import", layer, cwd=tmp_path)
    message = refused("qemu", "import", "--root", ".", layer, cwd=tmp_path)
    assert f"{two.resolve()} above it need it" in message
    succeed("qemu", "import", "--root", "base", str(two), cwd=tmp_path)
    succeed("qemu", "import", "--root", ".", layer, cwd=tmp_path)
    assert features(tmp_path / layer) == 0
    succeed("io", "-c", "write 0 512", layer, cwd=tmp_path)


def test_layer_comes_back_with_the_last_overlay_of_the_one_other_directory(tmp_path: Path) -> None:
    for name in ("base", "vms"):
        (tmp_path / name).mkdir()
    pair(tmp_path / "base", "ABCD", "-B--")
    layer = tmp_path / "base" / "top.add-cow"
    tops = [tmp_path / "vms" / f"{name}.add-cow" for name in "ab"]
    for top in tops:
        draw(top, "A---", str(layer), backing_format="add-cow")
        succeed("qemu", "export", "--root", "base", str(top), cwd=tmp_path)
    told = succeed("qemu", "import", "--root", "base", str(tops[0]), cwd=tmp_path)
    assert f"{tops[1].resolve()} above it need it" in told.stderr
    assert features(layer) & LENT_FOR_READING
    succeed("qemu", "import", "--root", "base", str(tops[1]), cwd=tmp_path)
    assert (features(layer), twins(layer.parent)) == (0, {})


def test_layer_that_was_written_through_its_twin_is_given_up_by_force_only(tmp_path: Path) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    succeed("qemu", "import", "top.add-cow", cwd=tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    twin = tmp_path / "top-base.qcow2"
    twin.chmod(0o644)
    words = ["qemu-io", "-c", "write -P 9 0 64k", writable_node(tmp_path, "top-base")]
    subprocess.run(words, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    told = succeed("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert "written through it" in told.stderr
    refused("qemu", "import", "top-base.add-cow", cwd=tmp_path)
    succeed("qemu", "import", "--abandon", "--force", "top-base.add-cow", cwd=tmp_path)
    assert features(tmp_path / "top-base.add-cow") == 0


def writable_node(directory: Path, name: str) -> str:
    """A layer's twin as a disk that can be written, as nobody should give it to QEMU."""
    file = {"driver": "file", "filename": str(directory / f"{name}.qcow2")}
    data = {"driver": "file", "filename": str(directory / f"{name}.raw")}
    return "json:" + json.dumps({"driver": "qcow2", "file": file, "data-file": data})


def test_twin_whose_header_qemu_has_rewritten_is_named(tmp_path: Path) -> None:
    pair(tmp_path, "BBBB", "A---")
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    described = node("top.add-cow", cwd=tmp_path)
    tool("qemu-img", "amend", "-o", "refcount_bits=8", described, cwd=tmp_path)
    message = refused("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert "top.qcow2: refcounts of order 3" in message
    tool("qemu-img", "amend", "-o", "refcount_bits=16", described, cwd=tmp_path)
    succeed("qemu", "import", "top.add-cow", cwd=tmp_path)


@pytest.mark.parametrize(("name", "status"), [("", 64), ("x" * 300, 1)], ids=["empty", "long"])
def test_impossible_name_is_refused_before_layers_are_lent(
    tmp_path: Path, name: str, status: int
) -> None:
    chain(tmp_path)
    before = snapshot(tmp_path)
    refused("qemu", "export", "top.add-cow", name, cwd=tmp_path, status=status)
    assert snapshot(tmp_path) == before


def test_import_does_not_write_through_hard_links(tmp_path: Path) -> None:
    pair(tmp_path, "BBBB", "A---")
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    os.link(tmp_path / "top.raw", tmp_path / "second.raw")
    before = snapshot(tmp_path)
    assert "hard links" in refused("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert snapshot(tmp_path) == before
    succeed("qemu", "import", "--force", "top.add-cow", cwd=tmp_path)


def test_import_warns_of_a_copy_of_the_twin(tmp_path: Path) -> None:
    pair(tmp_path, "BBBB", "A---")
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    shutil.copy2(tmp_path / "top.qcow2", tmp_path / "copy.qcow2")
    told = succeed("qemu", "import", "top.add-cow", cwd=tmp_path)
    assert "copy.qcow2: QEMU may write the image file" in told.stderr


def test_twin_is_no_more_readable_than_the_image(tmp_path: Path) -> None:
    chain(tmp_path)
    (tmp_path / "top-base.raw").chmod(0o600)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    assert (tmp_path / "top-base.qcow2").stat().st_mode & 0o777 == 0o400


@pytest.mark.parametrize("words", [("commit", "-d"), ("commit",), ("flatten",)], ids=str)
def test_job_below_a_layer_that_is_lent_names_that(tmp_path: Path, words: tuple[str, ...]) -> None:
    chain(tmp_path)
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    message = refused(*words, "top-base.add-cow", cwd=tmp_path)
    assert "it is lent to QEMU for reading" in message
