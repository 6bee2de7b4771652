"""Tests of the pool of workers with real processes, some of which die.

The work (support/pool_work.py) logs each try of a task. An alarm ends a test that hangs. After
each test no process is left.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import addcow_mp
from addcow_mp import AddcowError, FileError, SyncError, WorkerError
from addcow_mp.engine import checkpoints
from addcow_mp.engine.done_map import TOP, DoneMap, Totals
from addcow_mp.engine.fd_passing import Packed
from addcow_mp.engine.pool import AHEAD, TRIES, ParentRole, Pool, usable_cpus
from addcow_mp.engine.publisher import Publisher
from addcow_mp.engine.stop_flag import StopFlag
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.transfer_run import Processes, TransferRun, run_transfer
from addcow_mp.engine.worker import Done, Failed, Place, Work, WorkerContext, serve
from support.command import PATIENCE, local_clusters
from support.pool_work import Bad, DiesOnce, Marks, Plain, Waits, log_of, refuse, tasks_of, tries

pytestmark = pytest.mark.sample(1)

JOBS = [0, 1, 3]
PROCESSES = [1, 3]

Result = Done | Failed


# ---- works ----


def marked(board: DoneMap) -> list[int]:
    """The clusters that are marked on a board of 64."""
    return [at for first, stop in board.marks(TOP).runs(0, 64) for at in range(first, stop)]


# ---- watching ----


@pytest.fixture(autouse=True)
def _nothing_hangs_and_nobody_is_left() -> Iterator[None]:
    before = own_children()
    with alarm():
        yield
    assert own_children() - before == set()


class alarm:  # noqa: N801 - reads as a statement
    """Ends a block that takes far too long."""

    def __enter__(self) -> None:
        def ring(number: int, frame: FrameType | None) -> None:
            raise TimeoutError("the pool hangs")

        self._usual: Any = signal.signal(signal.SIGALRM, ring)
        signal.alarm(int(PATIENCE))

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self._usual)


def own_children() -> set[int]:
    """Children of this process, the unreaped too, but no helper of multiprocessing or the tests."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            command = status.with_name("cmdline").read_bytes()
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        helper = b"resource_tracker" in command or b"warm_server" in command
        if int(fields["PPid"]) == os.getpid() and not helper:
            found.add(int(fields["Pid"]))
    return found


def run(
    work: Work, jobs: int, tasks: list[Task], stopping: Callable[[], bool] = lambda: False
) -> dict[int, Result]:
    """Run the tasks and return the result of each, insisting that there is but one."""
    results: dict[int, Result] = {}
    with Pool(work, jobs) as pool:
        for result in pool.run(tasks, stopping):
            assert result.task.number not in results
            results[result.task.number] = result
    return results


def all_done(results: dict[int, Result], tasks: list[Task]) -> None:
    for task in tasks:
        assert results[task.number] == Done(task, Totals(task.weight, task.stop - task.first))


def failure(result: Result) -> AddcowError:
    assert isinstance(result, Failed)
    return result.error


# ---- everything goes well ----


@pytest.mark.parametrize("jobs", JOBS)
def test_every_task_is_done_once(tmp_path: Path, jobs: int) -> None:
    tasks = tasks_of(20)
    results = run(Plain(tmp_path), jobs, tasks)
    all_done(results, tasks)
    assert len(results) == 20
    done = tries(tmp_path)
    assert sorted(done) == list(range(20))
    assert all(len(processes) == 1 for processes in done.values())
    workers = {processes[0] for processes in done.values()}
    assert workers == {os.getpid()} if jobs == 0 else os.getpid() not in workers
    assert len(workers) <= max(1, jobs)


@pytest.mark.parametrize("jobs", JOBS)
def test_pool_without_tasks_ends_at_once(tmp_path: Path, jobs: int) -> None:
    assert run(Plain(tmp_path), jobs, []) == {}


@pytest.mark.parametrize("count", [1, 2])
def test_pool_with_more_processes_than_tasks(tmp_path: Path, count: int) -> None:
    tasks = tasks_of(count)
    all_done(run(Plain(tmp_path), 3, tasks), tasks)


