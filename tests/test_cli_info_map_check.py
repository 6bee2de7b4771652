"""Tests of `addcow info`, `map` and `check`, and of files that no command can use.

The three commands change no file. The images are made by hand, byte by byte.
"""

import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    USAGE,
    KiB,
    addcow,
    draw,
    draw_raw,
    overlay_bytes,
    pair,
    put,
    refused,
    snapshot,
    succeed,
    tool,
)

pytestmark = pytest.mark.sample(1)

INFO_KEYS = {
    "filename",
    "format",
    "virtual-size",
    "actual-size",
    "cluster-size",
    "backing-filename",
    "full-backing-filename",
    "backing-filename-format",
    "format-specific",
}
DATA_KEYS = {
    "image-filename",
    "full-image-filename",
    "image-format",
    "header-size",
    "all-allocated",
    "total-clusters",
    "allocated-clusters",
    "compatible-features",
}
CHECK_KEYS = {
    "filename",
    "format",
    "check-errors",
    "corruptions",
    "leaks",
    "total-clusters",
    "allocated-clusters",
    "findings",
}
READERS = ("info", "map", "check")
COMMANDS = {
    "info": ("FILE",),
    "map": ("FILE",),
    "check": ("FILE",),
    "convert": ("-O", "raw", "FILE", "new.raw"),
    "commit": ("FILE",),
    "flatten": ("FILE",),
    "io": ("-c", "length", "FILE"),
}


def on(command: str, file: str) -> tuple[str, ...]:
    """Return the words that apply a command to a file."""
    return (command, *(file if word == "FILE" else word for word in COMMANDS[command]))


# ---- info ----


