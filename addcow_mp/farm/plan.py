"""The plan of a farm job: what is done with every image, in which order, and what is refused.

Deepest chains come first, so an overlay comes before its backing file. Commits run down a chain to
its raw base: each image also receives what the images above it commit. A flattened or discarded
overlay has no overlays above it any more. Only leaves are reset: a layer that others stand on is
refused. An image is refused for the same reasons as in a job of
its own, such as a sibling that needs the same backing file. A refusal ends the image, not the farm.

Space is counted for the whole farm, in this order and for each file system: what an image needs
must be free after what earlier images keep and give back. An image that does not fit is refused;
later ones that fit are not. Clusters that are committed into an overlay are counted again when it
is committed itself, as if they went into holes: at most so much space is needed.

Nothing is changed. The engine's processes open every image for reading.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity, Named, Unexamined
from addcow_mp.device.files import free_bytes
from addcow_mp.engine.scan import ScanHooks, ScanOptions, scan
from addcow_mp.engine.space import SpaceNeeded
from addcow_mp.engine.tasks import Task, equal_tasks
from addcow_mp.engine.worker import Failed, WorkerContext
from addcow_mp.errors import AddcowError, DependantsError, FileError, LentError, SpaceError
from addcow_mp.farm.dependency_index import DependencyIndex
from addcow_mp.farm.graph import Graph
from addcow_mp.farm.image_job import ImageJob, JobSpec, Operation
from addcow_mp.farm.places import Found, files_of, in_order
from addcow_mp.farm.plain import NotPlainError
from addcow_mp.farm.quick_estimate import QuickEstimates
from addcow_mp.farm.rebasing import Rebasing
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.jobs.report import Estimate

#: Images in one task: an estimate takes half a millisecond.
BATCH = 32


class State(StrEnum):
    """The state of an image, in the plan and afterwards."""

    READY = "ready"
    IDLE = "nothing-to-do"
    REFUSED = "refused"
    LENT = "lent"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    LEFT = "not-begun"


def refused_state(problem: AddcowError) -> State:
    """The state of an image that is not worked on because of ``problem``."""
    return State.LENT if isinstance(problem, LentError) else State.REFUSED


@dataclass(frozen=True)
class Step:
    """The plan for one image.

    ``chain``: the files of its chain from the ``.add-cow`` file down. ``space`` and ``weight``
    include what other images commit into it. ``problem``: why it is refused.
    """

    named: Named
    image_job: ImageJob
    chain: tuple[Identity, ...]
    estimate: Estimate | None = None
    space: SpaceNeeded = SpaceNeeded()  # noqa: RUF009 - frozen
    weight: int = 0
    problem: AddcowError | None = None

    @property
    def path(self) -> str:
        """The path of the overlay."""
        return self.named.path

    @property
    def commits(self) -> bool:
        """Whether the image is committed into its backing file, which changes both."""
        return self.image_job.spec.operation is Operation.COMMIT

    @property
    def written(self) -> tuple[Identity, ...]:
        """The files of the chain that change."""
        return self.chain[: 2 if self.commits else 1]

    @property
    def state(self) -> State:
        """READY, IDLE, REFUSED, or LENT where QEMU uses the image."""
        if self.problem is not None:
            return refused_state(self.problem)
        return State.IDLE if self.estimate is None else State.READY


@dataclass(frozen=True)
class FileSystem:
    """Space on one file system, in bytes: free now, needed at most, and taken in the end."""

    path: str
    free: int
    peak: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Plan:
    """All steps in order, and the space that they need."""

    spec: JobSpec
    steps: tuple[Step, ...]
    filesystems: tuple[FileSystem, ...]
    dependency_index: DependencyIndex
    access: Access
    places: Found
    rebasing: Rebasing | None = None

    @property
    def unexamined(self) -> list[Unexamined]:
        """What could not be examined."""
        return self.places.unexamined

    def close(self) -> None:
        """Close what the plan holds open."""
        if self.rebasing is not None:
            self.rebasing.close()

    @cached_property
    def weight(self) -> int:
        """About how many bytes there are to move."""
        return sum(step.weight for step in self.steps if step.state is State.READY)


def plan(
    places: Iterable[str], spec: JobSpec, options: RunOptions = DEFAULTS, hooks: Hooks = NO_HOOKS
) -> Plan:
    """The plan of ``spec`` for all overlays in ``places``; that of a rebase holds both bases open.

    Raises :class:`ImageError` when none of the places exists, :class:`RestartsError` when
    ``hooks`` stop it.
    """
    found = files_of(places, options.access)
    options = replace(options, access=found.access)
    index = DependencyIndex(found.files, found.access)
    found.unexamined = in_order((*found.unexamined, *index.unexamined))
    rebasing = None
    if spec.operation is Operation.REBASE:
        rebasing = Rebasing(index.farm, spec, options, hooks)
    steps = sorted(_steps(spec, index, rebasing), key=lambda step: (-len(step.chain), step.path))
    accounts = _Accounts(options)
    settled = tuple(map(accounts.settle, _estimated(steps, options, hooks)))
    filesystems = tuple(accounts.filesystems.values())
    return Plan(spec, settled, filesystems, index, found.access, found, rebasing)


def _steps(spec: JobSpec, index: DependencyIndex, rebasing: Rebasing | None) -> Iterator[Step]:
    if rebasing is not None:
        for named in rebasing.overlays:
            yield _step(named, rebasing.spec_for(named), index)
        return
    commits = spec.operation is Operation.COMMIT
    # A discarded overlay's own overlays are discarded before; the accounts refuse it otherwise.
    leaving = {one.identity for one in index.farm} if spec.discard else set()
    for named in index.farm:
        yield _step(named, spec, index, leaving, as_backing=commits)


def _step(
    named: Named,
    spec: JobSpec,
    index: DependencyIndex,
    leaving: Collection[Identity] = (),
    *,
    as_backing: bool = False,
) -> Step:
    nearby = index.around(named, as_backing=as_backing, leaving=leaving)
    chain = tuple(_chain(named, index.graph))
    return Step(named, ImageJob(named.path, spec, nearby, layers=len(chain)), chain)


def _chain(named: Named, graph: Graph[Named]) -> Iterator[Identity]:
    """The files of a chain, down to a raw file or to where a cycle closes."""
    chain = list(graph.chain(named))
    yield from (one.identity for one in chain)
    base = chain[-1].backing
    if base is not None and graph.below(chain[-1]) is None:
        yield base


# Estimates


class _Estimates:
    """The work of a task: estimates of the image jobs ``[first, stop)``."""

    def __init__(self, image_jobs: list[ImageJob], options: RunOptions) -> None:
        self.image_jobs = image_jobs
        self.options = options
        self._quick_estimates = QuickEstimates(options)

    def __call__(self, task: Task, worker: WorkerContext) -> list[Estimate | AddcowError | None]:  # noqa: ARG002
        return [self._estimate(one) for one in self.image_jobs[task.first : task.stop]]

    def _estimate(self, image_job: ImageJob) -> Estimate | AddcowError | None:
        try:
            return self._quick_estimates.of(image_job)
        except NotPlainError:
            return image_job.estimate(self.options)


def _estimated(steps: list[Step], options: RunOptions, hooks: Hooks) -> Iterator[Step]:
    def failed(result: Failed) -> list[AddcowError]:
        """The answer for images whose worker process died."""
        return [result.error] * result.task.weight

    tasks = equal_tasks(len(steps), BATCH)
    work = _Estimates([step.image_job for step in steps], options)
    scan_hooks = ScanHooks(f"{len(steps)} images", failed, hooks.stopping)
    scan_options = ScanOptions(options.jobs, counts=True)
    found = {task.number: some for task, some in scan(work, tasks, scan_options, scan_hooks)}
    estimates = [one for task in tasks for one in found[task.number]]
    yield from map(_with_estimate, steps, estimates)


def _with_estimate(step: Step, estimate: Estimate | AddcowError | None) -> Step:
    if isinstance(estimate, AddcowError):
        return replace(step, problem=estimate)
    if estimate is None:
        return step
    return replace(step, estimate=estimate, space=estimate.space, weight=estimate.weight)


# Space


class _Accounts:
    """The space on every file system that is written to, as steps are settled in order."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options
        #: Paths of overlays that are not discarded, by their backing files.
        self._staying: dict[Identity, list[str]] = {}
        #: Bytes that earlier steps commit into each overlay.
        self._received: Counter[Identity] = Counter()
        #: The space that the settled steps need, by device.
        self.filesystems: dict[int, FileSystem] = {}

    def settle(self, step: Step) -> Step:
        """The final form of the next step: refused if it is still needed or does not fit."""
        step = self._with_received(self._refused_while_needed(step))
        if step.estimate is not None and step.state is State.READY:
            step = self._with_space(step, step.estimate)
        backing = step.named.backing
        if step.image_job.spec.discard and step.state is not State.READY and backing is not None:
            self._staying.setdefault(backing, []).append(step.path)
        return step

    def _refused_while_needed(self, step: Step) -> Step:
        """An overlay is not discarded while an overlay above it stays."""
        needing = self._staying.get(step.named.identity)
        if not needing or step.state is not State.READY or self._options.access.force:
            return step
        remedy = "repair or remove them first, or leave --discard out"
        names = ", ".join(sorted(needing))
        return replace(
            step, problem=DependantsError(path=step.path, dependants=names, remedy=remedy)
        )

    def _with_received(self, step: Step) -> Step:
        """Add what earlier steps commit into this overlay; it then has something to do."""
        if step.named.identity not in self._received:
            return step
        received = self._received[step.named.identity]
        if step.state is State.IDLE:
            job = replace(step.image_job, receives=True)
            step = _with_estimate(replace(step, image_job=job), job.estimate(self._options))
        if step.estimate is None:
            return step
        peak, kept, freed = step.space.peak, step.space.kept, step.space.freed
        freed += received if step.estimate.gives_back else 0
        space = SpaceNeeded(peak + received, kept + received, freed)
        return replace(step, space=space, weight=step.weight + received)

    def _with_space(self, step: Step, estimate: Estimate) -> Step:
        """Take the space that ``step`` needs, or refuse it."""
        space, target = step.space, estimate.target
        here = self.filesystems.get(estimate.device)
        if here is None:
            try:
                here = FileSystem(target, free_bytes(os.statvfs(target)))
            except OSError as error:
                problem = FileError.of(target, "look at its file system", error)
                return replace(step, problem=problem)
        self.filesystems[estimate.device] = here
        left = here.free - here.kept
        if space.peak > left:
            full = SpaceError(path=target, needed=space.peak, free=max(0, left))
            return replace(step, problem=full)
        peak, kept = max(here.peak, here.kept + space.peak), here.kept + space.kept - space.freed
        self.filesystems[estimate.device] = replace(here, peak=peak, kept=kept)
        if step.commits:
            self._received[step.chain[1]] += space.kept
        return step
