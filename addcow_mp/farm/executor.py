"""The work: a plan carried out by one pool of processes, each image by its own job.

A small image is one task: whoever takes it opens it, moves it and publishes it, as the command
for one image would with ``--jobs 0``. A large one is opened here and split: its tasks are lent to
the same pool, before the small ones. Either way a checkpoint is the image's own, so that after a
kill finished images are found finished, and an unfinished one repeats one checkpoint at most.
Where images are read back, a large one is not lent but has processes of its own, and begins when
nothing else is under way.

A step waits for earlier ones that use a file it writes, or write a file it uses: so chains are
worked off from above, and nobody meets a lock of the farm's own. It also waits until the space
that it takes is free beside what steps under way may still take. One that does not fit although
nothing is under way any more ends there, as does one whose job fails; the others go on.

Workers end when this process does: an image whose publisher lives on would be in use.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from addcow_mp.device import faults
from addcow_mp.device.discovery import Identity
from addcow_mp.device.files import free_bytes, sync_directory
from addcow_mp.device.syscalls import die_with_parent
from addcow_mp.engine.fd_passing import UnstartedError
from addcow_mp.engine.pool import TRIES, ParentRole, Pool, usable_cpus
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.throttle import share_of
from addcow_mp.engine.worker import Done, WorkerContext
from addcow_mp.errors import AddcowError
from addcow_mp.farm.image_job import ImageJob
from addcow_mp.farm.plan import Plan, State, Step
from addcow_mp.farm.tally import Tally
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.report import Reach, Report
from addcow_mp.units import KiB, MiB

#: Images with more to move are split: others can help with them for longer than that takes.
LARGE = 256 * MiB

#: What an image costs that is not moving: its weight in tasks is never below.
LEAST = 256 * KiB

#: Small images handed out for each process: one that it is at, others so that it never waits.
AHEAD = 4

#: Steps that are looked at for one that fits: a full disk with thousands waiting costs no more.
LOOKED_AT = 64

#: Seconds between looks for overlays that are new around the farm.
LOOK_AGAIN = 1.0


class Watch:
    """Whoever wants to know what happens overrides these."""

    def begun(self, step: Step) -> None:
        """The job of an image has begun."""

    def ended(self, step: Step) -> None:
        """What becomes of an image is known."""

    def progress(self, tally: Tally) -> None:
        """Told now and then."""


def execute(
    plan: Plan,
    options: RunOptions,
    hooks: Hooks,
    *,
    stops_at_error: bool = False,
    watch: Watch | None = None,
) -> None:
    """Do all that is ready in ``plan``; afterwards each step says what has become of it.

    With ``stops_at_error`` nothing is begun any more once an image is refused or fails. Raises
    :class:`UnstartedError` when processes cannot be started; whatever one image meets is its own.
    """
    plan.is_carried_out = True
    farm = _Farm(plan, options, hooks, watch or Watch(), stops_at_error=stops_at_error)
    try:
        farm.run()
    finally:
        for step in plan.steps:
            if step.state is State.READY:
                step.state = State.LEFT
                farm.watch.ended(step)


# Small images: the work of a task


@dataclass(frozen=True, slots=True)
class _Whole(Task):
    """A whole image, to be done by one process."""

    image_job: ImageJob


class _ImageJobs:
    """Runs the jobs of images, one a task, in this process or a worker process."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options

    def __reduce__(self) -> tuple[object, ...]:
        return (_received, (self.options, os.getpid()))

    def __call__(self, task: Task, worker: WorkerContext) -> Report:
        assert isinstance(task, _Whole)  # noqa: S101 - what this work is given
        return task.image_job.run(self.options, Hooks(stopping=worker.must_stop))


def _received(options: RunOptions, parent: int) -> _ImageJobs:
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # it died before
    return _ImageJobs(options)


# Order and space