def test_slow_task_does_not_delay_other_workers(tmp_path: Path) -> None:
    tasks = tasks_of(10)
    work = Waits(tmp_path, frozenset({0}))
    os.mkfifo(work.gate)
    done = []
    with Pool(work, 2) as pool:
        for result in pool.run(tasks):
            done.append(result.task.number)
            # What the slow worker was given ahead of time waits with it.
            if len(done) == 10 - AHEAD and work.gate.exists():
                work.gate.write_bytes(b"go")
                work.gate.unlink()
    assert sorted(done) == list(range(10))
    assert 0 in done[10 - AHEAD :]


# ---- this process takes part ----


@pytest.mark.parametrize("part", ParentRole)
@pytest.mark.parametrize("jobs", [0, 1, 2, 3])
def test_every_task_is_done_once_in_every_role_of_the_parent(
    tmp_path: Path, part: ParentRole, jobs: int
) -> None:
    tasks, most, results = tasks_of(40), 0, []
    with Pool(Plain(tmp_path), jobs, parent_role=part) as pool:
        for result in pool.run(tasks):
            most = max(most, len(own_children()))
            results.append(result)
    all_done({result.task.number: result for result in results}, tasks)
    assert len(results) == 40
    here = {number for number, process in log_of(tmp_path) if process == os.getpid()}
    if part is ParentRole.NONE:
        assert (len(here), most) == (0 if jobs else 40, jobs)
    elif part is ParentRole.START:
        assert most == jobs
    else:
        assert most <= max(0, jobs - 1)
        assert here


def test_small_job_starts_no_worker(tmp_path: Path) -> None:
    with Pool(Plain(tmp_path), 3, parent_role=ParentRole.FIRST) as pool:
        for _ in pool.run(tasks_of(20)):
            assert not own_children()
    assert {process for _, process in log_of(tmp_path)} == {os.getpid()}


def test_large_job_starts_workers_after_the_second_task(tmp_path: Path) -> None:
    """Told by weight: the second task is a trillionth of the job."""
    tasks = [replace(task, weight=10 ** (12 * (task.number != 1))) for task in tasks_of(20)]
    with Pool(Plain(tmp_path), 3, parent_role=ParentRole.FIRST) as pool:
        results = pool.run(tasks)
        assert next(results).task.number == 0
        assert not own_children()
        assert next(results).task.number == 1
        assert len(own_children()) == 2
        all_done({one.task.number: one for one in results}, tasks[2:])


@pytest.mark.parametrize("part", ParentRole)
def test_workers_can_be_started_before_there_are_tasks(tmp_path: Path, part: ParentRole) -> None:
    others = 2 if part in (ParentRole.FULL, ParentRole.FIRST) else 3
    with Pool(Plain(tmp_path), 3, parent_role=part) as pool:
        pool.start(1)
        assert len(own_children()) == 1
        pool.start(9)
        started = own_children()
        assert len(started) == others
        results = list(pool.run(tasks_of(40)))
        assert own_children() == started
    all_done({result.task.number: result for result in results}, tasks_of(40))
    with Pool(Plain(tmp_path), 3, parent_role=part) as pool:
        pool.start(9)
    assert not own_children()


def test_worker_may_die_before_there_are_tasks(tmp_path: Path) -> None:
    with Pool(Plain(tmp_path), 1) as pool:
        pool.start(9)
        (process,) = active_children()
        process.kill()
        all_done({one.task.number: one for one in pool.run(tasks_of(9))}, tasks_of(9))


@pytest.mark.parametrize("part", [ParentRole.FULL, ParentRole.FIRST])
def test_parent_begins_no_task_after_a_stop_request(tmp_path: Path, part: ParentRole) -> None:
    results: list[Result] = []
    with Pool(Plain(tmp_path), 2, parent_role=part) as pool:
        for result in pool.run(tasks_of(400), partial(any, results)):
            results.append(result)  # noqa: PERF402 - it is asked meanwhile
    assert len(log_of(tmp_path)) == len(results) < 10


