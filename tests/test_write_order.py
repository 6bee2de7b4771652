"""Tests of the order on disk: data, sync, bits, sync, then freed space.

The system calls of this process are noted (support/call_trace.py). A story lists them in few
words; the judge checks longer traces. Then syncs fail one by one: nothing after them may happen.
strace shows the order of several processes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import addcow_mp
from addcow_mp import AddcowError, SyncError
from addcow_mp.cli.main import run
from addcow_mp.engine import checkpoints
from support.call_trace import Call, Trace, broken, frees_after_bits, judge, name_of
from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    MiB,
    bits,
    draw,
    draw_raw,
    guest_picture,
    look,
    overlay_bytes,
    pair,
    put,
    read_header,
    snapshot,
    tool,
)

# ---- noting down ----


# ---- the judge ----


# ---- stories ----


SET = ["data top.raw", "sync top.raw", "bits top.add-cow", "sync top.add-cow"]
CLEARED = ["bits top.add-cow", "sync top.add-cow", "free top.raw"]


def middle(here: Path, base: str, mid: str, top: str, *, compatible: int = 0) -> Path:
    """A chain of two overlays over a raw file."""
    draw_raw(here / "base.img", base)
    draw(here / "mid.add-cow", mid, compatible=compatible)
    draw(here / "top.add-cow", top, "mid.add-cow", backing_format="add-cow")
    return here / "top.add-cow"


def ends_with_freeing(trace: Trace) -> list[str]:
    """The story up to the freeing of space; behind it nothing but a sync may come."""
    story = trace.story()
    end = story.index("free top.raw") + 1
    assert set(story[end:]) <= {"sync top.raw"}
    return story[:end]


def test_flush_syncs_data_before_it_publishes_bits(tmp_path: Path, trace: Trace) -> None:
    with addcow_mp.open(pair(tmp_path, "ABC", "---"), writable=True) as disk:
        disk.write(5, b"x")
        disk.write(2 * CLUSTER, b"y" * CLUSTER)
        assert trace.story() == SET[:1]
        disk.flush()
        assert trace.story() == SET
        disk.flush()
    assert trace.story() == SET


def test_flush_after_writing_zeros_keeps_the_order(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-b-")
    with addcow_mp.open(top, writable=True) as disk:
        disk.write_zeroes(CLUSTER, CLUSTER)
        disk.flush()
    assert trace.story() == ["free top.raw", *SET[1:]]
    assert judge(trace.calls, top, {1: "top.raw"}) == 1


def test_closing_flushes_in_order(tmp_path: Path, trace: Trace) -> None:
    with addcow_mp.open(pair(tmp_path, "ABC", "-X-"), writable=True) as disk:
        disk.write(0, b"x")
    assert trace.story() == SET


def test_writes_to_allocated_clusters_change_no_bits(tmp_path: Path, trace: Trace) -> None:
    with addcow_mp.open(pair(tmp_path, "ABC", "XYZ"), writable=True) as disk:
        disk.write(5, b"x" * 2 * CLUSTER)
    assert trace.story() == SET[:2]


def test_reading_changes_nothing(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with addcow_mp.open(top) as disk:
        disk.read(0, 3 * CLUSTER)
    addcow_mp.info(top)
    addcow_mp.check(top)
    assert trace.calls == []


@pytest.mark.parametrize("picture", ["---", "-X-", "-b-", "b-X"])
def test_flatten_sets_the_flag_last(tmp_path: Path, trace: Trace, picture: str) -> None:
    top = pair(tmp_path, "ABC", picture)
    addcow_mp.flatten(top, jobs=0)
    assert trace.story() == [*SET, "header top.add-cow", "sync top.add-cow"]
    assert judge(trace.calls, top, {1: "top.raw"}) == 3 - picture.count("X")
    assert look(tmp_path / "top.raw") == guest_picture(top)


def test_flatten_frees_stale_clusters_before_it_sets_bits(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "---", "bbb")
    addcow_mp.flatten(top, jobs=0)
    wanted = ["free top.raw", *SET[1:], "header top.add-cow", "sync top.add-cow"]
    assert trace.story() == wanted
    assert judge(trace.calls, top, {1: "top.raw"}) == 3


def test_discard_removes_the_overlay_last(tmp_path: Path, trace: Trace) -> None:
    addcow_mp.flatten(pair(tmp_path, "ABC", "-X-"), discard=True, jobs=0)
    flagged = ["header top.add-cow", "sync top.add-cow"]
    removed = ["remove top.add-cow", f"sync {tmp_path.name}/"]
    assert trace.story() == [*SET, *flagged, *removed]


def test_commit_into_a_raw_backing_keeps_the_order(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    addcow_mp.commit(top, jobs=0)
    assert ends_with_freeing(trace) == ["data base.img", "sync base.img", *CLEARED]
    assert judge(trace.calls, top, {0: "base.img"}) == 1


def test_commit_into_a_shorter_backing_grows_it_first(tmp_path: Path, trace: Trace) -> None:
    addcow_mp.commit(pair(tmp_path, "A", "--X"), jobs=0)
    wanted = ["length base.img", "data base.img", "sync base.img", *CLEARED]
    assert ends_with_freeing(trace) == wanted


def test_commit_d_changes_no_bits(tmp_path: Path, trace: Trace) -> None:
    addcow_mp.commit(pair(tmp_path, "ABC", "-X-"), keep=True, jobs=0)
    assert trace.story() == ["data base.img", "sync base.img"]


def test_commit_of_zeros_makes_them_durable_first(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with (tmp_path / "top.raw").open("r+b") as image:
        image.truncate(0)
        image.truncate(3 * CLUSTER)
    addcow_mp.commit(top, jobs=0)
    assert trace.story()[:4] == ["free base.img", "sync base.img", *CLEARED[:2]]
    assert judge(trace.calls, top, {0: "base.img"}) == 1


MARKED = ["data mid.raw", "sync mid.raw", "bits mid.add-cow", "sync mid.add-cow"]


@pytest.mark.parametrize("picture", ["---", "Y--", "yyy"])
def test_commit_into_an_add_cow_backing_keeps_the_order(
    tmp_path: Path, trace: Trace, picture: str
) -> None:
    top = middle(tmp_path, "ABC", picture, "-X-")
    addcow_mp.commit(top, jobs=0)
    assert ends_with_freeing(trace) == [*MARKED, *CLEARED]
    assert judge(trace.calls, top, {0: "mid.raw"}) == 1
    assert judge(trace.calls, tmp_path / "mid.add-cow", {1: "mid.raw"}) == 1


def test_commit_into_larger_clusters_keeps_the_order(tmp_path: Path, trace: Trace) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    draw(tmp_path / "mid.add-cow", "-b")
    draw_raw(tmp_path / "top.raw", "-" * 5 + "X" * 3 + "-" * 24, cluster=4 * KiB)
    top = tmp_path / "top.add-cow"
    top.write_bytes(
        overlay_bytes(
            image="top.raw",
            size=2 * CLUSTER,
            backing="mid.add-cow",
            backing_format="add-cow",
            cluster=4 * KiB,
            local=[5, 6, 31],
        )
    )
    addcow_mp.commit(top, jobs=0)
    story = ends_with_freeing(trace)
    assert story[-6:] == [*MARKED[1:], *CLEARED]
    assert set(story[:-6]) <= {"data mid.raw", "free mid.raw"}
    assert judge(trace.calls, top, {0: "mid.raw"}) == 3
    assert judge(trace.calls, tmp_path / "mid.add-cow", {1: "mid.raw"}) == 2


def test_commit_into_an_all_allocated_backing_changes_no_bits_of_it(
    tmp_path: Path, trace: Trace
) -> None:
    addcow_mp.commit(middle(tmp_path, "ABC", "YYY", "-X-", compatible=ALL_ALLOCATED), jobs=0)
    assert ends_with_freeing(trace) == [*MARKED[:2], *CLEARED]


def test_commit_of_an_all_allocated_overlay_sets_its_bits_first(
    tmp_path: Path, trace: Trace
) -> None:
    draw_raw(tmp_path / "base.img", "ABC")
    top = tmp_path / "top.add-cow"
    draw(top, "xYz", compatible=ALL_ALLOCATED)
    addcow_mp.commit(top, jobs=0)
    assert ends_with_freeing(trace) == [
        *("bits top.add-cow", "sync top.add-cow", "header top.add-cow", "sync top.add-cow"),
        *("data base.img", "sync base.img"),
        *CLEARED,
    ]
    assert look(tmp_path / "base.img") == "xYz"


def test_commit_clears_bits_past_the_end(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    put(top, CLUSTER + 100, b"\xff")
    addcow_mp.commit(top, jobs=0)
    assert ends_with_freeing(trace) == ["data base.img", "sync base.img", *CLEARED]
    assert bits(top) == "..."


def test_create_makes_the_image_the_overlay_and_the_directory_durable(
    tmp_path: Path, trace: Trace
) -> None:
    draw_raw(tmp_path / "base.img", "ABC")
    top = tmp_path / "top.add-cow"
    addcow_mp.create(top, backing=tmp_path / "base.img", backing_format="raw")
    words = [(call.word, call.file) for call in trace.calls]
    here = f"{tmp_path.name}/"
    assert words[-1] == ("synced", here)
    image, overlay, directory = (
        max(at for at, word in enumerate(words) if word == ("sync", name))
        for name in ("top.raw", "top.add-cow", here)
    )
    assert image < overlay < directory
    assert words.index(("length", "top.raw")) < image
    assert words.index(("header", "top.add-cow")) < overlay
    # The entry of the image is durable before the overlay that names it.
    assert words.index(("sync", here)) < words.index(("header", "top.add-cow"))


def test_convert_makes_the_new_file_and_its_name_durable(tmp_path: Path, trace: Trace) -> None:
    addcow_mp.convert(pair(tmp_path, "ABC", "-X-"), tmp_path / "new.raw", jobs=0)
    synced = ["sync new.raw", f"sync {tmp_path.name}/"]
    assert trace.story() == ["length new.raw", "data new.raw", *synced]


# ---- longer traces ----


def wide(here: Path, local: range) -> Path:
    """An overlay of four tasks; of each 1024 clusters those in ``local`` are allocated."""
    size = 256 * MiB
    broken(here / "base.img", size, 0)
    broken(here / "top.raw", size, CLUSTER)
    content = overlay_bytes(
        image="top.raw",
        size=size,
        backing="base.img",
        local=[1024 * part + number for part in range(4) for number in local],
    )
    (here / "top.add-cow").write_bytes(content)
    return here / "top.add-cow"


def test_every_checkpoint_of_a_flatten_keeps_the_order(
    tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 1)
    top = wide(tmp_path, range(1, 40, 2))
    addcow_mp.flatten(top, jobs=0)
    assert trace.story().count("bits top.add-cow") > 1
    assert judge(trace.calls, top, {1: "top.raw"}) == 4 * 1004
    assert trace.story()[-2:] == ["header top.add-cow", "sync top.add-cow"]


def test_every_checkpoint_of_a_commit_keeps_the_order(
    tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 1)
    top = wide(tmp_path, range(1, 1024))
    addcow_mp.commit(top, jobs=0)
    assert trace.story().count("bits top.add-cow") > 1
    # Space comes back as the job goes on, not only at its end.
    assert trace.story().count("free top.raw") > 1
    assert judge(trace.calls, top, {0: "base.img"}) == 4 * 1023
    assert frees_after_bits(trace.calls, top, "top.raw")


def test_judge_rejects_a_wrong_order(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    addcow_mp.commit(top, jobs=0)
    calls = [call for call in trace.calls if call.word not in ("sync", "synced")]
    with pytest.raises(AssertionError):
        judge(calls, top, {0: "base.img"})
    free_first = sorted(trace.calls, key=lambda call: call[:2] == ("synced", "top.add-cow"))
    assert not frees_after_bits(free_first, top, "top.raw")


# ---- a sync that fails ----


def fails(trace: Trace, work: Callable[[], object], name: str) -> SyncError:
    """Let the first sync of ``name`` fail in ``work``: it is told, and not tried again."""
    trace.to_be(name)
    with pytest.raises(AddcowError) as caught:
        work()
    error = caught.value
    assert isinstance(error, SyncError)
    assert error.exit_code == 1
    assert error.fields["errno"] == errno.EIO
    assert os.path.basename(error.fields["path"]) == name
    assert trace.failed == [name]
    assert "\n" not in str(error)
    return error


def kept(*paths: Path) -> Callable[[], bool]:
    """Whether these files are what they were."""
    before = [path.read_bytes() for path in paths]
    return lambda: [path.read_bytes() for path in paths] == before


def write_and_flush(top: Path) -> None:
    with addcow_mp.open(top, writable=True) as disk:
        disk.write(0, b"x")
        disk.flush()


def test_failed_flush_publishes_nothing(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    unchanged = kept(top, tmp_path / "base.img")
    error = fails(trace, lambda: write_and_flush(top), "top.raw")
    assert unchanged()
    assert "nothing of this step was published" in str(error)


def test_failed_close_publishes_nothing(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    unchanged = kept(top, tmp_path / "base.img")

    def write_and_close() -> None:
        with addcow_mp.open(top, writable=True) as disk:
            disk.write(0, b"x")

    fails(trace, write_and_close, "top.raw")
    assert unchanged()


def test_flush_does_not_publish_writes_made_during_its_sync(
    tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = pair(tmp_path, "ABC", "---")
    sync, late = os.fdatasync, [b"y"]

    def slow_sync(fd: int) -> None:
        sync(fd)
        if name_of(fd) == "top.raw" and late:
            disk.write(2 * CLUSTER, late.pop() * CLUSTER)

    with addcow_mp.open(top, writable=True) as disk:
        disk.write(0, b"x" * CLUSTER)
        monkeypatch.setattr(os, "fdatasync", slow_sync)
        disk.flush()
        assert bits(top) == "1.."
        disk.flush()
        assert bits(top) == "1.1"
    assert judge(trace.calls, top, {1: "top.raw"}) == 2


@pytest.mark.parametrize("name", ["top.raw", "top.add-cow"])
def test_changes_are_refused_after_a_failed_flush(tmp_path: Path, trace: Trace, name: str) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with addcow_mp.open(top, writable=True) as disk:
        disk.write(0, b"x")
        fails(trace, disk.flush, name)
        done = len(trace.calls)
        trace.failing.clear()
        for change in (disk.flush, lambda: disk.write(0, b"y"), lambda: disk.write_zeroes(0, 1)):
            with pytest.raises(AddcowError, match="an earlier flush failed"):
                change()
        assert disk.read(CLUSTER, 1) == b"X"
    assert len(trace.calls) == done


def test_flatten_publishes_nothing_without_its_data(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    unchanged = kept(top, tmp_path / "base.img")
    fails(trace, lambda: addcow_mp.flatten(top, jobs=0), "top.raw")
    assert unchanged()


def test_flatten_does_not_set_the_flag_without_its_bits(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    fails(trace, lambda: addcow_mp.flatten(top, jobs=0), "top.add-cow")
    assert read_header(top).compatible == 0
    assert trace.story() == SET[:3]


def test_flatten_with_discard_keeps_the_overlay(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    fails(trace, lambda: addcow_mp.flatten(top, discard=True, jobs=0), "top.raw")
    assert guest_picture(top) == "AXC"


def test_commit_clears_nothing_without_its_data(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    unchanged = kept(top, tmp_path / "top.raw")
    fails(trace, lambda: addcow_mp.commit(top, jobs=0), "base.img")
    assert unchanged()


def test_commit_frees_nothing_without_its_bits(tmp_path: Path, trace: Trace) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    unchanged = kept(tmp_path / "top.raw")
    fails(trace, lambda: addcow_mp.commit(top, jobs=0), "top.add-cow")
    assert unchanged()
    assert guest_picture(top) == "AXC"


@pytest.mark.parametrize("keep", [False, True])
def test_commit_into_an_add_cow_backing_publishes_nothing_without_its_data(
    tmp_path: Path, trace: Trace, keep: bool
) -> None:
    top = middle(tmp_path, "ABC", "Y--", "-X-")
    unchanged = kept(top, tmp_path / "top.raw", tmp_path / "mid.add-cow", tmp_path / "base.img")
    fails(trace, lambda: addcow_mp.commit(top, keep=keep, jobs=0), "mid.raw")
    assert unchanged()


def test_commit_clears_nothing_without_the_bits_of_the_backing(
    tmp_path: Path, trace: Trace
) -> None:
    top = middle(tmp_path, "ABC", "Y--", "-X-")
    unchanged = kept(top, tmp_path / "top.raw", tmp_path / "base.img")
    fails(trace, lambda: addcow_mp.commit(top, jobs=0), "mid.add-cow")
    assert unchanged()


def test_commit_keeps_the_flag_without_the_bits_that_replace_it(
    tmp_path: Path, trace: Trace
) -> None:
    draw_raw(tmp_path / "base.img", "ABC")
    top = tmp_path / "top.add-cow"
    draw(top, "xYz", compatible=ALL_ALLOCATED)
    unchanged = kept(tmp_path / "base.img", tmp_path / "top.raw")
    fails(trace, lambda: addcow_mp.commit(top, jobs=0), "top.add-cow")
    assert unchanged()
    assert read_header(top).compatible == ALL_ALLOCATED


@pytest.mark.parametrize("name", ["new.raw", "/"])
def test_convert_leaves_no_file_that_is_not_durable(
    tmp_path: Path, trace: Trace, name: str
) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    before = snapshot(tmp_path)
    trace.to_be(name)
    with pytest.raises(SyncError):
        addcow_mp.convert(top, tmp_path / "new.raw", jobs=0)
    assert len(trace.failed) == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["top.raw", "top.add-cow", "/"])
def test_create_leaves_nothing_that_is_not_durable(tmp_path: Path, trace: Trace, name: str) -> None:
    draw_raw(tmp_path / "base.img", "ABC")
    before = snapshot(tmp_path)
    trace.to_be(name)
    with pytest.raises(SyncError):
        addcow_mp.create(
            tmp_path / "top.add-cow", backing=tmp_path / "base.img", backing_format="raw"
        )
    assert len(trace.failed) == 1
    assert snapshot(tmp_path) == before


def test_failed_create_restores_the_length_of_an_existing_image(
    tmp_path: Path, trace: Trace
) -> None:
    draw_raw(tmp_path / "top.raw", "AB")
    before = snapshot(tmp_path)
    work = lambda: addcow_mp.create(tmp_path / "top.add-cow", size=3 * CLUSTER)  # noqa: E731
    fails(trace, work, "top.add-cow")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("picture", ["AB-", "---"])
def test_same_command_finishes_after_a_failed_sync(
    tmp_path: Path, trace: Trace, picture: str
) -> None:
    top = pair(tmp_path, picture, "-X-")
    wanted = guest_picture(top)
    for job in (addcow_mp.flatten, addcow_mp.commit):
        trace.failed.clear()
        fails(trace, lambda job=job: job(top, jobs=0), "top.add-cow")  # type: ignore[misc]
        trace.failing.clear()
        assert guest_picture(top) == wanted
        job(top, jobs=0)
        assert guest_picture(top) == wanted
    assert look(tmp_path / "base.img") == wanted


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("commit", "base.img"),
        ("commit", "top.add-cow"),
        ("flatten", "top.raw"),
        ("flatten", "top.add-cow"),
        ("io", "top.raw"),
        ("io", "top.add-cow"),
    ],
)
def test_failed_sync_is_reported_in_one_line(
    tmp_path: Path, trace: Trace, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    trace.to_be(name)
    options = ["-c", "write 0 512"] if command == "io" else ["--jobs", "0"]
    assert run([command, *options, str(top)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"addcow: {tmp_path / name}: cannot make its data durable: ")
    assert trace.failed == [name]


# ---- seen from outside ----

CALLS = "pwrite64,fdatasync,fsync,fallocate,ftruncate,copy_file_range,ioctl"
_BEGUN = re.compile(r"(\d+) +(\w+)\(\d+<([^>]*)>(.*)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
_WORDS = {"fdatasync": "sync", "fsync": "sync", "fallocate": "free", "ftruncate": "length"}


def parse(lines: list[str]) -> Iterator[Call]:
    """The calls that strace wrote down, each where it ended, syncs where they began."""
    begun: dict[str, Call] = {}
    for line in lines:
        if match := _BEGUN.match(line):
            process, system_call, path, rest = match.groups()
            name = os.path.basename(path)
            word = _WORDS.get(system_call, "bits" if name.endswith(".add-cow") else "data")
            call = Call(word, name)
            if word == "sync" or "<unfinished" not in rest:
                yield call
            else:
                begun[process] = call
        elif (match := _RESUMED.match(line)) and (call_ended := begun.pop(match[1], None)):
            yield call_ended


def strace_works() -> bool:
    """Whether there is a strace, and it may look at processes."""
    if shutil.which("strace") is None or os.environ.get("CI") == "true":
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], check=False).returncode == 0


def strace(here: Path, *arguments: str) -> list[str]:
    """The story of a command with all its processes."""
    if not strace_works():
        pytest.skip("strace is not installed, or not to be counted on")
    options = ["-f", "-y", "-s", "0", "-o", "trace.txt", "-e", f"trace={CALLS}"]
    tool("strace", *options, sys.executable, "-m", "addcow_mp", *arguments, cwd=here)
    ours = ("base.img", "top.raw", "top.add-cow")
    lines = (here / "trace.txt").read_text().splitlines()
    calls = [call for call in parse(lines) if call.file in ours]
    assert calls, lines
    return Trace(calls).story()


def test_strace_of_a_commit_with_workers_shows_the_order(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEFGH" * 8, "-X-Y----" * 8)
    story = strace(tmp_path, "commit", "--jobs", "2", "top.add-cow")
    assert story[:5] == ["data base.img", "sync base.img", *CLEARED]
    assert set(story[5:]) <= {"sync top.raw"}


def test_strace_of_a_flatten_with_workers_shows_the_order(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEFGH" * 8, "-X-Y----" * 8)
    story = strace(tmp_path, "flatten", "--jobs", "2", "top.add-cow")
    assert story == [*SET, "bits top.add-cow", "sync top.add-cow"]
