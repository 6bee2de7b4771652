"""Carrying out a plan: tasks to the pool, what they have done to the publisher.

A checkpoint publishes what the board says is done, whole tasks and parts of tasks alike. The
parent looks whether one is due while it waits for workers, and between two pieces when it moves
bytes itself: a checkpoint never waits for the end of a task. Neither does a stop.

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

from addcow_mp.engine.done_map import MOST_UNPUBLISHED, DoneMap
from addcow_mp.engine.fd_passing import UnstartedError, Work
from addcow_mp.engine.pool import Done, Failed, ParentRole, Pool, usable_cpus
from addcow_mp.engine.publisher import Finished, Publisher
from addcow_mp.engine.tasks import TASK_BYTES, Task
from addcow_mp.engine.transfer import TOP, Transfer
from addcow_mp.errors import AddcowError, StoppedError, SyncError, WorkerError
from addcow_mp.format.bits import Run, between, merged
from addcow_mp.format.geometry import Geometry

#: A checkpoint is due after so many bytes or so many seconds. Another half may be added while
#: it is under way: a crash costs 512 MiB or 5 seconds of repeated work, whichever is less.
#: Smaller ones would make the disk commit its journal all the time.
CHECKPOINT_BYTES = MOST_UNPUBLISHED // 2
CHECKPOINT_SECONDS = 2.5

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, now and then."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def workers_for(jobs: int | None, tasks: Sequence[Task]) -> int:
    """How many processes to start: as asked, by default the usable processors.

    A single small task is done in this process: starting another costs more than it.
    """
    if jobs is not None:
        return min(jobs, len(tasks))
    if sum(task.weight for task in tasks) <= TASK_BYTES:
        return 0
    return min(usable_cpus(), len(tasks))


class _Checkpoints:
    """Publishes what is done, one checkpoint at a time."""

    def __init__(self, job: Assignment) -> None:
        self._job = job
        #: Clusters of tasks that have ended, in order, and of those that ended since the last one.
        self._ended: list[Run] = []
        self._new: list[Run] = []
        #: What was counted when the last one began: all amounts, and bytes moved.
        self._counted = job.done_map.totals
        self._total = job.done_map.total
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def add(self, task: Task) -> None:
        """Take note of a task that has ended."""
        self._new.append((task.first, task.stop))

    def tick(self) -> None:
        """Begin a checkpoint when one is due; what it meets :meth:`finish` raises.

        With one still under way, the next one waits until it has its full size; then the caller
        waits, so that what is not published does not grow without end.
        """
        full = self._job.done_map.total - self._total >= CHECKPOINT_BYTES
        late = time.monotonic() - self._last >= CHECKPOINT_SECONDS
        if full or (late and not self._is_busy and self._has_news):
            self._begin()

    @property
    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def _has_news(self) -> bool:
        return bool(self._new) or self._job.done_map.totals != self._counted

    def _under_way(self) -> list[Run]:
        """Clusters of all tasks that had not ended when the last checkpoint began."""
        return list(between(self._ended, 0, self._job.geometry.clusters))

    def _begin(self, *, last: bool = False) -> None:
        self.wait()
        if self.failed:
            return
        done_map, self._last = self._job.done_map, time.monotonic()
        self._counted, self._total = done_map.totals, done_map.total
        new, self._new = list(merged(sorted(self._new))), []
        self._ended = list(merged(sorted((*self._ended, *new))))
        finished = Finished(new, self._under_way())
        thread = threading.Thread(target=self._publish, args=(finished, self._total, last))
        try:
            thread.start()
        except RuntimeError:  # there is no room for a thread: others wait meanwhile
            self._publish(finished, self._total, last)
        else:
            self._thread = thread

    def _publish(self, finished: Finished, total: int, last: bool) -> None:
        try:
            self._job.publisher.checkpoint(finished, self._job.geometry, last=last)
            self._job.done_map.publish(total)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for a checkpoint under way: files are not closed under it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failed(self) -> bool:
        """Whether publishing has failed, so that going on is in vain."""
        return self._error is not None

    def finish(self) -> None:
        """Publish all the rest. Raises what publishing met, now or before."""
        self.wait()
        marks = self._job.done_map.marks(TOP)
        if self._new or any(marks.any(*run) for run in self._under_way()):
            self._begin(last=True)
            self.wait()
        if self._error is not None:
            raise self._error


@dataclass
class Assignment:
    """What one job hands to :func:`run_transfer`."""

    work: Work
    tasks: list[Task]
    geometry: Geometry
    done_map: DoneMap
    publisher: Publisher
    path: str
    parent_role: ParentRole = ParentRole.NONE
    crew: Pool | None = None

    @contextmanager
    def pool(self, workers: int) -> Iterator[tuple[Pool, Work | None]]:
        """A pool that does the job, and the work to lend to it if it was made for another."""
        if self.crew is not None:
            yield self.crew, self.work
            return
        with Pool(self.work, workers, parent_role=self.parent_role) as pool:
            yield pool, None


class _Results:
    """What has come of a job's tasks so far, and what of it may be published."""

    def __init__(self, job: Assignment, progress: Progress, stopping: Callable[[], bool]) -> None:
        self.finished = 0
        self.failure: Failed | None = None
        self.checkpoints = _Checkpoints(job)
        self._board = job.done_map
        self._progress = progress
        self._stopping = stopping
        self._weight = sum(task.weight for task in job.tasks)

    @property
    def unsynced(self) -> bool:
        """Whether a sync failed in a worker: what is durable is not known any more."""
        return self.failure is not None and isinstance(self.failure.error, SyncError)

    def take(self, result: Done | Failed) -> None:
        """Enter one result. The first failure counts, but a failed sync before all others."""
        if isinstance(result, Done):
            self.finished += 1
            self.checkpoints.add(result.task)
        elif not isinstance(result.error, StoppedError):
            self._fail(result)

    def _fail(self, result: Failed) -> None:
        if self.failure is None or isinstance(result.error, SyncError):
            self.failure = result

    def tick(self) -> bool:
        """Look around, also in the middle of a task: publish what is due, show progress.

        Returns whether tasks under way shall end: the job is stopped, or nothing of what they do
        could be published.
        """
        if not self.unsynced:
            self.checkpoints.tick()
        self._progress(min(self._board.total, self._weight), self._weight)
        in_vain = self.unsynced or self.checkpoints.failed
        return self._board.stops_by(lambda: in_vain or self._stopping())

    def enough(self) -> bool:
        """Whether no more tasks are begun."""
        return self.tick() or self.failure is not None

    def close(self) -> None:
        """Publish all the rest, if that is still right."""
        if not self.unsynced:
            self.checkpoints.finish()
        if self.failure is None and not self._board.stopped:
            self._progress(self._weight, self._weight)