def test_done_map_is_shared_by_parent_and_workers() -> None:
    tasks = tasks_of(5)
    board = DoneMap.create((5 * 16,), 2)
    try:
        run(Marks(board, fatal=-1), 2, tasks)
        assert list(board.marks(TOP).runs(0, 5 * 16)) == [(0, 5 * 16)]
        assert board.total == 5 * 16
    finally:
        board.close()


def test_done_map_is_private_without_workers() -> None:
    board = DoneMap.create((100, 0, 9), 0)
    board.marks(0).set(7, 8)
    board.marks(2).set(8, 9)
    board.add(0, (5,))
    board.add(0, (6,))
    assert [board.marks(at).count(0, size) for at, size in enumerate((100, 0, 9))] == [1, 0, 1]
    assert board.total == 11
    board.close()


def test_usable_processors_are_those_of_this_process() -> None:
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usual)})
    try:
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, usual)


# ---- a task fails ----


@pytest.mark.parametrize("jobs", JOBS)
def test_error_fails_only_its_task(tmp_path: Path, jobs: int) -> None:
    tasks = tasks_of(12)
    results = run(Bad(tmp_path, frozenset({0, 5}), "refuse"), jobs, tasks)
    for number in (0, 5):
        error = failure(results.pop(number))
        assert type(error) is FileError
        assert str(error) == "base.img: cannot read it: Input/output error"
        assert error.fields["errno"] == 5
        assert len(tries(tmp_path)[number]) == 1
    all_done(results, [task for task in tasks if task.number not in (0, 5)])


