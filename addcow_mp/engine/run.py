"""Carrying out a plan: tasks to the pool, results to the publisher, one report back.

Checkpoints run in a thread of their own while workers go on with later tasks: a disk
that is syncing must not keep processors waiting, and workers with nothing to do must
not keep the disk waiting. There is one checkpoint at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from addcow_mp.engine.board import Board
from addcow_mp.engine.delivery import UnstartedError, Work
from addcow_mp.engine.plan import TASK_BYTES, Task
from addcow_mp.engine.pool import Done, Failed, Part, Pool, usable_cpus
from addcow_mp.engine.publisher import Publisher
from addcow_mp.engine.transfer import TOP, Amount
from addcow_mp.errors import AddcowError, StoppedError, SyncError, WorkerError
from addcow_mp.format.bits import Run
from addcow_mp.format.geometry import Geometry
from addcow_mp.units import MiB

#: A checkpoint is due after so many bytes or so many seconds: what a crash costs in
#: repeated work. Smaller ones would make the disk commit its journal all the time.
CHECKPOINT_BYTES = 512 * MiB
CHECKPOINT_SECONDS = 5.0

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, now and then."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def workers_for(jobs: int | None, tasks: Sequence[Task], *, idle: bool = False) -> int:
    """How many processes to start: as asked, by default the usable processors.

    A single small task is done in this process: starting another costs more than it. Not
    so when workers shall step back (``idle``): this process would have to, for good.
    """
    if jobs is not None:
        return min(jobs, len(tasks))
    if sum(task.weight for task in tasks) <= TASK_BYTES and not idle:
        return 0
    return min(usable_cpus(), len(tasks))


class _Checkpoints:
    """Collects what is done and publishes it, one checkpoint at a time."""

    def __init__(self, publisher: Publisher, geometry: Geometry) -> None:
        self._publisher = publisher
        self._geometry = geometry
        self._done: list[Run] = []
        self._bytes = 0
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def add(self, done: list[Run], size: int) -> None:
        """Take note of finished clusters; publish when that is due.

        With a checkpoint still under way, the next one waits until it has its full size;
        then the caller waits, so that what is not published never exceeds two of them.
        """
        self._done += done
        self._bytes += size
        busy = self._thread is not None and self._thread.is_alive()
        if self._is_due() and (not busy or self._bytes >= CHECKPOINT_BYTES):
            self._begin()

    def _is_due(self) -> bool:
        late = time.monotonic() - self._last >= CHECKPOINT_SECONDS
        return bool(self._done) and (late or self._bytes >= CHECKPOINT_BYTES)

    def _begin(self) -> None:
        self._end()
        done, self._done = self._done, []
        self._bytes, self._last = 0, time.monotonic()
        self._thread = threading.Thread(target=self._publish, args=(done,))
        self._thread.start()

    def _publish(self, done: list[Run]) -> None:
        try:
            self._publisher.checkpoint(done, self._geometry)
        except BaseException as error:
            self._error = error

    def _end(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for a checkpoint under way: files are not closed under it."""
        if self._thread is not None:
            self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether publishing has failed, so that going on is in vain."""
        return self._error is not None

    def finish(self) -> None:
        """Publish all the rest. Raises what publishing met, now or before."""
        self._end()
        if self._done:
            self._begin()
            self._end()


@dataclass
class Assignment:
    """What one job hands to :func:`carry_out`."""

    work: Work
    tasks: list[Task]
    geometry: Geometry
    board: Board
    publisher: Publisher
    path: str
    idle: bool = False
    part: Part = Part.NONE
    crew: Pool | None = None

    @contextmanager
    def pool(self, workers: int) -> Iterator[tuple[Pool, Work | None]]:
        """A pool that does the job, and the work to lend to it if it was made for another."""
        if self.crew is not None:
            yield self.crew, self.work
            return
        with Pool(self.work, workers, idle=self.idle, part=self.part) as pool:
            yield pool, None


class _Ledger:
    """What has come of a job's tasks so far, and what of it may be published."""

    def __init__(self, job: Assignment) -> None:
        self.amount = Amount()
        self.finished = 0
        self.failure: Failed | None = None
        self.checkpoints = _Checkpoints(job.publisher, job.geometry)
        self._board = job.board

    @property
    def unsynced(self) -> bool:
        """Whether a sync failed in a worker: what is durable is not known any more."""
        return self.failure is not None and isinstance(self.failure.error, SyncError)

    def take(self, result: Done | Failed) -> None:
        """Enter one result. The first failure counts, but a failed sync before all others."""
        if isinstance(result, Failed):
            if not isinstance(result.error, StoppedError):
                self._fail(result)
            done, size = _finished_part(self._board, result.task), 0
        else:
            self.amount += result.result
            self.finished += 1
            done, size = [(result.task.first, result.task.stop)], result.result.bytes_moved
        if not self.unsynced:
            self.checkpoints.add(done, size)

    def _fail(self, result: Failed) -> None:
        if self.failure is None or isinstance(result.error, SyncError):
            self.failure = result

    def close(self) -> None:
        """Publish all the rest, if that is still right."""
        if not self.unsynced:
            self.checkpoints.finish()


def carry_out(
    job: Assignment,
    workers: int,
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
) -> Amount:
    """Do all tasks of ``job`` with ``workers`` processes and publish what they finish.

    When a task fails, no new one is begun, what was finished is published, and the
    first failure is raised as :class:`WorkerError`. When ``stopping`` keeps tasks from
    being begun, :class:`StoppedError` is raised, after publishing as well.
    """
    ledger = _Ledger(job)

    def enough() -> bool:
        stops = job.board.stops_by(stopping)
        return stops or ledger.failure is not None or ledger.checkpoints.failed

    unstarted = _collect(job, workers, progress, enough, ledger)
    ledger.close()
    if ledger.failure is not None:
        raise _told(job.path, ledger.failure)
    if unstarted is not None:
        raise unstarted
    if ledger.finished < len(job.tasks):
        raise StoppedError(path=job.path)
    return ledger.amount


def _collect(
    job: Assignment,
    workers: int,
    progress: Progress,
    enough: Callable[[], bool],
    ledger: _Ledger,
) -> UnstartedError | None:
    """Let the tasks be done, entering results; the error when workers cannot be started."""
    total = sum(task.weight for task in job.tasks)
    try:
        with job.pool(workers) as (pool, lent):
            for result in pool.run(job.tasks, enough, lent):
                progress(min(job.board.total, total), total)
                if result is not None:
                    ledger.take(result)
    except UnstartedError as error:
        return error
    finally:
        ledger.checkpoints.wait()
    if not enough():
        progress(total, total)
    return None


def _finished_part(board: Board, task: Task) -> list[Run]:
    return list(board.marks(TOP).runs(task.first, task.stop))


def _told(path: str, failure: Failed) -> AddcowError:
    return WorkerError(
        path=path, first=failure.task.first, last=failure.task.stop - 1, cause=str(failure.error)
    )
