"""Runs the tasks of a transfer: gives them to the pool, and publishes what is finished.

A checkpoint publishes what the done map shows: finished tasks and parts of others. The parent
checks whether one is due while it waits for worker processes, and between two steps when it moves
bytes itself: neither a checkpoint nor a stop waits for the end of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from addcow_mp.engine.checkpoints import Checkpoints
from addcow_mp.engine.done_map import DoneMap
from addcow_mp.engine.fd_passing import UnstartedError
from addcow_mp.engine.pool import ParentRole, Pool, run_here
from addcow_mp.engine.publisher import Publisher
from addcow_mp.engine.stop_flag import never
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import Done, Failed, Work
from addcow_mp.errors import StoppedError, SyncError, WorkerError
from addcow_mp.format.geometry import Geometry

OnProgress = Callable[[int, int], None]
"""Called with the bytes done and all bytes, now and then."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Processes:
    """The processes that do the tasks of one job.

    ``jobs`` of its own, or those of the pool ``shared``, which was made for another work. ``rate``:
    bytes per second for all of its own together, 0 = no limit.
    """

    jobs: int
    parent_role: ParentRole = ParentRole.NONE
    rate: int = 0
    shared: Pool | None = None

    def run(
        self,
        work: Work,
        tasks: list[Task],
        stopping: Callable[[], bool],
        enough: Callable[[], bool],
    ) -> Generator[Done | Failed]:
        """Do ``tasks`` and yield results, as :meth:`Pool.run` does."""
        if self.shared is not None:
            yield from self.shared.run_lent(work, tasks, stopping, enough)
            return
        if self.jobs == 0:
            yield from run_here(work, tasks, stopping, enough, self.rate)
            return
        role, rate = self.parent_role, self.rate
        with Pool(work, self.jobs, parent_role=role, rate=rate, stopping=stopping) as pool:
            yield from pool.run(tasks, enough)


@dataclass(frozen=True)
class TransferRun:
    """The parts of one transfer: what is done, where it is marked and how it is published.

    ``path`` is the file that errors name.
    """

    work: Work
    tasks: list[Task]
    geometry: Geometry
    done_map: DoneMap
    publisher: Publisher
    path: str


class _Results:
    """The results of a transfer so far, and the checkpoints that publish them."""

    def __init__(
        self, run: TransferRun, progress: OnProgress, stopping: Callable[[], bool]
    ) -> None:
        self.finished = 0
        self.failure: Failed | None = None
        self.checkpoints = Checkpoints(run.publisher, run.done_map, run.geometry)
        self._done_map = run.done_map
        self._progress = progress
        self._stopping = stopping
        self._stopped = False
        self._weight = sum(task.weight for task in run.tasks)

    @property
    def _unsynced(self) -> bool:
        """Whether a sync failed in a worker process: nothing is known to be durable then."""
        return self.failure is not None and isinstance(self.failure.error, SyncError)

    def add(self, result: Done | Failed) -> None:
        """Enter one result. The first failure counts, but a failed sync precedes all others."""
        if isinstance(result, Done):
            self.finished += 1
            self.checkpoints.add(result.task)
        elif isinstance(result.error, SyncError) or (
            self.failure is None and not isinstance(result.error, StoppedError)
        ):
            self.failure = result

    def must_stop(self) -> bool:
        """Publish what is due, show progress, and return whether all tasks must end.

        They must when the job is stopped or their work cannot be published.
        """
        if not self._unsynced:
            self.checkpoints.begin_if_due()
        done = self._done_map.total + self._done_map.passed
        self._progress(min(done, self._weight), self._weight)
        useless = self._unsynced or self.checkpoints.failed
        self._stopped = self._stopped or useless or self._stopping()
        return self._stopped

    def has_failed(self) -> bool:
        """Return whether a task has failed, so that no further task begins."""
        return self.failure is not None

    def finish(self) -> None:
        """Publish the rest, unless a sync has failed."""
        if not self._unsynced:
            self.checkpoints.finish()
        if self.failure is None and not self._stopped:
            self._progress(self._weight, self._weight)


def run_transfer(
    run: TransferRun,
    processes: Processes,
    progress: OnProgress = no_progress,
    stopping: Callable[[], bool] = never,
) -> None:
    """Do all tasks of ``run`` and publish what they finish.

    When a task fails, no further task begins, finished work is published, and the first failure is
    raised as :class:`WorkerError`. When ``stopping`` has ended tasks or kept them from beginning,
    :class:`StoppedError` is raised, also after publishing.
    """
    results = _Results(run, progress, stopping)
    unstarted = _run_tasks(run, processes, results)
    results.finish()
    if results.failure is not None:
        task, error = results.failure.task, results.failure.error
        raise WorkerError(path=run.path, first=task.first, last=task.stop - 1, cause=str(error))
    if unstarted is not None:
        raise unstarted
    if results.finished < len(run.tasks):
        raise StoppedError(path=run.path)


def _run_tasks(run: TransferRun, processes: Processes, results: _Results) -> UnstartedError | None:
    """Do the tasks and enter their results; return the error when workers cannot be started."""
    try:
        answers = processes.run(run.work, run.tasks, results.must_stop, results.has_failed)
        with closing(answers):
            for result in answers:
                results.add(result)
    except UnstartedError as error:
        return error
    finally:
        results.checkpoints.wait()
    return None
