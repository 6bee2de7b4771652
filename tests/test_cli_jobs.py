"""Tests of `addcow commit`, `flatten` and `convert` through the command line.

The images are pictures, one character a cluster (see support/command.py): `pair(here, "ABC",
"-X0")`, then commit, and the base is "AX0".
"""

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    PATIENCE,
    USAGE,
    GiB,
    KiB,
    MiB,
    Result,
    addcow,
    bits,
    draw,
    draw_raw,
    guest,
    guest_picture,
    io,
    local_clusters,
    look,
    overlay_bytes,
    pair,
    put,
    read_header,
    refused,
    same_content,
    snapshot,
    stored_bytes,
    succeed,
    virtual_size,
)

pytestmark = pytest.mark.sample(1)

JOBS = [("--jobs", "0"), ("--jobs", "1"), ("--jobs", "2"), ()]


def commit(here: Path, *options: str, file: str = "top.add-cow") -> Result:
    return succeed("commit", *options, file, cwd=here)


def flatten(here: Path, *options: str, file: str = "top.add-cow") -> Result:
    return succeed("flatten", *options, file, cwd=here)


def convert(here: Path, *options: str, file: str = "top.add-cow") -> Result:
    return succeed("convert", "-O", "raw", *options, file, "new.raw", cwd=here)


# ---- commit into a raw backing ----


@pytest.mark.parametrize("jobs", JOBS)
def test_commit_moves_allocated_clusters_into_the_backing(
    tmp_path: Path, jobs: tuple[str, ...]
) -> None:
    top = pair(tmp_path, "ABCDEFGH-J", "-X-0Y---Z-")
    assert guest_picture(top) == "AXC0YFGHZJ"
    assert commit(tmp_path, *jobs).lines[-1] == "Image committed."
    assert look(tmp_path / "base.img") == "AXC0YFGHZJ"
    assert bits(top) == ".........."
    assert guest_picture(top) == "AXC0YFGHZJ"


@pytest.mark.long
@pytest.mark.parametrize("jobs", JOBS)
def test_commit_of_many_scattered_clusters(tmp_path: Path, jobs: tuple[str, ...]) -> None:
    base = "ABCD" * 16
    top = pair(tmp_path, base, "-Q--R-S-" * 8)
    commit(tmp_path, *jobs)
    assert look(tmp_path / "base.img") == "AQCDRBSD" * 8
    assert local_clusters(top) == []


def test_commit_frees_the_images_space_and_keeps_its_length(tmp_path: Path) -> None:
    top = pair(tmp_path, "A" * 64, "X" * 32 + "-" * 32)
    image = tmp_path / "top.raw"
    assert stored_bytes(image) >= 32 * CLUSTER
    header = top.read_bytes()[:CLUSTER]
    commit(tmp_path)
    assert stored_bytes(image) < CLUSTER
    assert image.read_bytes() == bytes(64 * CLUSTER)
    assert top.read_bytes() == header.ljust(2 * CLUSTER, b"\0")


@pytest.mark.long
def test_commit_frees_space_that_an_interrupted_commit_left(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "-x-Y")
    commit(tmp_path)
    assert look(tmp_path / "base.img") == "ABCY"
    assert look(tmp_path / "top.raw") == "0000"
    assert stored_bytes(tmp_path / "top.raw") < CLUSTER
    succeed("check", "top.add-cow", cwd=tmp_path)
    assert bits(top) == "...."