def run_transfer(
    job: Assignment,
    workers: int,
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Do all tasks of ``job`` with ``workers`` processes and publish what they finish.

    When a task fails, no new one is begun, what was finished is published, and the
    first failure is raised as :class:`WorkerError`. When ``stopping`` ends tasks or keeps them
    from being begun, :class:`StoppedError` is raised, after publishing as well.
    """
    results = _Results(job, progress, stopping)
    if isinstance(job.work, Transfer):
        job.work.attend = results.tick
    unstarted = _collect(job, workers, results)
    results.close()
    if results.failure is not None:
        raise _told(job.path, results.failure)
    if unstarted is not None:
        raise unstarted
    if results.finished < len(job.tasks):
        raise StoppedError(path=job.path)


def _collect(job: Assignment, workers: int, results: _Results) -> UnstartedError | None:
    """Let the tasks be done, entering results; the error when workers cannot be started."""
    try:
        with job.pool(workers) as (pool, lent):
            for result in pool.run(job.tasks, results.enough, lent):
                if result is not None:
                    results.take(result)
    except UnstartedError as error:
        return error
    finally:
        results.checkpoints.wait()
    return None


def _told(path: str, failure: Failed) -> AddcowError:
    return WorkerError(
        path=path, first=failure.task.first, last=failure.task.stop - 1, cause=str(failure.error)
    )
