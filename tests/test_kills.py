"""Tests of killed and stopped processes at chosen moments of a job with two workers.

A fault rule stops a process at an event. The test kills it or its parent, continues the others,
and reads the files with the oracle: the guest's view is unchanged, no process outlives its
parent, no lock is free while a worker could write, and the same command finishes the job.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from addcow_mp.device.mapped_source import WINDOW
from support.command import addcow, draw, draw_raw, refused, tool
from support.fault_rules import rule, rules_for, stopping_both
from support.guests import opened_for_writing
from support.processes import Ended, running
from support.wide import IMAGE_DATA, ODD, TASK_CLUSTERS, WIDE_CLUSTER, Wide, view

pytestmark = pytest.mark.sample(1)

JOBS = ("--jobs", "2")
EACH = pytest.mark.parametrize("job", ["commit", "flatten"])


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def stopping(event: str, **more: int | str) -> str:
    """Return a rule that stops one process, once."""
    return rule(event, "stop", once="on", **more)


# ---- kill -9 ----

WORKING = [("reads", 9), ("writes", 0), ("writes", 25)]
PUBLISHING = [
    ("commit", "data_sync"),
    ("commit", "publish"),
    ("commit", "bitmap_update"),
    ("commit", "bitmap_sync"),
    ("commit", "punch"),
    ("flatten", "data_sync"),
    ("flatten", "bitmap_update"),
    ("flatten", "bitmap_sync"),
    ("flatten", "header_write"),
]


@EACH
@pytest.mark.parametrize(("what", "after"), WORKING)
def test_job_continues_after_its_parent_was_killed(
    here: Path, job: str, what: str, after: int
) -> None:
    wide = Wide.lay(here, job)
    event = wide.reads if what == "reads" else wide.writes
    rules = rules_for(here, stopping(event, after=after))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        assert worker in command.workers()
        command.signal(signal.SIGKILL)
        assert command.end().status == -signal.SIGKILL
        wide.holds()
        command.signal(signal.SIGCONT, worker)
        command.all_gone()
        assert command.stderr == ""
    wide.holds()
    assert wide.published().isdisjoint(wide.selected), "published without reason"
    wide.again()


@pytest.mark.long
@pytest.mark.parametrize(("job", "event"), PUBLISHING)
def test_job_continues_after_its_parent_was_killed_while_publishing(
    here: Path, job: str, event: str
) -> None:
    wide = Wide.lay(here, job)
    # Where the image has data only the publisher frees anything.
    place = {"cluster": wide.moved(0)[1]} if event == "punch" else {}
    rules = rules_for(here, stopping(event, **place))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        assert command.stopped() == [command.pid]
        wide.holds()
        command.signal(signal.SIGKILL)
        command.all_gone()
        assert command.stderr == ""
    wide.holds()
    wide.again()


@EACH
@pytest.mark.parametrize(("what", "after"), [("reads", 0), ("writes", 20)])
def test_job_survives_a_killed_worker(here: Path, job: str, what: str, after: int) -> None:
    wide = Wide.lay(here, job)
    event = wide.reads if what == "reads" else wide.writes
    rules = rules_for(here, stopping(event, after=after))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        command.signal(signal.SIGKILL, worker)
        ended = command.end()
        command.all_gone()
    assert (ended.status, ended.stderr) == (0, "")
    wide.is_done()


@pytest.mark.long
@EACH
def test_job_survives_two_killed_workers(here: Path, job: str) -> None:
    wide = Wide.lay(here, job)
    rules = rules_for(here, *stopping_both(wide.writes, 5))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        command.signal(signal.SIGKILL, *command.stopped(2))
        ended = command.end()
        command.all_gone()
    assert (ended.status, ended.stderr) == (0, "")
    wide.is_done()


@EACH
def test_cluster_that_kills_every_worker_is_named(here: Path, job: str) -> None:
    wide = Wide.lay(here, job)
    place = wide.moved(1)[6]
    rules = rules_for(here, rule(wide.writes, "kill", cluster=place))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        ended = command.end()
        command.all_gone()
    assert ended.status == 1
    first, last = TASK_CLUSTERS, 2 * TASK_CLUSTERS - 1
    assert ended.stderr == (
        f"addcow: top.add-cow: clusters {first} to {last}: "
        "a worker process ended with signal SIGKILL at this place\n"
    )
    wide.holds()
    done = wide.published()
    assert wide.selected & set(range(TASK_CLUSTERS)) <= done, "the rest is not published"
    assert place not in done
    wide.again()


# ---- locks and orphans ----


@pytest.mark.long
@EACH
def test_locks_are_held_while_an_orphaned_worker_could_write(here: Path, job: str) -> None:
    tool("qemu-io", "--version", cwd=here)
    wide = Wide.lay(here, job)
    rules = rules_for(here, stopping(wide.writes, after=3))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        command.signal(signal.SIGKILL)
        command.end()
        command.until(lambda: command.workers() == [worker], "the other worker to end")
        for path in (wide.top, here / "top.raw", wide.target):
            said = opened_for_writing(path)
            assert re.search('Failed to get "[a-z ]+" lock', said), said
        assert "top.add-cow: in use: " in refused(job, "top.add-cow", cwd=here)
        command.signal(signal.SIGCONT, worker)
        command.all_gone()
    for name in ("top.add-cow", "top.raw", "base.img"):
        assert opened_for_writing(here / name) == ""
    wide.again()


@EACH
def test_orphaned_worker_ends_silently(here: Path, job: str) -> None:
    """It cannot report its result to a parent, and prints nothing."""
    draw_raw(here / "base.img", "ABCD")
    draw(here / "top.add-cow", "--X-" if job == "flatten" else "-XY-")
    event, place = ("image_write", 3) if job == "flatten" else ("backing_write", 2)
    rules = rules_for(here, stopping(event, cluster=place))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        command.signal(signal.SIGKILL)
        command.end()
        command.signal(signal.SIGCONT, worker)
        command.all_gone()
        assert command.stderr == ""


# ---- files that shrink ----


@EACH
def test_shrinking_source_is_named(here: Path, job: str) -> None:
    wide = Wide.lay(here, job)
    place = wide.moved(2)[4]
    rules = rules_for(here, stopping(wide.reads, cluster=place))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        worker = command.stopped()
        os.truncate(wide.source, place * WIDE_CLUSTER)
        command.signal(signal.SIGCONT, *worker)
        ended = command.end()
        command.all_gone()
    names_place(ended, task=2, file=wide.source.name)
    assert ended.stderr.endswith(": the file ends early; was it cut short meanwhile?\n")
    # The guest's view has lost what was cut off, and nothing else.
    assert wide.selected & set(range(2 * TASK_CLUSTERS)) <= wide.published()
    assert place not in wide.published()


@EACH
@pytest.mark.parametrize("left", [0, 100])
def test_source_that_shrinks_under_its_mapping_is_named(here: Path, job: str, left: int) -> None:
    """The window is mapped for the cluster before; the rest of its last page shows zeros."""
    wide = Wide.lay(here, job)
    before, place = wide.moved(2)[4:6]
    assert place * WIDE_CLUSTER // WINDOW == before * WIDE_CLUSTER // WINDOW
    rules = rules_for(here, stopping(wide.reads, cluster=place))
    with running(job, *JOBS, "--copy", "map", "top.add-cow", cwd=here, rules=rules) as command:
        worker = command.stopped()
        os.truncate(wide.source, place * WIDE_CLUSTER + left)
        command.signal(signal.SIGCONT, *worker)
        ended = command.end()
        command.all_gone()
    names_place(ended, task=2, file=wide.source.name)
    assert ended.stderr.endswith(": the file ends early; was it cut short meanwhile?\n")
    assert before in wide.published()
    assert place not in wide.published()


@pytest.mark.long
@EACH
def test_shrunk_source_is_an_error_and_not_a_hole(here: Path, job: str) -> None:
    """What was cut off looks like a hole; made into zeros and published, it is lost silently."""
    wide = Wide.lay(here, job)
    at, place = wide.moved(2)[4:6]
    rules = rules_for(here, stopping(wide.reads, cluster=at))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        worker = command.stopped()
        os.truncate(wide.source, place * WIDE_CLUSTER)
        command.signal(signal.SIGCONT, *worker)
        ended = command.end()
        command.all_gone()
    assert ended.status == 1, ended
    assert len(ended.stderr.splitlines()) == 1, ended
    assert wide.source.name in ended.stderr
    assert place not in wide.published()


@EACH
@pytest.mark.parametrize("jobs", ["0", "2"])
def test_bad_sector_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, job: str, jobs: str
) -> None:
    wide = Wide.lay(here, job)
    place = wide.moved(1)[4]
    bad = rules_for(here, rule(wide.reads, cluster=place))
    monkeypatch.setenv("ADDCOW_FAULTS", str(bad.path))
    result = addcow(job, "--jobs", jobs, "top.add-cow", cwd=here)
    names_place(Ended(result.status, result.stdout, result.stderr), 1, wide.source.name)
    assert result.stderr.endswith(": Input/output error\n")
    wide.holds()
    assert wide.selected & set(range(TASK_CLUSTERS)) <= wide.published()
    monkeypatch.delenv("ADDCOW_FAULTS")
    wide.again()


def names_place(ended: Ended, task: int, file: str) -> None:
    """Assert one line that names the overlay, the clusters of the task, and the file."""
    first, last = task * TASK_CLUSTERS, (task + 1) * TASK_CLUSTERS - 1
    assert ended.status == 1, ended
    assert len(ended.stderr.splitlines()) == 1, ended
    assert ended.stderr.startswith(f"addcow: top.add-cow: clusters {first} to {last}: ")
    assert f"{file}: cannot read" in ended.stderr


@pytest.mark.long
@EACH
def test_shrinking_bitmap_stops_the_job_without_harm(here: Path, job: str) -> None:
    """Missing bits read as 0. A job that believed them would free or overwrite allocated data.

    They are gone, and with them the guest's view; what they were for still has to be somewhere.
    """
    wide = Wide.lay(here, job)
    local = range(IMAGE_DATA if job == "commit" else ODD, wide.clusters, 16)
    before = view(here / "top.raw", here / "top.raw")
    rules = rules_for(here, stopping(wide.writes, after=4))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        os.truncate(wide.top, WIDE_CLUSTER)
        command.signal(signal.SIGCONT, worker)
        ended = command.end()
        command.all_gone()
    after = view(here / "top.raw", here / "top.raw")
    moved = view(here / "base.img", here / "base.img")  # in a commit, part of it may be there
    lost = [n for n in local if before[n] not in (after.get(n), moved.get(n))]
    assert lost == []
    assert ended.status == 1, ended
    assert len(ended.stderr.splitlines()) == 1, ended
    assert ended.stderr.startswith("addcow: top.add-cow: ")


# ---- signals ----


@EACH
def test_stopped_job_keeps_finished_clusters(here: Path, job: str, asking: signal.Signals) -> None:
    wide = Wide.lay(here, job, tasks=5)
    rules = rules_for(here, *stopping_both(wide.writes, 5))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        workers = command.stopped(2)
        command.signal(asking)
        command.signal(signal.SIGCONT, *workers)
        ended = command.end()
        command.all_gone()
    assert ended.status == 128 + asking
    assert ended.stderr == (
        "addcow: top.add-cow: stopped; finished work is kept, "
        "the same command continues from there\n"
    )
    wide.holds()
    # Of the two tasks that each worker was given it did what it had begun, or less; not the fifth.
    begun = wide.selected & set(range(4 * TASK_CLUSTERS))
    assert wide.published() & wide.selected
    assert wide.published() & wide.selected <= begun
    wide.again()


@pytest.mark.long
def test_signal_to_the_whole_group_stops_a_job(here: Path) -> None:
    """Ctrl-C reaches workers too, which leave it to their parent."""
    wide = Wide.lay(here, "commit", tasks=5)
    rules = rules_for(here, *stopping_both(wide.writes, 5))
    with running("commit", *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        workers = command.stopped(2)
        os.killpg(command.pid, signal.SIGINT)
        command.signal(signal.SIGCONT, *workers)
        ended = command.end()
        command.all_gone()
    assert ended.status == 130
    assert len(ended.stderr.splitlines()) == 1, ended
    wide.holds()
    wide.again()


@pytest.mark.long
def test_signal_to_the_group_while_workers_start_stops_a_job(here: Path) -> None:
    wide = Wide.lay(here, "commit", tasks=5)
    rules = rules_for(here, rule("bitmap_load", "stop"))
    with running("commit", *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        while not command.workers() or command.pid in command.stopped():
            command.signal(signal.SIGCONT)
        workers = command.stopped(2)
        os.killpg(command.pid, signal.SIGINT)
        command.signal(signal.SIGCONT, *workers)
        ended = command.end()
        command.all_gone()
    assert ended.status == 130, ended
    assert len(ended.stderr.splitlines()) == 1, ended
    wide.holds()
    wide.again()


def test_second_signal_ends_a_job_at_once(here: Path) -> None:
    wide = Wide.lay(here, "commit", tasks=5)
    rules = rules_for(here, stopping(wide.writes))
    with running("commit", *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        command.signal(signal.SIGTERM)
        command.until(lambda: command.has_met(signal.SIGTERM), "the signal to be met")
        command.signal(signal.SIGTERM)
        assert command.end().status == -signal.SIGTERM
        command.signal(signal.SIGCONT, worker)
        command.all_gone()
    wide.holds()
    wide.again()


@pytest.mark.long
def test_stopped_convert_leaves_no_file(here: Path, asking: signal.Signals) -> None:
    wide = Wide.lay(here, "flatten", tasks=5)
    rules = rules_for(here, *stopping_both("target_write", 5))
    words = ("convert", *JOBS, "-O", "raw", "top.add-cow", "new.raw")
    with running(*words, cwd=here, rules=rules) as command:
        workers = command.stopped(2)
        command.signal(asking)
        command.signal(signal.SIGCONT, *workers)
        ended = command.end()
        command.all_gone()
    assert ended.status == 128 + asking
    assert ended.stderr == (
        "addcow: new.raw: stopped; the unfinished file was removed, run the command again\n"
    )
    assert not (here / "new.raw").exists()
    wide.holds()


@pytest.mark.long
@EACH
def test_sigusr1_prints_progress(here: Path, job: str) -> None:
    wide = Wide.lay(here, job)
    rules = rules_for(here, stopping(wide.writes, after=2))
    with running(job, *JOBS, "top.add-cow", cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        assert command.stderr == ""
        for count in (1, 2):
            command.signal(signal.SIGUSR1)
            command.until(lambda n=count: command.stderr.count("\n") == n, "a line")  # type: ignore[misc]
        command.signal(signal.SIGCONT, worker)
        ended = command.end()
    assert ended.status == 0
    for line in ended.stderr.splitlines():
        assert re.fullmatch(r"    \(\d+\.\d\d/100%\) \S+ [KM]?i?B of 180 MiB", line), line
    wide.is_done()
