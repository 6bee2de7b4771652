"""The executor: runs image jobs. It decides neither their order nor whether they fit.

:class:`Executor` is what the farm needs of it; another engine can take the place of
:class:`PoolExecutor`. That one uses the engine's pool of processes. Small images are dealt out in
groups: the process that gets a group opens, moves and publishes each image, as the command for one
image with ``--jobs 0`` does. It does the images of a group side by side, so that they wait for the
disk at the same time. A large image is opened in this process and split: its tasks go to the same
pool, before the small images. An image that is read back has processes of its own instead: a
process keeps the files of a lent task mapped, and mapped pages cannot be dropped from the page
cache.

Each image has its own checkpoints. After a kill, finished images are found finished, and an
unfinished one repeats one checkpoint at most. When a process dies, each image of its group is tried
again by itself. Worker processes end when this process does: an image whose publisher lives on
would be in use.
"""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

from addcow_mp.device import faults
from addcow_mp.device.syscalls import die_with_parent
from addcow_mp.engine.crew import Crew
from addcow_mp.engine.fd_passing import UnstartedError
from addcow_mp.engine.pool import TRIES, ParentRole, Pool, usable_cpus
from addcow_mp.engine.tasks import TASK_BYTES, Task
from addcow_mp.engine.throttle import share_of
from addcow_mp.engine.worker import Done, Failed, WorkerContext, attempt
from addcow_mp.errors import AddcowError
from addcow_mp.farm.image_job import ImageJob, JobSpec
from addcow_mp.farm.scheduler import LARGE
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.report import Report
from addcow_mp.units import KiB

#: The least weight of a task: an image costs as much even if there are few bytes to move.
LEAST = 256 * KiB

#: The most images in a group: with more of them, syncs side by side gain no more.
GROUP = 32

#: With so many images, other processes pay: they are started before the first images are measured.
MANY = 4 * GROUP

#: Full groups in the pool for each process: one that it works on, others so that it never waits.
AHEAD = 4

#: Descriptors of each layer, with the mapping of its bitmap, and those that a job adds.
_LAYER_FILES, _JOB_FILES = 3, 8


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


class _Submitted(NamedTuple):
    """A small image that was submitted: its number, its job, and the bytes to move."""

    number: int
    image_job: ImageJob
    weight: int


@dataclass(frozen=True, slots=True)
class _Group(Task):
    """Small images as a task for one process; it has the number of the first of them."""

    images: tuple[_Submitted, ...]

    @classmethod
    def of(cls, images: list[_Submitted]) -> _Group:
        """The task that consists of ``images``."""
        weight = sum(image.weight for image in images)
        return cls(images[0].number, 0, len(images), weight, tuple(images))

    def divided(self) -> list[Task]:
        """Each image by itself."""
        return [_Group.of([image]) for image in self.images]


