"""The executor: runs image jobs. It decides neither their order nor whether they fit.

:class:`Executor` is what the farm needs of it; another engine can take the place of
:class:`PoolExecutor`. That one uses the engine's pool of processes. A small image is one task: the
process that gets it opens, moves and publishes it, as the command for one image with ``--jobs 0``
does. A large image is opened in this process and split: its tasks go to the same pool, before the
small images. An image that is read back has processes of its own instead: a process keeps the files
of a lent task mapped, and mapped pages cannot be dropped from the page cache.

Each image has its own checkpoints. After a kill, finished images are found finished, and an
unfinished one repeats one checkpoint at most. Worker processes end when this process does: an image
whose publisher lives on would be in use.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from addcow_mp.device import faults
from addcow_mp.device.syscalls import die_with_parent
from addcow_mp.engine.fd_passing import UnstartedError
from addcow_mp.engine.pool import TRIES, ParentRole, Pool, usable_cpus
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.throttle import share_of
from addcow_mp.engine.worker import Done, Failed, WorkerContext
from addcow_mp.errors import AddcowError
from addcow_mp.farm.image_job import ImageJob, JobSpec
from addcow_mp.farm.scheduler import LARGE
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.report import Report
from addcow_mp.units import KiB

#: The least weight of a task: an image costs as much even if there are few bytes to move.
LEAST = 256 * KiB

#: Small images in the pool for each process: one that it works on, others so that it never waits.
AHEAD = 4


class Finished(NamedTuple):
    """An image job that has ended, by its number, with its report or error."""

    number: int
    outcome: Report | AddcowError


class Executor(Protocol):
    """Runs image jobs, each known by the number that the caller gives it."""

    @property
    def capacity(self) -> int:
        """How many small images may run or wait at once."""

    def submit(self, number: int, job: ImageJob, weight: int) -> None:
        """Run ``job``, which moves ``weight`` bytes."""

    def finished(self) -> list[Finished]:
        """The jobs that have ended since the last call; waits a moment for one."""

    def stop(self, *, interrupt: bool) -> list[int]:
        """Drop the jobs that have not begun; returns their numbers.

        With ``interrupt``, running jobs end after their next checkpoint.
        """

    def close(self) -> None:
        """End all processes."""


@dataclass(frozen=True, slots=True)
class _WholeImage(Task):
    """A whole image as a task for one process."""

    image_job: ImageJob


class _Work:
    """The work of a task: the job of one image."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options

    def __reduce__(self) -> tuple[object, ...]:
        return (_received, (self.options, os.getpid()))

    def __call__(self, task: Task, worker: WorkerContext) -> Report:
        assert isinstance(task, _WholeImage)  # noqa: S101 - the tasks of this work
        return task.image_job.run(self.options, Hooks(stopping=worker.must_stop))


def _received(options: RunOptions, parent: int) -> _Work:
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # the parent has already ended
    return _Work(options)


class PoolExecutor:
    """Runs image jobs in the engine's pool.

    ``hooks.progress`` is called with the bytes done and all bytes of a large image.
    """

    def __init__(self, options: RunOptions, hooks: Hooks, spec: JobSpec) -> None:
        self._options = options
        self._hooks = hooks
        self._jobs: dict[int, ImageJob] = {}
        #: The numbers and weights of large images that wait.
        self._large: deque[tuple[int, int]] = deque()
        processes = usable_cpus() if options.jobs is None else options.jobs
        self.capacity = AHEAD * max(1, processes)
        rate = options.copy_options.rate
        # Each process has its share of a limit, whatever image it works on.
        each = replace(options.copy_options, rate=share_of(rate, processes))
        self._pool = Pool(
            _Work(replace(options, jobs=0, copy_options=each)),
            processes,
            # Fault rules and limits apply to workers; this process would exceed the limit.
            parent_role=ParentRole.NONE if faults.armed or rate else ParentRole.FIRST,
            # A second try would verify against the half-finished image.
            tries=1 if spec.verifies else TRIES,
            rate=rate,
            stopping=hooks.stopping,
        )

    def submit(self, number: int, job: ImageJob, weight: int) -> None:
        """Run ``job``, which moves ``weight`` bytes."""
        self._jobs[number] = job
        if weight > LARGE:
            self._large.append((number, weight))
        else:
            self._pool.add([_WholeImage(number, 0, 1, max(LEAST, weight), job)])

    def finished(self) -> list[Finished]:
        """The jobs that have ended since the last call; waits a moment for one."""
        if self._large:
            number, weight = self._large.popleft()
            return [Finished(number, self._run_large(self._jobs[number], weight))]
        return [Finished(one.task.number, self._outcome(one)) for one in self._pool.step()]

    def stop(self, *, interrupt: bool) -> list[int]:
        """Drop the jobs that have not begun; returns their numbers."""
        if interrupt:
            self._pool.stop()
        dropped = [number for number, _ in self._large]
        self._large.clear()
        return dropped + [task.number for task in self._pool.drop_waiting()]

    def close(self) -> None:
        """End all processes."""
        self._pool.__exit__()

    def _run_large(self, job: ImageJob, weight: int) -> Report | AddcowError:
        """Run the job of a large image here; all processes do its tasks."""

        def progress(done: int, total: int) -> None:
            self._hooks.progress(weight * done // max(1, total), weight)

        pool = None if job.spec.verifies else self._pool
        try:
            return job.run(self._options, replace(self._hooks, progress=progress), pool)
        except UnstartedError:
            raise
        except AddcowError as error:
            return error.without_traceback()

    def _outcome(self, result: Done | Failed) -> Report | AddcowError:
        """The report or error of a small image."""
        if isinstance(result, Done):
            report: Report = result.result
            return report
        job = self._jobs[result.task.number]
        if self._pool.was_retried(result.task) and job.is_discarded:
            try:
                return job.finish_discard()
            except AddcowError as error:
                return error.without_traceback()
        return result.error