@pytest.mark.long
def test_commit_keep_leaves_overlay_and_image_as_they_were(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X0-")
    before = snapshot(tmp_path)
    assert commit(tmp_path, "-d").lines[-1] == "Image committed."
    after = snapshot(tmp_path)
    assert look(tmp_path / "base.img") == "AX0D"
    assert (after["top.add-cow"], after["top.raw"]) == (before["top.add-cow"], before["top.raw"])


@pytest.mark.long
def test_commit_writes_only_allocated_clusters(tmp_path: Path) -> None:
    pair(tmp_path, "-----", "--X--")
    commit(tmp_path)
    assert look(tmp_path / "base.img") == "00X00"
    assert stored_bytes(tmp_path / "base.img") < 2 * CLUSTER


@pytest.mark.long
def test_commit_grows_a_shorter_backing(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "-X-Y--")
    commit(tmp_path)
    assert look(tmp_path / "base.img") == "AX0Y00"
    assert guest_picture(top) == "AX0Y00"


@pytest.mark.long
def test_commit_keeps_the_backings_odd_end_when_it_grows(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "----")
    with (tmp_path / "base.img").open("ab") as file:
        file.write(b"tail" * 25)
    commit(tmp_path)
    assert guest_picture(top) == "AB?0"
    io("top.add-cow", "write -P 88 192k 64k", cwd=tmp_path)
    commit(tmp_path)
    assert look(tmp_path / "base.img") == "AB?X"
    content = (tmp_path / "base.img").read_bytes()
    assert content[2 * CLUSTER : 3 * CLUSTER] == (b"tail" * 25).ljust(CLUSTER, b"\0")


def test_commit_never_shortens_a_longer_backing(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEF", "-X-")
    commit(tmp_path)
    assert look(tmp_path / "base.img") == "AXCDEF"


def test_commit_of_a_partial_last_cluster(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "--X")
    os.truncate(tmp_path / "top.raw", 2 * CLUSTER + 1536)
    commit(tmp_path)
    expected = b"A" * CLUSTER + b"B" * CLUSTER + b"X" * 1536 + b"C" * (CLUSTER - 1536)
    assert (tmp_path / "base.img").read_bytes() == expected + b"D" * CLUSTER
    assert (tmp_path / "top.raw").stat().st_size == 2 * CLUSTER + 1536
    assert bits(top) == "..."


def test_commit_of_an_all_allocated_overlay(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "x-Y0", compatible=ALL_ALLOCATED)
    assert guest_picture(tmp_path / "top.add-cow") == "x0Y0"
    commit(tmp_path)
    assert look(tmp_path / "base.img") == "x0Y0"
    assert read_header(tmp_path / "top.add-cow").compatible == 0
    assert bits(tmp_path / "top.add-cow") == "...."
    assert guest_picture(tmp_path / "top.add-cow") == "x0Y0"


def test_commit_keep_of_an_all_allocated_overlay(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "x-Y0", compatible=ALL_ALLOCATED)
    before = (tmp_path / "top.add-cow").read_bytes()
    commit(tmp_path, "-d")
    assert look(tmp_path / "base.img") == "x0Y0"
    assert (tmp_path / "top.add-cow").read_bytes() == before
    assert look(tmp_path / "top.raw") == "x0Y0"


def test_commit_preserves_unknown_compatible_features(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "-X--")
    put(top, 32, b"\0\x80")
    commit(tmp_path)
    assert read_header(top).compatible == 0x8000


def test_commit_of_nothing_is_done_at_once(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "----")
    before = snapshot(tmp_path)
    assert commit(tmp_path).lines[-1] == "Image committed."
    assert snapshot(tmp_path) == before


@pytest.mark.long
def test_commit_twice_is_commit_once(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X0-")
    commit(tmp_path)
    once = snapshot(tmp_path)
    commit(tmp_path)
    assert snapshot(tmp_path) == once


def test_commit_of_a_large_sparse_image_moves_only_its_data(tmp_path: Path) -> None:
    with (tmp_path / "base.img").open("wb") as file:
        file.truncate(256 * GiB)
    succeed("create", "-q", "-b", "base.img", "-F", "raw", "top.add-cow", cwd=tmp_path)
    io("top.add-cow", "write -P 7 0 64k", "write -P 9 255G 64k", cwd=tmp_path)
    commit(tmp_path)
    assert guest(tmp_path / "base.img", 0, 4, "raw") == b"\7" * 4
    assert guest(tmp_path / "base.img", 255 * GiB, CLUSTER + 1, "raw") == b"\t" * CLUSTER + b"\0"
    assert stored_bytes(tmp_path / "base.img") < MiB


# ---- commit into an add-cow backing ----


def chain(here: Path, base: str, mid: str, top: str, *, small: int, compatible: int = 0) -> None:
    """Make top over mid over base; top's clusters are the small ones, mid's of 64 KiB."""
    draw_raw(here / "base.img", base)
    draw(here / "mid.add-cow", mid, compatible=compatible)
    draw(here / "top.add-cow", top, "mid.add-cow", backing_format="add-cow", cluster=small)


@pytest.mark.parametrize("jobs", JOBS)
def test_commit_copies_up_in_an_add_cow_backing(tmp_path: Path, jobs: tuple[str, ...]) -> None:
    small = 16 * KiB
    # A line a cluster of mid: nothing local in top, parts of a cluster, a whole one.
    chain(tmp_path, "ABCDE", "-P-Q-", "-----X--Y--0ZZZZ--0-", small=small)
    expected = "AAAAPXPPYCC0ZZZZEE0E"
    base = (tmp_path / "base.img").read_bytes()
    assert guest_picture(tmp_path / "top.add-cow", small) == expected
    commit(tmp_path, *jobs)
    assert guest_picture(tmp_path / "mid.add-cow", small) == expected
    assert guest_picture(tmp_path / "top.add-cow", small) == expected
    assert bits(tmp_path / "mid.add-cow") == ".1111"
    assert local_clusters(tmp_path / "top.add-cow") == []
    assert (tmp_path / "base.img").read_bytes() == base


def test_commit_into_smaller_clusters(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCDEFGH", cluster=4 * KiB)
    draw(tmp_path / "mid.add-cow", "-P----Q-", cluster=4 * KiB)
    draw(tmp_path / "top.add-cow", "-X", "mid.add-cow", backing_format="add-cow", cluster=16 * KiB)
    commit(tmp_path)
    assert guest_picture(tmp_path / "mid.add-cow", 4 * KiB) == "APCDXXXX"
    assert bits(tmp_path / "mid.add-cow") == ".1..1111"


def test_commit_leaves_the_bits_of_an_all_allocated_backing_alone(tmp_path: Path) -> None:
    chain(tmp_path, "ABC", "pqr", "-X-", small=CLUSTER, compatible=ALL_ALLOCATED)
    before = (tmp_path / "mid.add-cow").read_bytes()
    commit(tmp_path)
    assert guest_picture(tmp_path / "mid.add-cow") == "pXr"
    assert (tmp_path / "mid.add-cow").read_bytes() == before


def test_commit_into_a_shorter_add_cow_backing_is_refused(tmp_path: Path) -> None:
    chain(tmp_path, "ABCD", "-P-", "-X--", small=CLUSTER)
    before = snapshot(tmp_path)
    assert "mid.add-cow" in refused("commit", "top.add-cow", cwd=tmp_path)
    assert snapshot(tmp_path) == before


def test_commit_into_a_longer_add_cow_backing(tmp_path: Path) -> None:
    chain(tmp_path, "ABCD", "-P--", "X-", small=CLUSTER)
    commit(tmp_path)
    assert guest_picture(tmp_path / "mid.add-cow") == "XPCD"


def test_commit_down_the_whole_chain(tmp_path: Path) -> None:
    chain(tmp_path, "ABCD", "-PQ-", "--X0", small=CLUSTER)
    commit(tmp_path)
    commit(tmp_path, file="mid.add-cow")
    assert look(tmp_path / "base.img") == "APX0"
    assert guest_picture(tmp_path / "top.add-cow") == "APX0"


# ---- refusals of commit ----


def test_commit_without_a_backing_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "AB", "", compatible=ALL_ALLOCATED)
    before = snapshot(tmp_path)
    message = refused("commit", "top.add-cow", cwd=tmp_path)
    assert "top.add-cow" in message
    assert "backing" in message
    assert snapshot(tmp_path) == before


def short_bitmap(top: Path) -> None:
    os.truncate(top, CLUSTER)


def backing_gone(top: Path) -> None:
    (top.parent / "base.img").unlink()


def image_gone(top: Path) -> None:
    (top.parent / "top.raw").unlink()


def unknown_backing_format(top: Path) -> None:
    put(top, 44, b"nosuch")


def empty_backing_format(top: Path) -> None:
    put(top, 44, b"\0\0\0")


def same_file_twice(top: Path) -> None:
    (top.parent / "base.img").unlink()
    (top.parent / "base.img").hardlink_to(top.parent / "top.raw")


def unknown_feature(top: Path) -> None:
    put(top, 24, b"\1")


@pytest.mark.parametrize(
    "damage",
    [
        short_bitmap,
        backing_gone,
        image_gone,
        unknown_backing_format,
        empty_backing_format,
        same_file_twice,
        unknown_feature,
    ],
)
@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_jobs_refuse_a_damaged_image_and_change_nothing(
    tmp_path: Path, job: str, damage: Callable[[Path], None]
) -> None:
    damage(pair(tmp_path, "ABCD", "-X--"))
    before = snapshot(tmp_path)
    refused(job, "top.add-cow", cwd=tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("job", ["commit", "flatten", "convert"])
def test_jobs_refuse_a_cycle(tmp_path: Path, job: str) -> None:
    draw(tmp_path / "one.add-cow", "-X", "two.add-cow", backing_format="add-cow")
    draw(tmp_path / "two.add-cow", "Y-", "one.add-cow", backing_format="add-cow")
    before = snapshot(tmp_path)
    words = ("-O", "raw", "one.add-cow", "new.raw") if job == "convert" else ("one.add-cow",)
    assert "in the chain already" in refused(job, *words, cwd=tmp_path)
    assert snapshot(tmp_path) == before


# ---- flatten ----


@pytest.mark.parametrize("jobs", JOBS)
def test_flatten_allocates_every_cluster(tmp_path: Path, jobs: tuple[str, ...]) -> None:
    top = pair(tmp_path, "ABCDEFGH-J" * 4, "-X-0Y---Z-" * 4)
    base = (tmp_path / "base.img").read_bytes()
    flatten(tmp_path, *jobs)
    assert look(tmp_path / "top.raw") == "AXC0YFGHZJ" * 4
    assert bits(top) == "1" * 40
    assert (tmp_path / "base.img").read_bytes() == base
    header = read_header(top)
    assert header.compatible == ALL_ALLOCATED
    assert (header.backing, header.backing_format, header.image) == ("base.img", "raw", "top.raw")


@pytest.mark.long
def test_flattened_image_does_not_need_the_backing(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "-X--")
    flatten(tmp_path)
    (tmp_path / "base.img").unlink()
    convert(tmp_path)
    assert look(tmp_path / "new.raw") == guest_picture(top) == "AXCD"


def test_flatten_overwrites_garbage(tmp_path: Path) -> None:
    pair(tmp_path, "AB-", "y-zwX")
    flatten(tmp_path)
    assert look(tmp_path / "top.raw") == "AB00X"


def test_flatten_over_a_longer_backing_keeps_its_size(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEF", "-X-")
    flatten(tmp_path)
    assert look(tmp_path / "top.raw") == "AXC"
    assert look(tmp_path / "base.img") == "ABCDEF"


def test_flatten_leaves_holes_where_the_backing_has_them(tmp_path: Path) -> None:
    pair(tmp_path, "A" + "-" * 62 + "B", "-" * 64)
    flatten(tmp_path)
    assert look(tmp_path / "top.raw") == "A" + "0" * 62 + "B"
    assert stored_bytes(tmp_path / "top.raw") < 4 * CLUSTER


def test_flatten_of_a_partial_last_cluster(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCD", "-X-")
    os.truncate(tmp_path / "top.raw", 2 * CLUSTER + 1024)
    flatten(tmp_path)
    expected = b"A" * CLUSTER + b"X" * CLUSTER + b"C" * 1024
    assert (tmp_path / "top.raw").read_bytes() == expected
    assert bits(top) == "111"


def test_flatten_through_a_chain(tmp_path: Path) -> None:
    chain(tmp_path, "ABC", "-P--", "----X--0----Y---", small=16 * KiB)
    before = snapshot(tmp_path)
    view = guest_picture(tmp_path / "top.add-cow", 16 * KiB)
    flatten(tmp_path)
    assert look(tmp_path / "top.raw", 16 * KiB) == view == "AAAAXPP0CCCCY000"
    after = snapshot(tmp_path)
    for name in ("base.img", "mid.add-cow", "mid.raw"):
        assert after[name] == before[name]


def test_flatten_discard_removes_only_the_add_cow_file(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X--")
    flatten(tmp_path, "--discard")
    assert set(snapshot(tmp_path)) == {"base.img", "top.raw"}
    assert look(tmp_path / "top.raw") == "AXCD"
    assert look(tmp_path / "base.img") == "ABCD"


def test_flatten_of_an_all_allocated_image_is_done_at_once(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "x-Y0", compatible=ALL_ALLOCATED)
    before = (tmp_path / "top.raw").read_bytes()
    flatten(tmp_path)
    assert (tmp_path / "top.raw").read_bytes() == before
    flatten(tmp_path, "--discard")
    assert set(snapshot(tmp_path)) == {"base.img", "top.raw"}
    assert (tmp_path / "top.raw").read_bytes() == before


@pytest.mark.long
def test_flatten_twice_is_flatten_once(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "-X0-")
    flatten(tmp_path)
    once = snapshot(tmp_path)
    flatten(tmp_path)
    assert snapshot(tmp_path) == once


def test_flatten_without_backing_and_without_the_flag_reads_zeros(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "y-Xz", "")
    flatten(tmp_path)
    assert look(tmp_path / "top.raw") == "00X0"


# ---- convert ----


def test_convert_writes_the_guests_view(tmp_path: Path) -> None:
    pair(tmp_path, "AB-", "-X-Y-z")
    before = snapshot(tmp_path)
    convert(tmp_path)
    assert look(tmp_path / "new.raw") == "AX0Y00"
    assert {name: snapshot(tmp_path)[name] for name in before} == before


def test_convert_through_a_chain_with_an_odd_length(tmp_path: Path) -> None:
    chain(tmp_path, "ABC", "-P--", "-------XY------0", small=16 * KiB)
    os.truncate(tmp_path / "top.raw", 15 * 16 * KiB + 512 + 3)
    view = guest(tmp_path / "top.add-cow", 0, virtual_size(tmp_path / "top.add-cow"))
    convert(tmp_path)
    assert (tmp_path / "new.raw").read_bytes() == view


def test_convert_makes_a_sparse_file(tmp_path: Path) -> None:
    pair(tmp_path, "A" + "-" * 62 + "B", "-0" + "-" * 62)
    convert(tmp_path)
    assert look(tmp_path / "new.raw") == "A" + "0" * 62 + "B"
    assert stored_bytes(tmp_path / "new.raw") < 4 * CLUSTER


def test_convert_of_a_raw_file(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB--C")
    convert(tmp_path, "-f", "raw", file="base.img")
    same_content("base.img", "new.raw", cwd=tmp_path)
    assert look(tmp_path / "new.raw") == "AB00C"


@pytest.mark.long
def test_convert_never_writes_over_a_file(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-X")
    before = snapshot(tmp_path)
    for existing in ("base.img", "top.raw", "top.add-cow"):
        message = refused("convert", "-O", "raw", "top.add-cow", existing, cwd=tmp_path)
        assert existing in message
    assert snapshot(tmp_path) == before


def test_convert_that_fails_leaves_nothing(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-X")
    (tmp_path / "base.img").unlink()
    before = snapshot(tmp_path)
    refused("convert", "-O", "raw", "top.add-cow", "new.raw", cwd=tmp_path)
    refused("convert", "-O", "raw", "top.add-cow", "gone/new.raw", cwd=tmp_path)
    assert snapshot(tmp_path) == before


# ---- what they print ----


@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_jobs_with_quiet_print_nothing(tmp_path: Path, job: str) -> None:
    top = pair(tmp_path, "ABCD", "-X--")
    assert succeed(job, "-q", "top.add-cow", cwd=tmp_path).said == ""
    assert guest_picture(top) == "AXCD"


@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_progress_without_a_terminal_is_plain_text(tmp_path: Path, job: str) -> None:
    pair(tmp_path, "ABCD" * 8, "-X--" * 8)
    result = succeed(job, "-p", "--jobs", "2", "top.add-cow", cwd=tmp_path)
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.said) is None
    assert result.stdout == "" or result.stdout.endswith("\n")


@pytest.mark.long
@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_progress_on_a_terminal_is_a_bar(tmp_path: Path, job: str) -> None:
    pair(tmp_path, "ABCD" * 8, "-X--" * 8)
    plain = on_a_terminal(tmp_path, job, "--jobs", "1", "top.add-cow")
    pair(tmp_path, "ABCD" * 8, "-X--" * 8)
    with_bar = on_a_terminal(tmp_path, job, "-p", "--jobs", "1", "top.add-cow")
    assert "%" not in plain
    assert "100%" in with_bar
    assert ("Image committed." in with_bar) == (job == "commit")


def on_a_terminal(cwd: Path, *arguments: str) -> str:
    """Run addcow with its output on a pseudo terminal; return what appeared there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "addcow_mp", *arguments],
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    seen = b"".join(iter(lambda: _from_terminal(ours), b""))
    os.close(ours)
    assert process.wait(PATIENCE) == 0, seen
    return seen.decode()


def _from_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:
        # Linux answers EIO, not an empty read, when the last writer has gone.
        return b""


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_commit_reports_what_it_moved(tmp_path: Path, jobs: str) -> None:
    pair(tmp_path, "ABCDEF", "-XY0--")
    # A allocated cluster that is a hole in the image file: the backing's data has to go.
    draw_raw(tmp_path / "top.raw", "-XY---")
    report = commit(tmp_path, "--output", "json", "--jobs", jobs).json
    assert isinstance(report["seconds"], float)
    assert report["seconds"] >= 0
    moved = {
        "filename": "top.add-cow",
        "bytes-moved": 2 * CLUSTER,
        "clusters-moved": 2,
        "bytes-zeroed": CLUSTER,
        "clusters-zeroed": 1,
    }
    assert {key: report[key] for key in moved} == moved
    assert look(tmp_path / "base.img") == "AXY0EF"


def test_flatten_reports_what_it_moved(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "-X---")
    report = flatten(tmp_path, "--output", "json").json
    assert report["bytes-moved"] == 2 * CLUSTER
    assert report["clusters-moved"] == 2
    assert report["seconds"] >= 0


def test_json_report_of_a_job_with_nothing_to_do(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "---")
    assert commit(tmp_path, "--output", "json").json["bytes-moved"] == 0


@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_jobs_accept_option_f(tmp_path: Path, job: str) -> None:
    top = pair(tmp_path, "ABCD", "-X--")
    succeed(job, "-f", "add-cow", "top.add-cow", cwd=tmp_path)
    assert guest_picture(top) == "AXCD"


def test_failed_job_with_output_json_prints_json(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "AB", "", compatible=ALL_ALLOCATED)
    result = addcow("commit", "--output", "json", "top.add-cow", cwd=tmp_path)
    assert result.status == 1
    line = result.stderr.removeprefix("addcow: ").rstrip("\n")
    assert result.json == {"error": line, "filename": "top.add-cow", "exit": 1}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("info", "none.add-cow"), 1),
        (("map", "none.add-cow"), 1),
        (("verify", "none.add-cow"), 1),
        (("compare", "none", "none"), 2),
        (("convert", "-O", "raw", "none", "new"), 1),
        (("manifest", "create", "none"), 1),
        (("farm", "check", "./none"), 1),
        (("farm", "scrub", "status", "--state", "none"), 1),
        (("flatten", "--bogus", "none"), USAGE),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else str(one),
)
def test_every_command_with_output_json_reports_its_failure_as_json(
    words: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    result = addcow(*words, "--output", "json", cwd=tmp_path)
    assert result.status == status
    assert result.json["exit"] == status
    assert result.json["error"] in result.stderr


# ---- the judge ----


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_commit_and_flatten_agree_with_qemu_img(tmp_path: Path, jobs: str) -> None:
    pair(tmp_path, "ABCD-EFG" * 8, "-X--0-Y-" * 8)
    convert(tmp_path)
    draw(tmp_path / "flat.add-cow", "-X--0-Y-" * 8)
    flatten(tmp_path, "--jobs", jobs, file="flat.add-cow")
    same_content("new.raw", "flat.raw", cwd=tmp_path)
    (tmp_path / "flat.add-cow").unlink()
    commit(tmp_path, "--jobs", jobs)
    same_content("new.raw", "base.img", cwd=tmp_path)


@pytest.mark.long
def test_number_of_processes_does_not_change_the_result(tmp_path: Path) -> None:
    outcomes = []
    for number in ("0", "1", "2", "3"):
        here = tmp_path / number
        here.mkdir()
        chain(here, "ABCD" * 4, "-P--" * 4, "----X--Y" * 8, small=16 * KiB)
        commit(here, "--jobs", number)
        outcomes.append(snapshot(here))
    assert all(outcome == outcomes[0] for outcome in outcomes)


def numbered(clusters: range) -> bytes:
    """Return clusters that are each full of their own number."""
    return b"".join(struct.pack("<I", number) * (CLUSTER // 4) for number in clusters)


@pytest.mark.long
def test_two_workers_share_a_large_commit(tmp_path: Path) -> None:
    count = 2400
    with (tmp_path / "base.img").open("wb") as file:
        file.truncate(count * CLUSTER)
    (tmp_path / "top.raw").write_bytes(numbered(range(count)))
    local = [number for number in range(count) if number % 100 != 99]
    (tmp_path / "top.add-cow").write_bytes(
        overlay_bytes(image="top.raw", size=count * CLUSTER, backing="base.img", local=local)
    )
    report = commit(tmp_path, "--jobs", "2", "--output", "json").json
    assert report["jobs"] == 2
    assert report["clusters-moved"] == len(local)
    for start in range(0, count, 100):
        content = guest(tmp_path / "base.img", start * CLUSTER, 100 * CLUSTER, "raw")
        assert content == numbered(range(start, start + 99)) + bytes(CLUSTER)
    assert local_clusters(tmp_path / "top.add-cow") == []
    assert stored_bytes(tmp_path / "top.raw") < CLUSTER


def test_interrupt_exits_130(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-X")
    process = subprocess.Popen(
        # Tests that run in the background of a shell inherit that it is ignored.
        ["env", "--default-signal=INT", sys.executable, "-m", "addcow_mp", "io", "top.add-cow"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"length\n")
    process.stdin.flush()
    assert select.select([process.stdout], [], [], PATIENCE)[0], "no answer"
    # The answer shows that it has started and now waits for the next command.
    assert b"128 KiB" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


@pytest.mark.long
@pytest.mark.parametrize("words", [("commit",), ("commit", "-d"), ("farm", "commit")])
def test_commit_refuses_an_overlay_declared_as_raw_backing(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    pair(tmp_path, "AB", "-X")
    draw(tmp_path / "wrong.add-cow", "YZ", "top.add-cow")
    before = (tmp_path / "top.add-cow").read_bytes()
    result = addcow(*words, "wrong.add-cow", cwd=tmp_path)
    assert result.status == 1
    assert "top.add-cow: it is declared raw, but is an add-cow file" in result.stderr
    assert (tmp_path / "top.add-cow").read_bytes() == before
    succeed("commit", "--force", "wrong.add-cow", cwd=tmp_path)
    assert (tmp_path / "top.add-cow").read_bytes() != before