class _Agenda:
    """Which steps may begin: those of which no earlier one that touches the same files is left."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._followers: list[list[int]] = [[] for _ in steps]
        self._waits_for = [0] * len(steps)
        self._left = len(steps)
        for number, earlier in enumerate(_dependencies(steps)):
            self._waits_for[number] = len(earlier)
            for other in earlier:
                self._followers[other].append(number)
        #: Numbers of steps that may begin, small and large ones, in the order of the plan.
        self._free: tuple[list[int], list[int]] = ([], [])
        for number in range(len(steps)):
            self._offer(number)

    @property
    def left(self) -> int:
        """How many steps have not come to their end."""
        return self._left

    def _offer(self, number: int) -> None:
        if not self._waits_for[number]:
            heappush(self._free[self._steps[number].weight > LARGE], number)

    def next(self, *, large: bool, fits: Callable[[Step], bool]) -> int | None:
        """Take the first step that may begin and ``fits``."""
        free = self._free[large]
        aside: list[int] = []
        found = None
        while free and found is None and len(aside) < LOOKED_AT:
            number = heappop(free)
            if fits(self._steps[number]):
                found = number
            else:
                aside.append(number)
        for number in aside:
            heappush(free, number)
        return found

    def finish(self, number: int) -> None:
        """A step has come to its end: others may have waited for it."""
        self._left -= 1
        for other in self._followers[number]:
            self._waits_for[other] -= 1
            self._offer(other)


def _dependencies(steps: list[Step]) -> Iterator[set[int]]:
    """For each step the earlier ones that write what it uses, or use what it writes."""
    writer: dict[Identity, int] = {}
    readers: defaultdict[Identity, set[int]] = defaultdict(set)
    for number, step in enumerate(steps):
        written, read = step.chain[: step.written], step.chain[step.written :]
        earlier = {writer[file] for file in step.chain if file in writer}
        earlier = earlier.union(*(readers[file] for file in written))
        yield earlier - {number}
        for file in read:
            readers[file].add(number)
        for file in written:
            writer[file] = number
            readers[file].clear()


class _Space:
    """Space that steps under way may still take, on each device."""

    def __init__(self) -> None:
        self._reserved: Counter[int] = Counter()

    def fits(self, step: Step) -> bool:
        """Whether what ``step`` takes is free beside that; a step alone is let go to find out."""
        if step.estimate is None or not step.space.peak or not +self._reserved:
            return True
        try:
            free = free_bytes(os.statvfs(os.path.dirname(step.estimate.target) or "."))
        except OSError:
            return True  # its job says what is wrong there
        return step.space.peak <= free - self._reserved[step.estimate.device]

    def reserve(self, step: Step, times: int = 1) -> None:
        """Count it in, or with ``times`` -1 out."""
        if step.estimate is not None:
            self._reserved[step.estimate.device] += times * step.space.peak


# The farm


class _Farm:
    """A plan that is being carried out."""

    def __init__(
        self, plan: Plan, options: RunOptions, hooks: Hooks, watch: Watch, *, stops_at_error: bool
    ) -> None:
        self.watch = watch
        self._plan = plan
        self._options = replace(options, access=plan.access)
        self._hooks = hooks
        self._stops_at_error = stops_at_error
        self._verifies = any(step.image_job.verifies for step in plan.steps)
        self._steps = [step for step in plan.steps if step.state is State.READY]
        self._jobs = usable_cpus() if options.jobs is None else options.jobs
        self._agenda = _Agenda(self._steps)
        self._space = _Space()
        self._under_way: set[int] = set()
        self._failed = False
        self._looked = time.monotonic()
        known = len(plan.steps) - len(self._steps)
        self._done = Tally(known, len(plan.steps), 0, plan.weight)

    def run(self) -> None:
        """Do all steps that there are, as far as nothing stops it."""
        for step in self._plan.steps:
            if step.state is not State.READY:
                self._end(step)
        self.watch.progress(self._done)
        with self._pool() as pool:
            while self._agenda.left and not self._is_over:
                self._turn(pool)
            self._wind_up(pool)

    def _pool(self) -> Pool:
        copy_options = self._options.copy_options
        # Each process keeps its share of a limit, whatever image it is at.
        each = replace(copy_options, rate=share_of(copy_options.rate, self._jobs))
        work = _ImageJobs(replace(self._options, jobs=0, copy_options=each))
        # Fault rules are for workers, and so are limits: this process would exceed them.
        part = ParentRole.NONE if faults.armed or copy_options.rate else ParentRole.FIRST
        # Once more would hold what a job has left behind against itself, and find it as it was.
        tries = 1 if self._verifies else TRIES
        return Pool(
            work,
            self._jobs,
            parent_role=part,
            tries=tries,
            rate=copy_options.rate,
            stopping=self._hooks.stopping,
        )

    @property
    def _is_over(self) -> bool:
        """Whether nothing more is to be begun."""
        return self._hooks.stopping() or (self._failed and self._stops_at_error)

    def _turn(self, pool: Pool) -> None:
        """Begin what may begin, and take note of what has come to its end."""
        self._look_again()
        large = self._lone_one() if self._verifies else None
        if large is None:
            pool.add(list(self._small_ones()))
        if not self._verifies:
            large = self._large_one()
        if large is not None:
            self._begin(large)
            self._finish(large, self._split(self._steps[large], pool))
        self._take_all(pool)
        self.watch.progress(self._done)

    def _large_one(self) -> int | None:
        """A large image that may begin."""
        return self._agenda.next(large=True, fits=self._space.fits)

    def _lone_one(self) -> int | None:
        """The same, where it is read back: such a one has the disk to itself."""
        return None if self._under_way else self._large_one()

    def _small_ones(self) -> Iterator[Task]:
        """As many tasks as keep all processes busy for a while."""
        while len(self._under_way) < AHEAD * max(1, self._jobs):
            number = self._agenda.next(large=False, fits=self._space.fits)
            if number is None:
                return
            self._begin(number)
            step = self._steps[number]
            yield _Whole(number, 0, 1, max(LEAST, step.weight), step.image_job)

    def _begin(self, number: int) -> None:
        step = self._steps[number]
        around = self._plan.dependency_index.around(step.named, as_backing=step.written > 1)
        step.image_job = replace(step.image_job, around=around)
        self._under_way.add(number)
        self._space.reserve(step)
        self.watch.begun(step)

    def _look_again(self) -> None:
        if time.monotonic() - self._looked >= LOOK_AGAIN:
            self._plan.dependency_index.refresh()
            self._looked = time.monotonic()

    def _split(self, step: Step, pool: Pool) -> Report | AddcowError:
        """Do a large image here, its tasks by all processes."""
        before = self._done

        def progress(done: int, total: int) -> None:
            part = step.weight * done // max(1, total)
            self.watch.progress(replace(before, bytes_done=before.bytes_done + part))

        # What is lent keeps files mapped until each process has let go of it, and a file that is
        # to be read back must not be: such a job has processes of its own.
        crew = None if self._verifies else pool
        try:
            return step.image_job.run(self._options, replace(self._hooks, progress=progress), crew)
        except UnstartedError:
            raise
        except AddcowError as error:
            return error.without_traceback()

    # What has become of a step

    def _take_all(self, pool: Pool) -> None:
        for result in pool.step():
            number = result.task.number
            if isinstance(result, Done):
                self._finish(number, result.result)
            elif pool.was_retried(result.task) and _is_discarded(self._steps[number]):
                self._finish(number, _finished_discard(self._steps[number]))
            else:
                self._finish(number, result.error)

    def _finish(self, number: int, outcome: Report | AddcowError) -> None:
        step = self._steps[number]
        self._under_way.discard(number)
        self._space.reserve(step, -1)
        self._agenda.finish(number)
        if isinstance(outcome, Report):
            step.state, step.report = State.DONE, outcome
            if step.image_job.discard:
                self._plan.dependency_index.remove(step.named)
        else:
            step.state, step.problem = _state_after(outcome.report), outcome
            step.report = outcome.report if step.state is not State.REFUSED else None
        before = self._done
        self._done = replace(
            before,
            images_done=before.images_done + 1,
            bytes_done=before.bytes_done + step.weight,
        )
        self._end(step)

    def _end(self, step: Step) -> None:
        self._failed = self._failed or step.state in (State.FAILED, State.REFUSED)
        self.watch.ended(step)

    def _wind_up(self, pool: Pool) -> None:
        """Let nothing more begin, and wait for what is under way."""
        if self._hooks.stopping():
            pool.stop()
        for task in pool.drop_waiting():
            self._under_way.discard(task.number)
        while self._under_way:
            self._take_all(pool)


def _is_discarded(step: Step) -> bool:
    """Whether a worker that died had removed the overlay already: the last thing that it does."""
    return step.image_job.discard and not os.path.exists(step.path)


def _finished_discard(step: Step) -> Report | AddcowError:
    try:
        sync_directory(os.path.realpath(step.path))
    except AddcowError as error:
        return error.without_traceback()
    return Report(step.image_job.operation, step.path)


def _state_after(report: Report | None) -> State:
    """What a job that ended with an error says of itself; one that died says nothing."""
    if report is None:
        return State.FAILED
    if report.stopped:
        return State.STOPPED
    return State.REFUSED if report.reach is Reach.LOOKING else State.FAILED
