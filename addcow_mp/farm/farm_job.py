"""A farm job: commit, flatten, rebase or reset every overlay of a farm.

It makes a plan, asks the scheduler which steps may begin, gives these to the executor, and collects
the results. An image that is refused or fails ends alone; the other images continue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace

from addcow_mp.engine.fd_passing import UnstartedError
from addcow_mp.engine.stop_flag import never
from addcow_mp.errors import AddcowError, StoppedError, TimeLimitError
from addcow_mp.farm.dependency_index import REFRESH_SECONDS
from addcow_mp.farm.executor import Executor, Finished, PoolExecutor
from addcow_mp.farm.image_job import JobSpec
from addcow_mp.farm.plan import Plan, State, Step, plan
from addcow_mp.farm.result import FarmResult, ImageResult
from addcow_mp.farm.scheduler import Scheduler
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions


@dataclass(frozen=True)
class FarmJob:
    """``spec`` for every image.

    ``is_dry_run``: only make the plan. ``is_late``: once it returns true, begin no image, and stop
    those that run.
    """

    spec: JobSpec
    is_dry_run: bool = False
    is_late: Callable[[], bool] = never


Engine = Callable[[RunOptions, Hooks, JobSpec], Executor]
"""Makes the executor of a farm job."""

Event = Plan | Step | ImageResult | FarmResult
"""The plan before it is carried out, a step that begins, the result of an image, and of all."""


def ignore(_: Event) -> None:
    """Handle no event."""


def run_farm_job(
    places: Iterable[str],
    job: FarmJob,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    log: Callable[[Event], None] = ignore,
    engine: Engine = PoolExecutor,
) -> FarmResult:
    """Run ``job`` on all overlays in ``places`` with the executor that ``engine`` makes.

    ``log`` is called with each event.

    Raises :class:`ImageError` when none of the places exists, :class:`RestartsError` when ``hooks``
    stop it before the plan is made.
    """
    # The plan has no time limit: it says what is left.
    with hooks.looking():
        made = plan(places, job.spec, options, hooks)
    with closing(made):
        return _carried_out(made, job, options, hooks, log, engine)


def _carried_out(
    made: Plan,
    job: FarmJob,
    options: RunOptions,
    hooks: Hooks,
    log: Callable[[Event], None],
    engine: Engine,
) -> FarmResult:
    if job.is_dry_run:
        return FarmResult(made, tuple(map(ImageResult.planned, made.steps)), is_carried_out=False)
    log(made)
    if made.rebasing is not None:
        made.rebasing.make_durable()
    run = _Run(made, job, replace(options, access=made.access), hooks, log)
    problem: AddcowError | None = None
    try:
        run.carry_out(engine)
    except UnstartedError as error:
        problem = error
    finally:
        result = run.result(problem)
        log(result)
    return result


class _Run:
    """A plan that is being carried out."""

    def __init__(
        self,
        made: Plan,
        job: FarmJob,
        options: RunOptions,
        hooks: Hooks,
        log: Callable[[Event], None],
    ) -> None:
        self._plan = made
        self._job = job
        self._options = options
        self._hooks = hooks
        self._log = log
        self._results: dict[int, ImageResult] = {}
        self._refreshed = time.monotonic()
        self._bytes_done = 0

    def carry_out(self, engine: Engine) -> None:
        """Run all steps, until the job is done or stopped."""
        job, steps = self._job, self._plan.steps
        hooks = replace(self._hooks, progress=self._show, stopping=self._is_stopping)
        executor = engine(self._options, hooks, job.spec)
        scheduler = Scheduler(
            {number: step for number, step in enumerate(steps) if step.state is State.READY},
            executor.capacity,
            verifies=job.spec.verifies,
            stops_at_error=job.spec.stops_at_error,
        )
        try:
            self._record_planned(scheduler)
            while scheduler.is_active and not self._is_stopping():
                self._begin(scheduler, executor)
                self._collect(executor.finished(), scheduler)
                self._show()
            scheduler.drop(executor.stop(interrupt=self._is_stopping()))
            while scheduler.is_running:
                self._collect(executor.finished(), scheduler)
                scheduler.drop(executor.stop(interrupt=self._is_stopping()))
        finally:
            executor.close()

    def result(self, problem: AddcowError | None) -> FarmResult:
        """The results of all images; those that have none were not begun."""
        for number, step in enumerate(self._plan.steps):
            if number not in self._results:
                self._record(number, ImageResult(step, State.LEFT))
        images = tuple(self._results[number] for number in range(len(self._plan.steps)))
        return FarmResult(self._plan, images, problem=problem or self._what_stopped_it(images))

    def _is_stopping(self) -> bool:
        return self._hooks.stopping() or self._job.is_late()

    def _record_planned(self, scheduler: Scheduler) -> None:
        """Record the images that have nothing to do or are refused."""
        for number, step in enumerate(self._plan.steps):
            if step.state is not State.READY:
                self._record(number, ImageResult.planned(step))
                if step.state in (State.REFUSED, State.LENT):
                    scheduler.fail()
        self._show()

    def _begin(self, scheduler: Scheduler, executor: Executor) -> None:
        index = self._plan.dependency_index
        if time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            index.refresh()
            self._refreshed = time.monotonic()
        for number in scheduler.startable():
            step = self._plan.steps[number]
            nearby = index.around(step.named, as_backing=step.commits)
            self._log(step)
            executor.submit(number, replace(step.image_job, nearby=nearby), step.weight)

    def _collect(self, ended: list[Finished], scheduler: Scheduler) -> None:
        for number, outcome in ended:
            step = self._plan.steps[number]
            image = ImageResult.of(step, outcome)
            if image.state is State.DONE and step.image_job.spec.discard:
                self._plan.dependency_index.graph.remove_user(step.named)
            self._record(number, image)
            scheduler.finish(number, failed=image.has_failed)

    def _record(self, number: int, image: ImageResult) -> None:
        self._results[number] = image
        self._bytes_done += image.step.weight if image.step.state is State.READY else 0
        self._log(image)

    def _show(self, more: int = 0, _: int = 0) -> None:
        """Show the progress, with ``more`` bytes of the large image that is running."""
        self._hooks.progress(self._bytes_done + more, self._plan.weight)
        self._hooks.counted(len(self._results), len(self._plan.steps))

    def _what_stopped_it(self, images: tuple[ImageResult, ...]) -> AddcowError | None:
        """Why images are left; None if none is, or their own errors say it."""
        left = [image for image in images if image.state in (State.STOPPED, State.LEFT)]
        if not left:
            return None
        done = sum(image.lacks_verifying for image in left)
        named = f"{len(left) - done} of {len(images)} images left"
        named += f", {done} done and not verified" if done else ""
        if self._hooks.stopping():
            return StoppedError(path=named)
        if self._job.is_late():
            what = "the time limit was reached; finished work is kept, the same command continues"
            return TimeLimitError(message=f"{named}: {what} from there")
        return None