class _Work:
    """The work of a task: the jobs of a group of images, side by side."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self._crew = Crew()

    def __reduce__(self) -> tuple[object, ...]:
        return (_received, (self.options, os.getpid()))

    def __call__(self, task: Task, worker: WorkerContext) -> list[Report | AddcowError | None]:
        """The report or error of each image; None for those that did not begin."""
        assert isinstance(task, _Group)  # noqa: S101 - the tasks of this work
        calls = [partial(self._outcome, image.image_job, task, worker) for image in task.images]
        return self._crew.run(calls, _most_open(task))

    def _outcome(
        self, image_job: ImageJob, task: Task, worker: WorkerContext
    ) -> Report | AddcowError | None:
        if worker.must_stop():
            return None
        hooks = Hooks(stopping=worker.must_stop)
        result = attempt(lambda *_: image_job.run(self.options, hooks), task, worker)
        return result.error if isinstance(result, Failed) else result.result

    def close(self) -> None:
        """End the threads of this process."""
        self._crew.close()


def _most_open(group: _Group) -> int:
    """How many images of ``group`` may be open at once, in half of the limit of this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    layers = max(image.image_job.layers for image in group.images)
    if limit == resource.RLIM_INFINITY:
        return GROUP
    return max(1, limit // 2 // (_LAYER_FILES * layers + _JOB_FILES))


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
        #: Small images that are not in the pool yet.
        self._small: list[_Submitted] = []
        #: The numbers of images of ended groups that did not begin.
        self._unbegun: list[int] = []
        #: The numbers and weights of large images that wait.
        self._large: deque[tuple[int, int]] = deque()
        processes = usable_cpus() if options.jobs is None else options.jobs
        rate = options.copy_options.rate
        # A rate limit is for one image at a time, and beside one that fails none has begun.
        alone = spec.verifies or spec.stops_at_error or rate
        self._group = 1 if alone else GROUP
        self._processes = max(1, processes)
        self.capacity = AHEAD * self._group * self._processes
        #: Images in the pool.
        self._busy = 0
        # Each process has its share of a limit, whatever image it works on.
        each = replace(options.copy_options, rate=share_of(rate, processes))
        self._work = _Work(replace(options, jobs=0, copy_options=each))
        self._pool = Pool(
            self._work,
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
            self._small.append(_Submitted(number, job, max(LEAST, weight)))

    def finished(self) -> list[Finished]:
        """The jobs that have ended since the last call; waits a moment for one."""
        if len(self._small) >= MANY:
            self._pool.start(self._processes)
        self._pool.add([_Group.of(images) for images in self._groups()])
        self._busy += len(self._small)
        self._small.clear()
        if self._large:
            number, weight = self._large.popleft()
            return [Finished(number, self._run_large(self._jobs[number], weight))]
        return [ended for result in self._pool.step() for ended in self._ended(result)]

    def _groups(self) -> Iterator[list[_Submitted]]:
        """Groups of the small images, each with no more bytes than a task."""
        # When no process has work, each one gets a share.
        share = -(-len(self._small) // self._processes)
        most = self._group if self._busy else min(self._group, share)
        group: list[_Submitted] = []
        for image in self._small:
            weight = sum(one.weight for one in group) + image.weight
            if group and (len(group) == most or weight > TASK_BYTES):
                yield group
                group = []
            group.append(image)
        if group:
            yield group

    def stop(self, *, interrupt: bool) -> list[int]:
        """Drop the jobs that have not begun; returns their numbers."""
        if interrupt:
            self._pool.stop()
        dropped = [number for number, _ in self._large]
        dropped += [image.number for image in self._small] + self._unbegun
        waiting = [image for task in self._pool.drop_waiting() for image in _images_of(task)]
        self._busy -= len(waiting)
        dropped += [image.number for image in waiting]
        for gone in (self._large, self._small, self._unbegun):
            gone.clear()
        return dropped

    def close(self) -> None:
        """End all processes."""
        self._pool.__exit__()
        self._work.close()

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

    def _ended(self, result: Done | Failed) -> Iterator[Finished]:
        """The images of a group that have ended."""
        images = _images_of(result.task)
        self._busy -= len(images)
        outcomes = [result.error] * len(images) if isinstance(result, Failed) else result.result
        for image, outcome in zip(images, outcomes, strict=True):
            if outcome is None:
                self._unbegun.append(image.number)
            else:
                yield Finished(image.number, self._checked(outcome, image, result.task))

    def _checked(
        self, outcome: Report | AddcowError, image: _Submitted, task: Task
    ) -> Report | AddcowError:
        """The outcome; a process may have died after it had done the last step."""
        retried = isinstance(outcome, AddcowError) and self._pool.was_retried(task)
        if retried and image.image_job.is_discarded:
            try:
                return image.image_job.finish_discard()
            except AddcowError as error:
                return error.without_traceback()
        return outcome


def _images_of(task: Task) -> tuple[_Submitted, ...]:
    assert isinstance(task, _Group)  # noqa: S101 - the tasks of this executor
    return task.images
