"""Lending to QEMU: every refusal names the file and says what to do, and the advice works.

What a message prints as a command is run as it is printed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from support.another_user import as_nobody
from support.command import PATIENCE, addcow, draw, draw_raw, refused, snapshot, succeed, tool
from support.lending import node, patch_features, qemu_io, seen_by_qemu, twins, view

KiB = 1024
LENT = 1 << 63

pytestmark = pytest.mark.sample(1)


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """An overlay over an overlay over a raw base; the topmost is not lent yet."""
    draw_raw(tmp_path / "base.img", "BBBB")
    draw(tmp_path / "mid.add-cow", "-M--", "base.img")
    draw(tmp_path / "top.add-cow", "--T-", "mid.add-cow", backing_format="add-cow")
    return tmp_path


# What args prints


def test_args_of_a_layer_lent_for_reading_name_the_overlay_above(farm: Path) -> None:
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    message = refused("qemu", "args", "mid.add-cow", cwd=farm)
    assert "mid.add-cow: it is lent to QEMU for reading only" in message
    assert "top.add-cow" in message


def test_args_refuse_a_layer_below_that_qemu_may_write(farm: Path) -> None:
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    patch_features(farm / "mid.add-cow", set_=LENT, clear=LENT >> 1)
    message = refused("qemu", "args", "top.add-cow", cwd=farm)
    assert "mid.add-cow" in message
    assert "QEMU may write it through" in message


def test_args_give_no_backing_file_after_a_complete_stream(farm: Path) -> None:
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    content = seen_by_qemu("top.add-cow", cwd=farm)
    (farm / "seen").write_bytes(content)
    qemu_io("top.add-cow", f"write -s seen 0 {len(content)}", cwd=farm)
    _run(_without_backing(farm), cwd=farm)
    described = succeed("qemu", "args", "--output", "json", "top.add-cow", cwd=farm).json
    assert "backing" not in described
    libvirt = succeed("qemu", "args", "--output", "libvirt", "top.add-cow", cwd=farm).stdout
    assert "mid" not in libvirt
    assert seen_by_qemu("top.add-cow", cwd=farm) == content


def test_args_give_the_backing_file_that_was_removed_too_early(farm: Path) -> None:
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    content = seen_by_qemu("top.add-cow", cwd=farm)
    _run(_without_backing(farm), cwd=farm)
    assert seen_by_qemu("top.add-cow", cwd=farm) == content


def _twin(name: str) -> str:
    return "json:" + json.dumps(
        {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": f"{name}.qcow2"},
            "data-file": {"driver": "file", "filename": f"{name}.raw"},
        }
    )


def _without_backing(farm: Path) -> list[str]:
    assert (farm / "top.qcow2").exists()
    return ["qemu-img", "rebase", "-u", "-b", "", _twin("top")]


def _run(words: list[str], *, cwd: Path) -> None:
    tool(*words, cwd=cwd)


# Commands in messages


def _advice(message: str) -> list[str]:
    """The command of qemu-img at the end of a message."""
    return shlex.split("qemu-img " + message.partition(": qemu-img ")[2])


@pytest.mark.parametrize("overlay", ["mid", "top"])
@pytest.mark.parametrize("other", ["other.img", ""])
def test_command_that_restores_the_backing_file_works(farm: Path, overlay: str, other: str) -> None:
    (farm / "other.img").write_bytes(bytes(256 * KiB))
    if overlay == "mid":
        (farm / "top.add-cow").unlink()
    expected = view(f"{overlay}.add-cow", cwd=farm)
    succeed("qemu", "export", f"{overlay}.add-cow", cwd=farm)
    format_ = ["-F", "raw"] if other else []
    _run(["qemu-img", "rebase", "-u", "-b", other, *format_, _twin(overlay)], cwd=farm)
    message = refused("qemu", "import", f"{overlay}.add-cow", cwd=farm)
    assert f"{overlay}.qcow2" in message
    _run(_advice(message), cwd=farm)
    succeed("qemu", "import", f"{overlay}.add-cow", cwd=farm)
    assert view(f"{overlay}.add-cow", cwd=farm) == expected


def test_command_that_restores_a_backing_file_works_from_elsewhere(farm: Path) -> None:
    inner = farm / "inner"
    inner.mkdir()
    draw(inner / "own.add-cow", "X---", "../base.img")
    succeed("qemu", "export", "--root", ".", "inner/own.add-cow", cwd=farm)
    _run(["qemu-img", "rebase", "-u", "-b", "", _twin("inner/own")], cwd=farm)
    message = refused("qemu", "import", "--root", ".", "inner/own.add-cow", cwd=farm)
    _run(_advice(message), cwd=farm)
    succeed("qemu", "import", "--root", ".", "inner/own.add-cow", cwd=farm)


def test_command_that_commits_a_snapshot_works(farm: Path) -> None:
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    create = ("-f", "qcow2", "-u", "-F", "qcow2", "-b", "top.qcow2", "snap.qcow2", "256K")
    tool("qemu-img", "create", "-q", *create, cwd=farm)
    below = json.loads(node("top.add-cow", cwd=farm).removeprefix("json:"))
    below.pop("discard")
    file = {"driver": "file", "filename": "snap.qcow2"}
    snap = {"driver": "qcow2", "file": file, "backing": below}
    tool("qemu-io", "-c", "write -P 9 64k 64k", "json:" + json.dumps(snap), cwd=farm)
    message = refused("qemu", "import", "top.add-cow", cwd=farm)
    assert "snap.qcow2" in message
    _run(_advice(message), cwd=farm)
    (farm / "snap.qcow2").unlink()
    succeed("qemu", "import", "top.add-cow", cwd=farm)
    assert view("top.add-cow", cwd=farm)[64 * KiB : 128 * KiB] == b"\x09" * 64 * KiB


# Names


def test_name_with_a_line_break_is_one_line_and_escaped(farm: Path) -> None:
    name = "two\nlines.add-cow"
    draw(farm / name, "X---", "base.img")
    told = succeed("qemu", "export", name, cwd=farm).stdout
    assert told == "Lent to QEMU through 'two\\nlines.qcow2'.\n"
    assert succeed("qemu", "status", name, cwd=farm).stdout.startswith(
        "two\\nlines.add-cow: lent\n"
    )
    assert "two\\nlines.add-cow" in refused("flatten", name, cwd=farm)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\r", "\x0b"])
def test_no_line_break_of_any_kind_splits_a_message(farm: Path, separator: str) -> None:
    message = refused("flatten", f"a{separator}b.add-cow", cwd=farm)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("part", ["overlay", "image", "base", "twin", "layer"])
def test_export_refuses_names_that_are_not_utf8(farm: Path, part: str) -> None:
    odd = os.fsdecode(b"b\xff")
    names = {"overlay": "top.add-cow", "twin": "top.qcow2", "image": "top.raw", "base": "base.img"}
    if part == "layer":
        os.rename(farm / "mid.add-cow", farm / f"{odd}.add-cow")
        draw(farm / "top.add-cow", "--T-", f"{odd}.add-cow", backing_format="add-cow")
    elif part == "overlay":
        names["overlay"] = f"{odd}.add-cow"
        os.rename(farm / "top.add-cow", farm / names["overlay"])
    elif part == "base":
        draw_raw(farm / f"{odd}.img", "BBBB")
        draw(farm / "top.add-cow", "X---", f"{odd}.img")
    elif part == "image":
        succeed("create", "-o", f"image_file={odd}.raw", "own.add-cow", "1M", cwd=farm)
        names["overlay"] = "own.add-cow"
        # Without a backing file every cluster is allocated.
        succeed(
            "create",
            "-b",
            "base.img",
            "-F",
            "raw",
            "-o",
            f"image_file={odd}2.raw",
            "o.add-cow",
            cwd=farm,
        )
        names["overlay"] = "o.add-cow"
    elif part == "twin":
        names["twin"] = f"{odd}.qcow2"
    before = snapshot(farm)
    given = [names["overlay"], names["twin"]] if part == "twin" else [names["overlay"]]
    message = refused("qemu", "export", *given, cwd=farm)
    assert "UTF-8" in message
    assert "rename it" in message
    assert snapshot(farm) == before


def test_args_refuse_names_that_are_not_utf8(farm: Path) -> None:
    inner = farm / "inner"
    inner.mkdir()
    draw_raw(inner / "base.img", "BBBB")
    draw(inner / "own.add-cow", "X---", "base.img")
    succeed("qemu", "export", "inner/own.add-cow", cwd=farm)
    odd = os.fsdecode(b"b\xff")
    inner.rename(farm / odd)
    for form in ("human", "json", "libvirt"):
        message = refused("qemu", "args", "--output", form, f"{odd}/own.add-cow", cwd=farm)
        assert "UTF-8" in message


@pytest.mark.parametrize(
    "words",
    [
        ("qemu", "import", ""),
        ("qemu", "export", "top.add-cow", ""),
        ("qemu", "status", ""),
        ("info", ""),
        ("check", ""),
        ("farm", "check", ""),
        ("create", "-b", "", "-F", "raw", "new.add-cow"),
        ("farm", "scrub", "status", "--state", ""),
    ],
)
def test_empty_name_is_a_usage_error(farm: Path, words: tuple[str, ...]) -> None:
    before = snapshot(farm)
    assert "name a file" in refused(*words, cwd=farm, status=64)
    assert snapshot(farm) == before


# Owners


def _owned_farm(here: Path) -> Path:
    """Files of root in a directory that everybody may write, the files too."""
    here.mkdir()
    draw_raw(here / "base.img", "BBBB")
    draw(here / "top.add-cow", "X---", "base.img")
    here.chmod(0o777)
    for one in here.iterdir():
        one.chmod(0o666)
    return here


@pytest.mark.parametrize("crash", ["strict", "relaxed"])
def test_export_by_another_user_than_the_owner_says_who_may(tmp_path: Path, crash: str) -> None:
    here = _owned_farm(tmp_path / "farm")
    before = snapshot(here)
    done = as_nobody("qemu", "export", "--crash", crash, "top.add-cow", cwd=here)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "top.raw" in line
    assert "only its owner can lend it" in line
    assert snapshot(here) == before


# Import


def test_import_of_an_overlay_that_is_not_lent_says_so(farm: Path) -> None:
    for options in ((), ("--adopt",), ("--abandon", "--force")):
        told = succeed("qemu", "import", *options, "top.add-cow", cwd=farm)
        assert told.stdout == "It is not lent.\n"
        told = succeed("qemu", "import", *options, "--output", "json", "top.add-cow", cwd=farm)
        assert told.json["state-before"] == "here"
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    told = succeed("qemu", "import", "--output", "json", "top.add-cow", cwd=farm)
    assert told.json["state-before"] == "lent"
    assert twins(farm) == {}


def test_import_while_a_guest_runs_says_to_switch_it_off(farm: Path) -> None:
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    with subprocess.Popen(
        ["qemu-io", node("top.add-cow", cwd=farm)],
        cwd=farm,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        message = refused("qemu", "import", "top.add-cow", cwd=farm)
        assert "switch the guest off" in message
        holder.communicate(b"quit\n", timeout=PATIENCE)
    succeed("qemu", "import", "top.add-cow", cwd=farm)


# Manifests


def test_farm_manifest_covers_the_layers_below_a_lent_overlay(farm: Path) -> None:
    succeed("qemu", "export", "top.add-cow", cwd=farm)
    (farm / "raws").mkdir()
    draw_raw(farm / "raws" / "base.img", "CCCC")
    draw(farm / "raws" / "own.add-cow", "X---", "base.img")
    succeed("qemu", "export", "raws/own.add-cow", cwd=farm)
    result = addcow("farm", "manifest", "create", "--output", "json", "raws", cwd=farm)
    assert result.status == 1
    assert result.json["summary"] == {
        **result.json["summary"],
        "images": 1,
        "written": 1,
        "failed": 0,
        "lent": 1,
    }
    assert (farm / "raws" / "base.img.manifest").exists()
    assert not (farm / "raws" / "own.add-cow.manifest").exists()
    told = addcow("farm", "manifest", "create", ".", cwd=farm)
    assert "top.add-cow: it is lent to QEMU" in told.stderr
    assert (farm / "mid.add-cow.manifest").exists()
    assert (farm / "base.img.manifest").exists()
    succeed("verify", "mid.add-cow", cwd=farm)


# Image files of others as backing files


@pytest.mark.parametrize("lent", [False, True])
def test_create_refuses_the_image_file_of_an_overlay_as_backing_file(
    farm: Path, lent: bool
) -> None:
    if lent:
        succeed("qemu", "export", "top.add-cow", cwd=farm)
    before = snapshot(farm)
    words = ("-F", "raw", "-b", "top.raw", "new.add-cow")
    message = refused("create", *words, cwd=farm)
    assert "top.raw: it is the image file of" in message
    assert "-F add-cow" in message
    assert snapshot(farm) == before
    succeed("create", "--force", *words, cwd=farm)


def test_create_accepts_the_image_file_of_a_flat_overlay(farm: Path) -> None:
    succeed("flatten", "top.add-cow", cwd=farm)
    succeed("create", "-F", "raw", "-b", "top.raw", "new.add-cow", cwd=farm)