@pytest.mark.parametrize("jobs", JOBS)
def test_program_error_is_reported_without_a_traceback(
    tmp_path: Path, jobs: int, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = tasks_of(6)
    results = run(Bad(tmp_path, frozenset({3}), "divide"), jobs, tasks)
    error = failure(results.pop(3))
    assert str(error) == r"unexpected ZeroDivisionError('division\nby zero'); please report it"
    assert error.exit_code == 1
    all_done(results, [task for task in tasks if task.number != 3])
    assert capfd.readouterr().err == ""


# ---- a worker dies ----


@pytest.mark.parametrize("jobs", PROCESSES)
@pytest.mark.parametrize(
    ("how", "told"),
    [("kill", "signal SIGKILL"), ("end", "signal SIGUSR2"), ("leave", "status 3")],
)
def test_task_that_kills_its_worker_fails_alone(
    tmp_path: Path, jobs: int, how: str, told: str
) -> None:
    tasks = tasks_of(12)
    results = run(Bad(tmp_path, frozenset({4}), how), jobs, tasks)
    error = failure(results.pop(4))
    assert str(error).startswith("a worker process ended with ")
    assert told in str(error)
    all_done(results, [task for task in tasks if task.number != 4])
    processes = tries(tmp_path)[4]
    assert len(set(processes)) == len(processes) == TRIES


@pytest.mark.long
@pytest.mark.parametrize("jobs", PROCESSES)
def test_task_that_kills_its_worker_once_is_done(tmp_path: Path, jobs: int) -> None:
    tasks = tasks_of(12)
    results = run(DiesOnce(tmp_path, frozenset({0, 4, 5, 11})), jobs, tasks)
    all_done(results, tasks)
    done = tries(tmp_path)
    assert [number for number in sorted(done) if len(done[number]) > 1] == [0, 4, 5, 11]
    assert all(len(set(done[number])) == 2 for number in (0, 4, 5, 11))


@pytest.mark.long
def test_every_task_may_kill_its_worker(tmp_path: Path) -> None:
    tasks = tasks_of(3)
    results = run(Bad(tmp_path, frozenset(range(3)), "kill"), 2, tasks)
    assert {str(failure(result)) for result in results.values()} == {
        "a worker process ended with signal SIGKILL at this place"
    }
    assert sorted(results) == [0, 1, 2]


def test_suspected_task_is_retried_in_a_new_process(tmp_path: Path) -> None:
    work = Waits(tmp_path, frozenset({0}), "kill")
    os.mkfifo(work.gate)
    results: dict[int, Result] = {}
    with Pool(work, 3) as pool:
        for result in pool.run(tasks_of(6)):
            results[result.task.number] = result
            # All but the slow one and what was given to it ahead of time: others are idle.
            if len(results) == 6 - AHEAD and work.gate.exists():
                assert 0 not in results
                work.gate.write_bytes(b"go")
                work.gate.unlink()
    # At the second try there is no gate, and the task ends with an error of the system.
    assert "unexpected FileNotFoundError" in str(failure(results.pop(0)))
    all_done(results, tasks_of(6)[1:])
    first, second = tries(tmp_path)[0]
    assert first != second
    assert next(number for number, process in log_of(tmp_path) if process == second) == 0


def test_marks_of_a_dead_worker_are_kept() -> None:
    tasks = tasks_of(4)
    board = DoneMap.create((4 * 16,), 2)
    try:
        results = run(Marks(board, fatal=2), 2, tasks)
        assert isinstance(results[2], Failed)
        wanted = [cluster for cluster in range(64) if not 40 <= cluster < 48]
        assert marked(board) == wanted
        assert board.total == 3 * 16 + TRIES * 8
    finally:
        board.close()


def test_worker_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    tasks = tasks_of(8)
    killed = False
    results = []
    with Pool(Plain(tmp_path), 1) as pool:
        for result in pool.run(tasks):
            results.append(result)
            if not killed:
                os.kill(tries(tmp_path)[result.task.number][0], signal.SIGKILL)
                killed = True
    all_done({result.task.number: result for result in results}, tasks)
    assert len(results) == 8


# ---- stopping ----


@pytest.mark.parametrize("jobs", JOBS)
def test_pool_begins_nothing_after_an_early_stop_request(tmp_path: Path, jobs: int) -> None:
    assert run(Plain(tmp_path), jobs, tasks_of(6), lambda: True) == {}
    assert tries(tmp_path) == {}


@pytest.mark.parametrize("jobs", JOBS)
def test_pool_finishes_begun_tasks_after_a_stop_request(tmp_path: Path, jobs: int) -> None:
    tasks = tasks_of(20 + jobs * AHEAD)
    stop = threading.Event()
    results: dict[int, Result] = {}
    with Pool(Plain(tmp_path), jobs) as pool:
        for result in pool.run(tasks, stop.is_set):
            results[result.task.number] = result
            if len(results) >= 3:
                stop.set()
    all_done(results, [tasks[number] for number in results])
    assert sorted(tries(tmp_path)) == sorted(results)
    # Those that had been handed out at that moment, and no others.
    assert 3 <= len(results) < len(tasks)


def test_suspected_task_is_not_retried_after_a_stop_request(tmp_path: Path) -> None:
    work = Waits(tmp_path, frozenset({0}), "kill")
    os.mkfifo(work.gate)
    stop = threading.Event()
    results = []
    with Pool(work, 2) as pool:
        for result in pool.run(tasks_of(4), stop.is_set):
            results.append(result)
            if results and not stop.is_set():
                stop.set()
                work.gate.write_bytes(b"go")
    assert 0 not in [each.task.number for each in results]
    assert len(tries(tmp_path)[0]) == 1


def test_leaving_the_pool_ends_busy_workers(tmp_path: Path) -> None:
    work = Waits(tmp_path, frozenset({1}))
    os.mkfifo(work.gate)
    with Pool(work, 2) as pool:
        results = pool.run(tasks_of(2))
        first = next(results)
        assert first.task.number == 0
        assert len(own_children()) == 2
    assert own_children() == set()


def test_exception_in_the_parent_ends_the_workers(tmp_path: Path) -> None:
    work = Waits(tmp_path, frozenset({1}))
    os.mkfifo(work.gate)

    def begin_and_fail() -> None:
        with Pool(work, 2) as pool:
            for _ in pool.run(tasks_of(2)):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin_and_fail()
    assert own_children() == set()


def test_workers_ignore_an_interrupt_of_the_group(tmp_path: Path) -> None:
    tasks = tasks_of(4)
    work = Waits(tmp_path, frozenset({1}))
    os.mkfifo(work.gate)
    results = {}
    with Pool(work, 1) as pool:
        for result in pool.run(tasks):
            results[result.task.number] = result
            if result.task.number == 0:
                for child in own_children():
                    os.kill(child, signal.SIGINT)
                work.gate.write_bytes(b"go")
    all_done(results, tasks)


# Does its tasks, says who did them, and then waits for more to read, or to be killed.
PARENT = """
    import sys
    from pathlib import Path
    from support.pool_work import Plain, tasks_of, tries
    from addcow_mp.engine.pool import Pool

    if __name__ == "__main__":
        here = Path(sys.argv[1])
        with Pool(Plain(here), 2) as pool:
            done = 0
            for result in pool.run(tasks_of(9)):
                done += 1
                if done == 8:
                    print(*{process for each in tries(here).values() for process in each})
                    sys.stdout.flush()
                    sys.stdin.read()
        print("done", done)
"""


def start_parent(here: Path, *before: Path) -> subprocess.Popen[bytes]:
    """Start the script above, with more places to look for modules ``before`` all others."""
    script = here / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    (here / "tries").mkdir()
    path = [*map(str, before), os.path.dirname(os.path.abspath(__file__)), *sys.path]
    return subprocess.Popen(
        [sys.executable, script, here / "tries"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )


def ended(process: int) -> bool:
    """Wait for the end of a process that is not our child."""
    try:
        fd = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(PATIENCE * 1000))
    finally:
        os.close(fd)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    with start_parent(tmp_path) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert workers
        parent.kill()
    assert all(ended(worker) for worker in workers)


def test_worker_without_a_reader_ends_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    stop = StopFlag()
    stop.share()
    packed = Packed((Plain(tmp_path), stop))
    process = context.Process(target=serve, args=(theirs, packed, Place(0, os.getpid())))
    process.start()
    theirs.close()
    assert ours.poll(PATIENCE)
    # Its word of being ready is never read: the job was done before.
    ours.close()
    process.join(PATIENCE)
    assert capfd.readouterr().err == ""
    assert process.exitcode == 0


class Unreadable(Plain):
    """Cannot be unpickled in a worker: the disk of its files has died."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (refuse, ())


def test_error_at_a_workers_start_is_reported_by_the_parent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        Pool(Unreadable(tmp_path), 2) as pool,
        pytest.raises(AddcowError, match=r"^a worker process could not start: base\.img: cannot"),
    ):
        list(pool.run(tasks_of(4)))
    assert capfd.readouterr().err == ""
    assert not active_children()


# Interrupts each worker while it is starting, before any line of the package runs.
SITE = """
    import os, signal, sys
    if "--multiprocessing-fork" in sys.orig_argv:
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_workers_ignore_an_interrupt_while_they_start(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(textwrap.dedent(SITE))
    with start_parent(tmp_path, site) as parent:
        told, complaints = parent.communicate(timeout=PATIENCE)
    assert complaints == b""
    assert told.splitlines()[-1] == b"done 9"


# ---- as a job sees it ----


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[addcow_mp.Overlay]:
    """An overlay of 64 clusters, none of them local."""
    (tmp_path / "base.img").write_bytes(b"")
    top = tmp_path / "top.add-cow"
    addcow_mp.create(
        top,
        size=64 * 4096,
        backing=tmp_path / "base.img",
        backing_format="raw",
        cluster_size=4096,
    )
    with addcow_mp.open(top, writable=True) as disk:
        yield disk


def test_clusters_finished_by_dead_and_other_workers_are_published(
    overlay: addcow_mp.Overlay,
) -> None:
    board = DoneMap.create((64,), 2)
    publisher = Publisher(overlay.image.file, board, overlay=overlay, value=1)
    work = Marks(board, fatal=3)
    job = TransferRun(work, tasks_of(4), overlay.geometry, board, publisher, overlay.path)
    try:
        with pytest.raises(WorkerError) as caught:
            run_transfer(job, Processes(2))
    finally:
        board.close()
    died = "a worker process ended with signal SIGKILL at this place"
    assert str(caught.value) == f"{overlay.path}: clusters 48 to 63: {died}"
    assert local_clusters(Path(overlay.path)) == list(range(56))


@dataclass(frozen=True)
class CannotSync(Marks):
    """Does everything, and then hears that some of it may not have reached the disk."""

    def __call__(self, task: Task, worker: WorkerContext) -> Totals:
        amount = super().__call__(task, worker)
        if task.number == 1:
            raise SyncError(path="top.raw", action="make its data durable", reason="EIO", errno=5)
        return amount


@pytest.mark.parametrize("jobs", [0, 1])
def test_nothing_is_published_after_a_failed_sync_in_a_worker(
    overlay: addcow_mp.Overlay, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", PATIENCE)
    board = DoneMap.create((64,), jobs)
    publisher = Publisher(overlay.image.file, board, overlay=overlay, value=1)
    work = CannotSync(board, fatal=-1)
    job = TransferRun(work, tasks_of(4), overlay.geometry, board, publisher, overlay.path)
    try:
        with pytest.raises(AddcowError):
            run_transfer(job, Processes(jobs))
    finally:
        board.close()
    assert local_clusters(Path(overlay.path)) == []


@dataclass(frozen=True)
class CannotReadNorSync(CannotSync):
    """Fails at its first task for another reason than at its second one."""

    def __call__(self, task: Task, worker: WorkerContext) -> Totals:
        amount = super().__call__(task, worker)
        if task.number == 0:
            refuse()
        return amount


def test_nothing_is_published_when_the_second_failure_is_a_sync(
    overlay: addcow_mp.Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", PATIENCE)
    board = DoneMap.create((64,), 1)
    publisher = Publisher(overlay.image.file, board, overlay=overlay, value=1)
    work = CannotReadNorSync(board, fatal=-1)
    job = TransferRun(work, tasks_of(4), overlay.geometry, board, publisher, overlay.path)
    try:
        with pytest.raises(AddcowError):
            run_transfer(job, Processes(1))
    finally:
        board.close()
    assert local_clusters(Path(overlay.path)) == []


@dataclass(frozen=True)
class Stillborn(Marks):
    """Ends every worker before it is one; the parent sees to that before its later tasks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (3,))

    def __call__(self, task: Task, worker: WorkerContext) -> Totals:
        if task.number >= 2:
            for child in active_children():
                child.join()
        return super().__call__(task, worker)


def test_clusters_moved_by_the_parent_are_published_when_workers_cannot_start(
    overlay: addcow_mp.Overlay,
) -> None:
    board = DoneMap.create((64,), 1)
    publisher = Publisher(overlay.image.file, board, overlay=overlay, value=1)
    work = Stillborn(board, fatal=-1)
    job = TransferRun(work, tasks_of(4), overlay.geometry, board, publisher, overlay.path)
    try:
        with pytest.raises(AddcowError, match="could not start: it ended with status 3"):
            run_transfer(job, Processes(1, ParentRole.START))
        finished = marked(board)
    finally:
        board.close()
    assert len(finished) >= 48
    assert local_clusters(Path(overlay.path)) == finished


def test_stopped_job_publishes_finished_clusters(overlay: addcow_mp.Overlay) -> None:
    board = DoneMap.create((64,), 0)
    publisher = Publisher(overlay.image.file, board, overlay=overlay, value=1)
    work = Marks(board, fatal=-1)
    job = TransferRun(work, tasks_of(4), overlay.geometry, board, publisher, overlay.path)
    with pytest.raises(AddcowError, match="stopped; finished work is kept"):
        run_transfer(job, Processes(0), stopping=lambda: board.total >= 32)
    board.close()
    assert local_clusters(Path(overlay.path)) == list(range(32))
