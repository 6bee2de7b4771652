"""Tests of what a job keeps when it ends within a task, and of the order in which it publishes.

A task has 64 MiB, which takes a minute at a low rate. Finished clusters of a task are published
while it runs: a stop repeats a moment of work, a kill at most five seconds.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import addcow_mp
from addcow_mp.engine import checkpoints, transfer
from support.call_trace import Trace, broken, judge
from support.command import CLUSTER, PATIENCE, KiB, MiB, local_clusters, overlay_bytes, succeed
from support.fault_rules import Rules, rule
from support.manifests import view_of
from support.processes import running

pytestmark = pytest.mark.sample(1)

SIZE = 40 * MiB
RATE = 4 * MiB


def lay(here: Path, job: str) -> Path:
    """An overlay that has one task of ``job``: everything is to be moved."""
    content = random.Random(7).randbytes(SIZE)
    (here / "base.img").write_bytes(content if job == "flatten" else bytes(SIZE))
    with (here / "top.raw").open("wb") as image:
        image.truncate(SIZE)
        image.write(content if job == "commit" else b"")
    local = range(SIZE // CLUSTER) if job == "commit" else ()
    top = here / "top.add-cow"
    top.write_bytes(overlay_bytes(image="top.raw", size=SIZE, backing="base.img", local=local))
    return top


def kept(top: Path, job: str) -> int:
    """Bytes of clusters that the next run need not move."""
    local = len(local_clusters(top))
    return CLUSTER * (local if job == "flatten" else SIZE // CLUSTER - local)


@contextmanager
def under_way(here: Path, share: int, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that has said that it has moved so many tenths."""
    words = (sys.executable, "-m", "addcow_mp", *words, "-p", "-r", str(RATE), "top.add-cow")
    process = subprocess.Popen(
        words, cwd=here, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if re.search(rf"\({share}\d\.", line):
                break
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
        process.stderr.close()


def finishes(top: Path, job: str, view: bytes) -> None:
    """The guest sees what it saw, and the same command does the rest."""
    assert view_of(top) == view
    succeed(job, top.name, cwd=top.parent)
    assert view_of(top) == view
    file = top.parent / ("base.img" if job == "commit" else "top.raw")
    assert file.read_bytes() == view


@pytest.mark.parametrize("job", ["commit", "flatten"])
@pytest.mark.parametrize("jobs", [(), ("--jobs", "0"), ("--jobs", "2")], ids=" ".join)
def test_stop_within_a_task_keeps_finished_clusters(
    tmp_path: Path, job: str, jobs: tuple[str, ...]
) -> None:
    top = lay(tmp_path, job)
    view = view_of(top)
    with under_way(tmp_path, 3, job, *jobs) as process:
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert time.monotonic() - begun < 5
    # All but what was moved last, which is half a second's.
    assert kept(top, job) >= 3 * SIZE // 10 - 1 * MiB
    finishes(top, job, view)


@pytest.mark.parametrize("job", ["commit", "flatten"])
@pytest.mark.parametrize("jobs", ["0", "1"])
def test_kill_within_a_task_costs_at_most_five_seconds(tmp_path: Path, job: str, jobs: str) -> None:
    top = lay(tmp_path, job)
    view = view_of(top)
    with under_way(tmp_path, 7, job, "--jobs", jobs) as process:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
    assert kept(top, job) >= 7 * SIZE // 10 - 5 * RATE
    finishes(top, job, view)


@pytest.mark.long
def test_stopped_farm_keeps_finished_clusters_of_an_image(tmp_path: Path) -> None:
    top = lay(tmp_path, "flatten")
    view = view_of(top)
    words = ("farm", "flatten", "--time-limit", "4s", "-r", str(RATE), ".")
    done = subprocess.run(
        [sys.executable, "-m", "addcow_mp", *words], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 75
    # Whatever starting took of the four seconds, some of them were work.
    assert kept(top, "flatten") >= 1 * MiB
    finishes(top, "flatten", view)


@pytest.mark.long
@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_clusters_that_a_dead_worker_finished_are_not_moved_again(tmp_path: Path, job: str) -> None:
    """What it has done may be published, and freed, before another one takes its place."""
    here = tmp_path / "here"
    here.mkdir()
    top = lay(here, job)
    view = view_of(top)
    event = "image_read" if job == "commit" else "backing_read"
    rules = Rules.write(tmp_path / "rules", rule(event, "kill", once="on", after=20))
    with running(job, "--jobs", "1", "--output", "json", top.name, cwd=here, rules=rules) as run:
        ended = run.end()
    assert ended.status == 0, ended
    assert rules.struck
    assert f'"bytes-moved": {SIZE},' in ended.stdout
    finishes(top, job, view)


# ---- the order within a task ----


class SlowDisk:
    """A disk on which writes take a while, and a sync of ``file`` longer than two of them."""

    def __init__(self, trace: Trace, file: str) -> None:
        self._trace, self._file = trace, file
        self._fdatasync, self._pwrite = os.fdatasync, os.pwrite
        self.waited = 0

    def writes(self) -> int:
        return sum(call.word == "data" and call.file == self._file for call in self._trace.calls)

    def is_met(self, fd: int) -> bool:
        return os.readlink(f"/proc/self/fd/{fd}").endswith(self._file)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self.is_met(fd):
            time.sleep(0.003)
        return self._pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        before = self.writes()
        self._fdatasync(fd)
        if self.is_met(fd):
            patience = time.monotonic() + 1
            while self.writes() < before + 3 and time.monotonic() < patience:
                time.sleep(0.001)
            self.waited += self.writes() >= before + 3


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_clusters_finished_during_a_sync_are_not_published_by_it(
    tmp_path: Path,
    trace: Trace,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    short: bool,
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 8 * CLUSTER)
    monkeypatch.setattr(transfer, "STEP", CLUSTER)
    clusters = 128
    broken_up = range(0, clusters, 2) if short else range(clusters // 2)
    data = [n in broken_up for n in range(clusters)]
    if job == "commit":
        local, base = list(broken_up), b"b" * (clusters * CLUSTER)
    else:
        local, base = [n for n in range(clusters) if not data[n]], b"b" * (clusters * CLUSTER)
    (tmp_path / "base.img").write_bytes(base)
    with (tmp_path / "top.raw").open("wb") as image:
        image.truncate(clusters * CLUSTER)
        for number in local:
            os.pwrite(image.fileno(), b"t" * CLUSTER, number * CLUSTER)
    top = tmp_path / "top.add-cow"
    size = clusters * CLUSTER
    top.write_bytes(overlay_bytes(image="top.raw", size=size, backing="base.img", local=local))
    view = view_of(top)
    target = "base.img" if job == "commit" else "top.raw"
    slow = SlowDisk(trace, target)
    monkeypatch.setattr(os, "fdatasync", slow.fdatasync)
    monkeypatch.setattr(os, "pwrite", slow.pwrite)
    getattr(addcow_mp, job)(top, jobs=0)
    assert slow.waited, "no sync was long enough to show anything"
    value = 0 if job == "commit" else 1
    assert judge(trace.calls, top, {value: target}) == len(broken_up)
    assert view_of(top) == view


def test_checkpoint_within_a_task_publishes_only_finished_clusters(
    tmp_path: Path,
    trace: Trace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several checkpoints in one task, in clusters of a backing that are larger than the pieces."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(transfer, "STEP", 4 * KiB)
    size = 8 * MiB
    (tmp_path / "base.img").write_bytes(b"b" * size)
    (tmp_path / "mid.raw").write_bytes(b"m" * size)
    mid = tmp_path / "mid.add-cow"
    mid.write_bytes(
        overlay_bytes(image="mid.raw", size=size, backing="base.img", cluster=2 * MiB, local=[1])
    )
    (tmp_path / "top.raw").write_bytes(b"t" * size)
    local = [*range(3, 700), *range(1000, 1030)]
    top = tmp_path / "top.add-cow"
    top.write_bytes(
        overlay_bytes(
            image="top.raw",
            size=size,
            backing="mid.add-cow",
            backing_format="add-cow",
            cluster=4 * KiB,
            local=local,
        )
    )
    view = view_of(top)
    addcow_mp.commit(top, jobs=0)
    assert trace.story().count("bits top.add-cow") > 1
    assert judge(trace.calls, top, {0: "mid.raw"}) == len(local)
    assert judge(trace.calls, mid, {1: "mid.raw"}) == 2
    assert view_of(top) == view
    assert view_of(mid) == view


@pytest.mark.long
def test_holes_longer_than_a_task_need_no_marks(tmp_path: Path) -> None:
    """A disk of 4 TiB with data at both ends is flattened in no time and in little memory."""
    size = 4 << 40
    with (tmp_path / "base.img").open("wb") as base:
        base.truncate(size)
        for at in (0, size // 2, size - CLUSTER):
            os.pwrite(base.fileno(), b"b" * CLUSTER, at)
    succeed("create", "-b", "base.img", "-F", "raw", "top.add-cow", cwd=tmp_path)
    report = succeed("flatten", "--output", "json", "top.add-cow", cwd=tmp_path).json
    assert report["bytes-moved"] == 3 * CLUSTER
    assert report["clusters-moved"] == 3
    assert report["clusters-zeroed"] == size // CLUSTER - 3
    assert report["bytes-zeroed"] == size - 3 * CLUSTER
    with (tmp_path / "top.raw").open("rb") as image:
        assert os.pread(image.fileno(), CLUSTER, size // 2) == b"b" * CLUSTER


# ---- space of what an earlier run has cleared ----


@pytest.mark.long
def test_commit_frees_clusters_that_an_interrupted_commit_cleared(
    tmp_path: Path,
) -> None:
    top = lay(tmp_path, "commit")
    content = (tmp_path / "top.raw").read_bytes()
    (tmp_path / "base.img").write_bytes(content)
    # All bits but one are clear, and nothing is freed.
    top.write_bytes(overlay_bytes(image="top.raw", size=SIZE, backing="base.img", local=[5]))
    succeed("commit", "top.add-cow", cwd=tmp_path)
    assert (tmp_path / "top.raw").stat().st_blocks == 0
    assert view_of(top) == content


@pytest.mark.long
def test_commit_of_nothing_frees_garbage_in_the_image(tmp_path: Path) -> None:
    top = lay(tmp_path, "commit")
    base = (tmp_path / "base.img").read_bytes()
    top.write_bytes(overlay_bytes(image="top.raw", size=SIZE, backing="base.img"))
    succeed("commit", "top.add-cow", cwd=tmp_path)
    assert (tmp_path / "top.raw").stat().st_blocks == 0
    assert view_of(top) == base


def test_space_check_counts_space_that_is_freed_late(tmp_path: Path) -> None:
    """Four tasks of 20 pieces each: none of their space is back before the last one begins."""
    size = 256 * MiB
    (tmp_path / "base.img").touch()
    os.truncate(tmp_path / "base.img", size)
    broken(tmp_path / "top.raw", size, 0)
    content = overlay_bytes(
        image="top.raw", size=size, backing="base.img", local=range(size // CLUSTER)
    )
    (tmp_path / "top.add-cow").write_bytes(content)
    told = succeed("farm", "plan", "commit", "--output", "json", ".", cwd=tmp_path).json
    (image,) = told["images"]
    assert image["space-freed"] == image["space-kept"] == 4 * 20 * 4 * KiB
    assert image["space-needed"] == image["space-kept"]
