"""Tests of disks that are too small, and of disks that fill up.

A job that cannot fit is refused with both figures before any change. The tests compute the
figures themselves, on a small tmpfs and ext4. When a disk fills up during a job, published work
stays, and the same command finishes once there is space.
"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from addcow_mp.engine.space import peak
from support.command import (
    CLUSTER,
    KiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest,
    guest_picture,
    local_clusters,
    look,
    overlay_bytes,
    refused,
    snapshot,
    stored_bytes,
    succeed,
)
from support.fault_rules import Rules, rule
from support.file_systems import fill, free, mounted
from support.warm import Warm
from support.wide import TASK_CLUSTERS, Wide

pytestmark = pytest.mark.sample(1)

BOTH = pytest.mark.parametrize("jobs", ["0", "2"])
DATA = 40 * "A"
HOLES = 40 * "-"


# ---- small disks ----


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """The same as a tmpfs, whose space can be used to the last page."""
    yield from mounted("tmpfs", tmp_path)


def states(here: Path) -> tuple[dict[str, str], dict[str, int], int]:
    """Return all that a refusal must leave alone: bytes, times, free space."""
    times = {path.name: path.stat().st_mtime_ns for path in here.iterdir() if path.is_file()}
    return snapshot(here), times, free(here)


def refused_for_space(here: Path, needed: int, *words: str) -> None:
    """Insist on a refusal that names both figures and has changed nothing."""
    before = states(here)
    assert needed > before[2], "it would fit"
    said = refused(*words, cwd=here)
    assert f"{needed} bytes of free space are needed and {before[2]} are free" in said
    assert states(here) == before


# ---- refused before the first byte ----


@BOTH
def test_flatten_that_cannot_fit_is_refused(disk: Path, jobs: str) -> None:
    draw_raw(disk / "base.img", DATA)
    draw(disk / "top.add-cow", HOLES[:-1] + "X")
    refused_for_space(disk, 39 * CLUSTER, "flatten", "--jobs", jobs, "top.add-cow")


@BOTH
def test_commit_that_cannot_fit_is_refused(disk: Path, jobs: str) -> None:
    draw_raw(disk / "base.img", "B" + HOLES[1:])
    draw(disk / "top.add-cow", DATA)
    refused_for_space(disk, 39 * CLUSTER, "commit", "--jobs", jobs, "top.add-cow")


@BOTH
def test_convert_that_cannot_fit_is_refused_and_leaves_no_file(disk: Path, jobs: str) -> None:
    draw_raw(disk / "base.img", DATA)
    draw(disk / "top.add-cow", HOLES[:-1] + "X")
    words = ("convert", "-O", "raw", "--jobs", jobs, "top.add-cow", "new.raw")
    refused_for_space(disk, 40 * CLUSTER, *words)


def test_space_check_counts_copied_up_data(disk: Path) -> None:
    """One small cluster makes a large one of the backing local: all of it is written."""
    draw_raw(disk / "base.img", 30 * "A")
    small, size = 4 * KiB, 30 * CLUSTER
    chain = (("mid", "base.img", "raw", CLUSTER), ("top", "mid.add-cow", "add-cow", small))
    for name, backing, kind, cluster in chain:
        (disk / f"{name}.add-cow").write_bytes(
            overlay_bytes(
                image=f"{name}.raw",
                size=size,
                backing=backing,
                backing_format=kind,
                cluster=cluster,
                local=range(0, size // small, 16) if name == "top" else [],
            )
        )
    with (disk / "mid.raw").open("wb") as mid, (disk / "top.raw").open("wb") as top:
        mid.truncate(size)
        for offset in range(0, size, CLUSTER):
            top.seek(offset)
            top.write(b"X" * small)
        top.truncate(size)
    fill(disk, leave=20 * CLUSTER)
    refused_for_space(disk, 30 * CLUSTER, "commit", "top.add-cow")


@pytest.mark.long
def test_full_disk_accepts_jobs_that_need_no_space(disk: Path) -> None:
    """The target has its blocks already: nothing is taken, nothing is refused."""
    draw_raw(disk / "base.img", "ABCD--")
    draw(disk / "top.add-cow", "ab--X-")
    draw(disk / "low.add-cow", "XY--0-", "low.img")
    draw_raw(disk / "low.img", "ABCDEF")
    draw_raw(disk / "top.raw", "abcdX-")
    fill(disk)
    succeed("commit", "low.add-cow", cwd=disk)
    assert look(disk / "low.img") == "XYCD0F"
    fill(disk)
    succeed("flatten", "top.add-cow", cwd=disk)
    assert look(disk / "top.raw") == "ABCDX0"


def test_space_check_counts_only_holes_of_the_target(disk: Path) -> None:
    """Only what goes into holes counts, not what the tasks weigh."""
    draw_raw(disk / "base.img", 20 * "B" + 10 * "-")
    draw(disk / "top.add-cow", 10 * "-" + 20 * "X")
    fill(disk, leave=15 * CLUSTER)  # ext4 keeps some blocks for itself that it calls free
    assert free(disk) < 20 * CLUSTER
    succeed("commit", "top.add-cow", cwd=disk)
    assert look(disk / "base.img") == 10 * "B" + 20 * "X"
    assert stored_bytes(disk / "top.raw") == 0


# ---- the peak of a job that gives back what it has taken ----


@pytest.mark.parametrize(
    ("steps", "lag", "needed"),
    [
        ([], 0, 0),
        ([(8, 8, 0), (8, 8, 0), (8, 8, 0)], 0, 24),
        ([(8, 8, 8), (8, 8, 8), (8, 8, 8)], 0, 8),
        ([(8, 8, 8), (8, 8, 8), (8, 8, 8)], 8, 16),
        ([(8, 8, 8), (8, 8, 8), (8, 8, 8)], 100, 24),
        ([(8, 0, 8), (8, 8, 8), (8, 8, 8)], 0, 0),
        ([(8, 8, 8), (8, 0, 8), (8, 0, 8)], 100, 8),
        ([(8, 2, 8), (8, 9, 0), (8, 1, 0)], 0, 4),
    ],
)
def test_peak_is_the_space_taken_before_space_is_freed(
    steps: list[tuple[int, int, int]], lag: int, needed: int
) -> None:
    assert peak(steps, lag) == needed


def test_peak_agrees_with_a_plain_computation() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 - shown when it fails
    chance = random.Random(seed)
    for _ in range(300):
        steps = [
            (chance.randrange(1, 9), chance.randrange(9), chance.randrange(9))
            for _ in range(chance.randrange(12))
        ]
        lag = chance.randrange(30)
        assert peak(steps, lag) == plain_peak(steps, lag), (steps, lag)


def plain_peak(steps: list[tuple[int, int, int]], lag: int) -> int:
    """Look, at every step, at all steps before it."""
    highest = 0
    for now in range(len(steps)):
        taken = sum(takes for _, takes, _ in steps[: now + 1])
        for old in range(now):
            since = sum(weight for weight, _, _ in steps[old + 1 : now])
            taken -= steps[old][2] if since >= lag else 0
        highest = max(highest, taken)
    return highest


# ---- full in mid-run ----


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "event"),
    [
        (("flatten", "--jobs", "0", "top.add-cow"), "image_write"),
        (("flatten", "--jobs", "0", "--copy", "map", "top.add-cow"), "image_write"),
        (("commit", "--jobs", "0", "top.add-cow"), "backing_write"),
        (("convert", "--jobs", "0", "-O", "raw", "top.add-cow", "new.raw"), "target_write"),
    ],
)
def test_disk_filled_by_another_program_ends_the_job_cleanly(
    warm: Warm, tmp_path: Path, disk: Path, words: tuple[str, ...], event: str
) -> None:
    draw_raw(disk / "base.img", "ABCDEF--")
    draw(disk / "top.add-cow", "------XY")
    rules = Rules.write(tmp_path / "rules", rule(event, "stop", once="on"))
    command = warm.start(*words, cwd=disk, rules=rules)
    assert command.wait() is None, "it did not stop"
    filler = fill(disk)
    os.kill(command.pid, signal.SIGCONT)
    ended = command.end()
    assert ended.status == 1, ended
    assert re.fullmatch(r"addcow: .*: No space left on device\n", ended.stderr)
    assert not (disk / "new.raw").exists()
    assert guest_picture(disk / "top.add-cow") == "ABCDEFXY"
    filler.unlink()
    succeed(*words, cwd=disk)
    assert guest_picture(disk / "top.add-cow") == "ABCDEFXY"


@BOTH
@pytest.mark.parametrize("job", ["flatten", "commit"])
def test_full_disk_keeps_finished_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, jobs: str
) -> None:
    (tmp_path / "here").mkdir()
    wide = Wide.lay(tmp_path / "here", job)
    earlier, *_, place = wide.moved(2)[:8]
    full = rule(wide.writes, errno=errno.ENOSPC, cluster=place)
    monkeypatch.setenv("ADDCOW_FAULTS", str(Rules.write(tmp_path / "rules", full).path))
    said = refused(job, "--jobs", jobs, "top.add-cow", cwd=wide.here)
    first, last = 2 * TASK_CLUSTERS, 3 * TASK_CLUSTERS - 1
    assert said.startswith(f"addcow: top.add-cow: clusters {first} to {last}: ")
    assert f"{wide.target.name}: " in said
    assert said.endswith(": No space left on device")
    wide.holds()
    done = wide.published()
    assert set(range(first)) <= done, "tasks that were finished are not published"
    assert earlier in done, "what the failed task had finished is not published"
    assert place not in done
    monkeypatch.delenv("ADDCOW_FAULTS")
    wide.again()


@pytest.fixture
def bare(memory: Path) -> Path:
    """A full tmpfs with room for the data of a chain, but none for its bitmap, all a hole."""
    draw_raw(memory / "base.img", "ABC")
    draw_raw(memory / "top.raw", "abc")
    cow = overlay_bytes(image="top.raw", size=3 * CLUSTER, backing="base.img")
    with (memory / "top.add-cow").open("wb") as file:
        file.write(cow[:CLUSTER])
        file.truncate(len(cow))
    fill(memory)
    return memory


@pytest.mark.long
def test_reading_a_bitmap_of_holes_takes_no_space(bare: Path) -> None:
    """A tmpfs gives pages to holes that are looked at through a mapping: SIGBUS when full."""
    before = states(bare)
    for words in (("info",), ("map",), ("check",), ("io", "-r", "-c", "read -P 0x42 64k 64k")):
        assert addcow(*words, "top.add-cow", cwd=bare).status in (0, 3), words  # 3: the garbage
    assert states(bare) == before


@pytest.mark.long
def test_flatten_without_space_for_bits_is_refused(bare: Path) -> None:
    before = states(bare)
    said = refused("flatten", "top.add-cow", cwd=bare)
    assert re.search(r"top\.add-cow: \d+ bytes of free space are needed and 0 are free", said)
    assert states(bare) == before
    (bare / "filler").unlink()
    succeed("flatten", "top.add-cow", cwd=bare)
    assert look(bare / "top.raw") == "ABC"
    assert bits(bare / "top.add-cow") == "111"


def test_write_without_space_for_its_bit_is_not_visible(bare: Path) -> None:
    ended = addcow("io", "-c", "write -P 0x58 64k 64k", "-c", "flush", "top.add-cow", cwd=bare)
    assert ended.status == 1
    assert ended.stderr == "addcow: top.add-cow: cannot write its bitmap: No space left on device\n"
    assert guest_picture(bare / "top.add-cow") == "ABC"
    assert bits(bare / "top.add-cow") == "..."


# ---- the device ----


def test_write_to_a_full_disk_fails_and_changes_nothing(memory: Path) -> None:
    draw_raw(memory / "base.img", "ABCDEF")
    draw(memory / "top.add-cow", "-X----")
    fill(memory)
    ended = addcow("io", "-c", "write -P 0x59 100k 200k", "top.add-cow", cwd=memory)
    assert (ended.status, ended.stdout) == (1, "write failed: No space left on device\n")
    # Cluster 1 was allocated, a raw disk under the guest: its part of the request may be there.
    top = memory / "top.add-cow"
    assert guest_picture(top)[0] + guest_picture(top)[2:] == "ACDEF"
    assert set(guest(top, CLUSTER, CLUSTER)) <= set(b"XY")
    assert local_clusters(top) == [1]


def test_writes_continue_where_there_is_space(memory: Path) -> None:
    draw_raw(memory / "base.img", "ABCDEF")
    draw(memory / "top.add-cow", "-X----")
    fill(memory)
    words = ("-c", "write -P 0x59 128k 64k", "-c", "write -P 0x5a 64k 64k", "-c", "flush")
    ended = addcow("io", *words, "top.add-cow", cwd=memory)
    assert ended.status == 1
    assert ended.lines[:2] == [
        "write failed: No space left on device",
        "wrote 65536/65536 bytes at offset 65536",
    ]
    assert guest_picture(memory / "top.add-cow") == "AZCDEF"
    assert bits(memory / "top.add-cow") == ".1...."


@pytest.mark.long
def test_reading_commands_need_no_space(memory: Path) -> None:
    draw_raw(memory / "base.img", "ABCDEF")
    draw(memory / "top.add-cow", "-X----")
    fill(memory)
    before = states(memory)
    for words in (("info",), ("map",), ("check",), ("io", "-r", "-c", "read -P 0x58 64k 64k")):
        succeed(*words, "top.add-cow", cwd=memory)
    assert states(memory) == before