def test_info_json_has_every_field(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X-Y--")
    before = snapshot(tmp_path)
    info = succeed("info", "--output", "json", "top.add-cow", cwd=tmp_path).json
    assert set(info) == INFO_KEYS
    assert info["filename"] == "top.add-cow"
    assert info["format"] == "add-cow"
    assert info["virtual-size"] == 6 * CLUSTER
    assert info["actual-size"] >= CLUSTER
    assert info["cluster-size"] == CLUSTER
    assert info["backing-filename"] == "base.img"
    assert info["backing-filename-format"] == "raw"
    specific = info["format-specific"]
    assert set(specific) == {"type", "data"}
    assert specific["type"] == "add-cow"
    assert set(specific["data"]) == DATA_KEYS
    assert snapshot(tmp_path) == before


def test_info_json_describes_image_and_bitmap(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X-Y--")
    data = succeed("info", "--output=json", "top.add-cow", cwd=tmp_path).json["format-specific"]
    full = data["data"].pop("full-image-filename")
    assert (tmp_path / full).samefile(tmp_path / "top.raw")
    assert data["data"] == {
        "image-filename": "top.raw",
        "image-format": "raw",
        "header-size": 64 * KiB,
        "all-allocated": False,
        "total-clusters": 6,
        "allocated-clusters": 2,
        "compatible-features": 0,
    }


def test_info_resolves_names_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    pair(tmp_path / "below", "AB", "-X")
    info = succeed("info", "--output", "json", "below/top.add-cow", cwd=tmp_path).json
    assert info["filename"] == "below/top.add-cow"
    assert info["backing-filename"] == "base.img"
    assert (tmp_path / info["full-backing-filename"]).samefile(tmp_path / "below" / "base.img")
    image = info["format-specific"]["data"]["full-image-filename"]
    assert (tmp_path / image).samefile(tmp_path / "below" / "top.raw")


def test_info_of_an_overlay_without_backing(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "AB-", "", compatible=ALL_ALLOCATED)
    info = succeed("info", "--output", "json", "top.add-cow", cwd=tmp_path).json
    for key in ("backing-filename", "full-backing-filename", "backing-filename-format"):
        assert info.get(key) is None
    data = info["format-specific"]["data"]
    assert data["all-allocated"] is True
    assert data["allocated-clusters"] == data["total-clusters"] == 3


def test_info_human_reads_like_qemu_img(tmp_path: Path) -> None:
    pair(tmp_path, "-" * 16, "-" * 16)
    lines = succeed("info", "top.add-cow", cwd=tmp_path).lines
    assert lines[:2] == ["image: top.add-cow", "file format: add-cow"]
    assert "virtual size: 1 MiB (1048576 bytes)" in lines
    assert "cluster_size: 65536" in lines
    assert "backing file format: raw" in lines
    assert any(line.startswith("backing file: base.img") for line in lines)
    assert any("top.raw" in line for line in lines)


def test_info_backing_chain_is_a_list(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "mid.add-cow", "-X--")
    draw(tmp_path / "top.add-cow", "--Y-", "mid.add-cow", backing_format="add-cow")
    chain = succeed("info", "--output", "json", "--backing-chain", "top.add-cow", cwd=tmp_path).json
    assert isinstance(chain, list)
    assert [link["format"] for link in chain] == ["add-cow", "add-cow", "raw"]
    assert [os.path.basename(link["filename"]) for link in chain] == [
        "top.add-cow",
        "mid.add-cow",
        "base.img",
    ]
    assert [link["virtual-size"] for link in chain] == [4 * CLUSTER] * 3


def test_info_backing_chain_human_shows_each(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X--")
    lines = succeed("info", "--backing-chain", "top.add-cow", cwd=tmp_path).lines
    images = [line for line in lines if line.startswith("image: ")]
    assert [os.path.basename(line) for line in images] == ["image: top.add-cow", "image: base.img"]
    assert "file format: raw" in lines


def test_info_backing_chain_shows_who_else_stands_on_each_layer(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "mid.add-cow", "-XY-")
    draw(tmp_path / "top.add-cow", "--Y-", "mid.add-cow", backing_format="add-cow")
    draw(tmp_path / "b.add-cow", "----", "mid.add-cow", backing_format="add-cow")
    draw(tmp_path / "a.add-cow", "----", "mid.add-cow", backing_format="add-cow")
    draw(tmp_path / "raw.add-cow", "----")
    (tmp_path / "top.add-cow.backup-1").write_bytes((tmp_path / "top.add-cow").read_bytes())
    words = ("info", "--backing-chain", "top.add-cow")
    chain = succeed(*words, "--output", "json", cwd=tmp_path).json
    users = [["a.add-cow", "b.add-cow"], ["raw.add-cow"]]
    assert [link["depth"] for link in chain] == [0, 1, 2]
    assert [link["allocated-size"] for link in chain[:2]] == [CLUSTER, 2 * CLUSTER]
    used = [[os.path.basename(one) for one in link["used-by"]] for link in chain]
    assert used == [[], *users]
    lines = succeed(*words, cwd=tmp_path).lines
    where = os.path.realpath(tmp_path)
    assert [line for line in lines if line.startswith("used by: ")] == [
        "used by: no other overlay",
        f"used by: {where}/a.add-cow, {where}/b.add-cow",
        f"used by: {where}/raw.add-cow",
    ]
    depths = [line for line in lines if line.startswith("depth: ")]
    assert depths == ["depth: 0", "depth: 1", "depth: 2"]
    assert "allocated size: 128 KiB (131072 bytes)" in lines
    few = succeed(*words, "--exclude", "a.*", cwd=tmp_path).stdout
    assert f"used by: {where}/b.add-cow" in few


@pytest.mark.long
def test_info_describes_an_image_of_another_format(tmp_path: Path) -> None:
    put(pair(tmp_path, "AB", "-X"), 60, b"qcow2")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "top.raw", "128K", cwd=tmp_path)
    before = snapshot(tmp_path)
    info = succeed("info", "--output", "json", "top.add-cow", cwd=tmp_path).json
    assert info["format-specific"]["data"]["image-format"] == "qcow2"
    assert any("qcow2" in line for line in succeed("info", "top.add-cow", cwd=tmp_path).lines)
    assert "Traceback" not in addcow("check", "top.add-cow", cwd=tmp_path).said
    assert snapshot(tmp_path) == before


def test_info_refuses_an_image_that_is_not_of_its_format(tmp_path: Path) -> None:
    put(pair(tmp_path, "AB", "-X"), 60, b"qcow2")
    assert "qcow2" in refused("info", "top.add-cow", cwd=tmp_path)


def test_info_shows_unknown_compatible_features(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-X")
    put(tmp_path / "top.add-cow", 32, struct.pack("<Q", 1 << 40))
    info = succeed("info", "--output", "json", "top.add-cow", cwd=tmp_path).json
    assert info["format-specific"]["data"]["compatible-features"] == 1 << 40
    assert info["format-specific"]["data"]["all-allocated"] is False


# ---- map ----


def extents(cwd: Path, *options: str, file: str = "top.add-cow") -> list[tuple[Any, ...]]:
    """Return the map in clusters: start, length, depth, present, zero, data, offset."""
    listed = succeed("map", "--output", "json", *options, file, cwd=cwd).json
    keys = ("start", "length", "depth", "present", "zero", "data", "offset")
    assert all(set(keys[:-1]) <= set(each) <= set(keys) for each in listed)
    return [
        (each["start"] // CLUSTER, each["length"] // CLUSTER, *(each.get(k) for k in keys[2:]))
        for each in listed
    ]


def test_map_json_tells_the_layers_apart(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDE", "-XY--Z")
    before = snapshot(tmp_path)
    assert extents(tmp_path) == [
        (0, 1, 1, True, False, True, 0),
        (1, 2, 0, True, False, True, 1 * CLUSTER),
        (3, 2, 1, True, False, True, 3 * CLUSTER),
        (5, 1, 0, True, False, True, 5 * CLUSTER),
    ]
    assert snapshot(tmp_path) == before


def test_map_json_shows_holes_as_zeros(tmp_path: Path) -> None:
    pair(tmp_path, "A--D", "---X")
    listed = extents(tmp_path)
    assert [each[:6] for each in listed] == [
        (0, 1, 1, True, False, True),
        (1, 2, 1, True, True, False),
        (3, 1, 0, True, False, True),
    ]


def test_map_json_beyond_the_backing_is_held_by_no_layer(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-----Y")
    listed = extents(tmp_path)
    assert listed[0] == (0, 2, 1, True, False, True, 0)
    start, length, _, present, zero, data, offset = listed[1]
    assert (start, length, present, zero, data, offset) == (2, 3, False, True, False, None)
    assert listed[2] == (5, 1, 0, True, False, True, 5 * CLUSTER)


def test_map_json_counts_depth_along_the_chain(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCDE")
    draw(tmp_path / "mid.add-cow", "-PQ--")
    draw(tmp_path / "top.add-cow", "--X--", "mid.add-cow", backing_format="add-cow")
    assert [each[:3] for each in extents(tmp_path)] == [(0, 1, 2), (1, 1, 1), (2, 1, 0), (3, 2, 2)]
    assert [each[:3] for each in extents(tmp_path, file="mid.add-cow")] == [
        (0, 1, 1),
        (1, 2, 0),
        (3, 2, 1),
    ]


def test_map_json_all_allocated_is_all_image(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "x-Y-", compatible=ALL_ALLOCATED)
    assert [each[:5] for each in extents(tmp_path)] == [
        (0, 1, 0, True, False),
        (1, 1, 0, True, True),
        (2, 1, 0, True, False),
        (3, 1, 0, True, True),
    ]


def test_map_covers_a_partial_last_cluster(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "-X-")
    os.truncate(tmp_path / "top.raw", 2 * CLUSTER + 512 + 7)
    listed = succeed("map", "--output", "json", "top.add-cow", cwd=tmp_path).json
    assert listed[-1]["start"] == 2 * CLUSTER
    assert listed[-1]["length"] == 512


def test_map_human_has_the_columns_of_qemu_img(tmp_path: Path) -> None:
    pair(tmp_path, "A-CD", "---X-")
    lines = succeed("map", "top.add-cow", cwd=tmp_path).lines
    assert lines[0] == f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File"
    rows = [(*line[:48].split(), os.path.basename(line[48:])) for line in lines[1:]]
    assert rows == [
        ("0", "0x10000", "0", "base.img"),
        ("0x20000", "0x10000", "0x20000", "base.img"),
        ("0x30000", "0x10000", "0x30000", "top.raw"),
    ]


# ---- check ----


def findings(
    cwd: Path, status: int, file: str = "top.add-cow"
) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """Check a file twice: return the JSON report and its (name, severity) pairs."""
    before = snapshot(cwd)
    result = addcow("check", "--output", "json", file, cwd=cwd)
    assert result.status == status, result
    report = result.json
    assert set(report) == CHECK_KEYS
    assert all(set(each) == {"name", "severity", "message"} for each in report["findings"])
    assert all(each["message"] for each in report["findings"])
    human = addcow("check", file, cwd=cwd)
    assert human.status == status
    assert all(each["message"] in human.said for each in report["findings"])
    assert snapshot(cwd) == before
    return report, {(each["name"], each["severity"]) for each in report["findings"]}


def test_check_of_a_clean_image(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X--0-")
    report, found = findings(tmp_path, 0)
    assert found == set()
    del report["findings"]
    assert report == {
        "filename": "top.add-cow",
        "format": "add-cow",
        "check-errors": 0,
        "corruptions": 0,
        "leaks": 0,
        "total-clusters": 6,
        "allocated-clusters": 2,
    }
    lines = succeed("check", "top.add-cow", cwd=tmp_path).lines
    assert lines[0] == "No errors were found on the image."
    assert succeed("check", "-q", "top.add-cow", cwd=tmp_path).said == ""


@pytest.mark.long
def test_check_of_a_clean_chain_and_of_a_lone_image(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "mid.add-cow", "-P--")
    draw(tmp_path / "top.add-cow", "--X-", "mid.add-cow", backing_format="add-cow")
    draw(tmp_path / "lone.add-cow", "AB", "", compatible=ALL_ALLOCATED)
    for file in ("top.add-cow", "mid.add-cow", "lone.add-cow"):
        succeed("check", file, cwd=tmp_path)


@pytest.mark.parametrize(
    ("offset", "data", "name"),
    [
        (40, struct.pack("<I", 4096), "header"),
        (20, struct.pack("<I", 11), "header"),
        (20, struct.pack("<I", 22), "header"),
        (4, struct.pack("<I", 40), "names"),
        (8, struct.pack("<I", 0), "names"),
        (12, struct.pack("<I", 1 << 30), "names"),
        (16, struct.pack("<I", 4096), "names"),
        (60, bytes(16), "formats"),
        (44, b"nosuch", "formats"),
        (44, b"r" * 16, "formats"),
    ],
)
def test_check_finds_damage_in_the_header(
    tmp_path: Path, offset: int, data: bytes, name: str
) -> None:
    put(pair(tmp_path, "ABCD", "-X--"), offset, data)
    report, found = findings(tmp_path, 2)
    assert report["corruptions"] >= 1
    assert (name, "corruption") in found


def test_check_runs_every_check_it_can(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "-X-y")
    put(top, 200, b"reserved")
    put(top, CLUSTER, b"\xf2")
    report, found = findings(tmp_path, 2)
    assert found == {
        ("reserved-bytes", "leak"),
        ("stray-bits", "corruption"),
        ("leaks", "leak"),
    }
    assert report["corruptions"] == 1
    assert report["leaks"] == 1


@pytest.mark.parametrize("spelling", ["hardlink", "symlink", "./base.img"])
def test_check_tells_same_files_by_inode(tmp_path: Path, spelling: str) -> None:
    draw_raw(tmp_path / "base.img", "----")
    if spelling == "hardlink":
        (tmp_path / spelling).hardlink_to(tmp_path / "base.img")
    if spelling == "symlink":
        (tmp_path / spelling).symlink_to("base.img")
    content = overlay_bytes(image=spelling, size=4 * CLUSTER, backing="base.img")
    (tmp_path / "top.add-cow").write_bytes(content)
    _, found = findings(tmp_path, 2)
    assert found == {("same-file", "corruption")}


@pytest.mark.parametrize("gone", ["base.img", "top.raw"])
def test_check_finds_a_missing_file(tmp_path: Path, gone: str) -> None:
    pair(tmp_path, "ABCD", "-X--")
    (tmp_path / gone).unlink()
    report, found = findings(tmp_path, 2)
    assert found == {("missing-file", "corruption")}
    assert any(gone in each["message"] for each in report["findings"])


def test_check_ignores_a_missing_backing_with_all_allocated(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "AB", "gone.img", compatible=ALL_ALLOCATED)
    succeed("check", "top.add-cow", cwd=tmp_path)


@pytest.mark.long
def test_check_finds_a_cycle_in_the_chain(tmp_path: Path) -> None:
    draw(tmp_path / "one.add-cow", "-X", "two.add-cow", backing_format="add-cow")
    draw(tmp_path / "two.add-cow", "Y-", "one.add-cow", backing_format="add-cow")
    draw(tmp_path / "self.add-cow", "Y-", "self.add-cow", backing_format="add-cow")
    for file in ("one.add-cow", "two.add-cow", "self.add-cow"):
        _, found = findings(tmp_path, 2, file)
        assert ("chain-cycle", "corruption") in found


def test_check_finds_stray_bits(tmp_path: Path) -> None:
    put(pair(tmp_path, "ABCD", "-X--"), CLUSTER, b"\x12")
    report, found = findings(tmp_path, 2)
    assert found == {("stray-bits", "corruption")}
    assert report["allocated-clusters"] == 1


def test_check_finds_a_short_bitmap(tmp_path: Path) -> None:
    os.truncate(pair(tmp_path, "ABCD", "----"), CLUSTER)
    _, found = findings(tmp_path, 2)
    assert found == {("bitmap-length", "corruption")}


def test_check_calls_data_under_a_clear_bit_a_leak(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-Xy-")
    report, found = findings(tmp_path, 3)
    assert (report["leaks"], report["corruptions"], report["check-errors"]) == (1, 0, 0)
    assert found == {("leaks", "leak")}


def test_check_leaves_the_image_of_an_all_allocated_file_alone(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    draw(tmp_path / "top.add-cow", "xy", compatible=ALL_ALLOCATED)
    succeed("check", "top.add-cow", cwd=tmp_path)


@pytest.mark.parametrize("name", ["base.img", "top.raw"])
def test_check_could_not_look_at_a_fifo(tmp_path: Path, name: str) -> None:
    pair(tmp_path, "ABCD", "-X--")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    report, found = findings(tmp_path, 1)
    assert report["check-errors"] >= 1
    assert {severity for _, severity in found} == {"check-error"}


def test_check_of_a_file_that_is_not_add_cow_exits_with_63(tmp_path: Path) -> None:
    draw_raw(tmp_path / "some.raw", "AB")
    (tmp_path / "empty").touch()
    for name in ("some.raw", "empty"):
        assert name in refused("check", name, cwd=tmp_path, status=63)


# ---- what all commands have in common ----


@pytest.mark.long
def test_readers_accept_option_f(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X--")
    for command in READERS:
        plain = succeed(command, "top.add-cow", cwd=tmp_path)
        assert succeed(command, "-f", "add-cow", "top.add-cow", cwd=tmp_path) == plain


@pytest.mark.parametrize("command", COMMANDS)
def test_unusable_file_is_named_in_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = snapshot(tmp_path)
    for file in ("gone", "folder", "fifo"):
        assert file in refused(*on(command, file), cwd=tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_raw_file_is_refused_as_not_add_cow(tmp_path: Path, command: str) -> None:
    draw_raw(tmp_path / "some.raw", "AB")
    before = snapshot(tmp_path)
    status = 63 if command == "check" else 1
    assert "some.raw" in refused(*on(command, "some.raw"), cwd=tmp_path, status=status)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["map", "convert", "commit", "flatten", "io"])
def test_image_of_another_format_is_refused_by_name(tmp_path: Path, command: str) -> None:
    put(pair(tmp_path, "ABCD", "-X--"), 60, b"qcow2")
    before = snapshot(tmp_path)
    assert "qcow2" in refused(*on(command, "top.add-cow"), cwd=tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["map", "convert", "commit", "flatten", "io"])
def test_fifo_as_backing_is_refused_without_waiting(tmp_path: Path, command: str) -> None:
    pair(tmp_path, "ABCD", "-X--")
    (tmp_path / "base.img").unlink()
    os.mkfifo(tmp_path / "base.img")
    before = snapshot(tmp_path)
    assert "base.img" in refused(*on(command, "top.add-cow"), cwd=tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("command", COMMANDS)
def test_unreadable_file_is_named(tmp_path: Path, command: str) -> None:
    pair(tmp_path, "ABCD", "-X--").chmod(0)
    assert "top.add-cow" in refused(*on(command, "top.add-cow"), cwd=tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ("bogus",),
        ("info",),
        ("map",),
        ("check",),
        ("create",),
        ("commit",),
        ("flatten",),
        ("io",),
        ("convert", "-O", "raw", "top.add-cow"),
        ("info", "--bogus", "top.add-cow"),
        ("info", "--output", "yaml", "top.add-cow"),
        ("map", "top.add-cow", "surplus"),
        ("commit", "--jobs", "-1", "top.add-cow"),
        ("commit", "--jobs", "two", "top.add-cow"),
        ("convert", "-O", "qcow2", "top.add-cow", "new.qcow2"),
    ],
)
def test_usage_errors_exit_64_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    pair(tmp_path, "AB", "-X")
    before = snapshot(tmp_path)
    refused(*words, cwd=tmp_path, status=USAGE)
    assert snapshot(tmp_path) == before


@pytest.mark.long
def test_help_lists_the_commands(tmp_path: Path) -> None:
    said = succeed("--help", cwd=tmp_path).stdout
    for command in (*COMMANDS, "create"):
        assert command in said
        assert succeed(command, "--help", cwd=tmp_path).stdout


def test_installed_command_prints_the_same_help(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X--")
    installed = str(Path(sys.executable).with_name("addcow"))
    said = tool(installed, "info", "--output", "json", "top.add-cow", cwd=tmp_path)
    assert said == succeed("info", "--output", "json", "top.add-cow", cwd=tmp_path).stdout
