"""The plan: what would be done with every image of a farm, in which order, and what is refused.

Deepest chains first: an overlay comes before its backing file. Commits then run down a chain to
its raw base, each image taking along what those above it have brought; flattened overlays, and
discarded ones, have nobody above them any more. An image is refused for what its own job would be
refused for, a sibling that needs the same backing file, say; that ends the image, not the farm.

Space is counted for the farm as a whole, in that order and for each file system: what an image
takes while it is worked on must be free after all that those before it keep, and have given back.
An image that does not fit is refused, and later ones that fit are not. What a commit into an
overlay brings there is counted again at its next stop, as if it met nothing but holes: at most so
much is needed.

Nothing is changed; every image is opened for reading, and looked at by the engine's pool.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity, Named, Unexamined
from addcow_mp.device.files import free_bytes
from addcow_mp.engine.scan import ScanHooks, ScanOptions, scan
from addcow_mp.engine.space import SpaceNeeded
from addcow_mp.engine.tasks import Task, equal_tasks
from addcow_mp.engine.worker import Failed, WorkerContext
from addcow_mp.errors import AddcowError, DependantsError, FileError, SpaceError
from addcow_mp.farm.dependency_index import DependencyIndex
from addcow_mp.farm.graph import Graph
from addcow_mp.farm.image_job import ImageJob, Operation
from addcow_mp.farm.places import Found, files_of, in_order
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.jobs.report import Estimate, Report

#: Images in one task of looking: each takes half a millisecond.
BATCH = 32


class State(StrEnum):
    """What the plan says of an image, or what has become of it."""

    READY = "ready"
    IDLE = "nothing-to-do"
    REFUSED = "refused"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    LEFT = "not-begun"


@dataclass
class Step:
    """One image. ``space`` is the space that its job takes, with what others bring to it.

    ``chain``: the files of its chain from the ``.add-cow`` file down, of which ``written`` change.
    """

    named: Named
    image_job: ImageJob
    depth: int
    chain: tuple[Identity, ...]
    written: int
    state: State = State.IDLE
    estimate: Estimate | None = None
    space: SpaceNeeded = field(default_factory=SpaceNeeded)
    weight: int = 0
    problem: AddcowError | None = None
    report: Report | None = None

    @property
    def path(self) -> str:
        """The overlay that it is about."""
        return self.named.path

    def refuse(self, problem: AddcowError) -> None:
        """Let nothing be done with this image."""
        self.state, self.problem = State.REFUSED, problem


@dataclass(frozen=True)
class FileSystem:
    """Space on one file system, in bytes: free now, the most that is taken, what remains taken."""

    path: str
    free: int
    peak: int
    kept: int


@dataclass
class Plan:
    """All steps in their order, and what they need."""

    operation: Operation
    steps: list[Step]
    dependency_index: DependencyIndex
    access: Access
    places: Found
    filesystems: list[FileSystem] = field(default_factory=list)
    is_carried_out: bool = False

    def count(self, state: State) -> int:
        """How many images are in this state."""
        return sum(1 for step in self.steps if step.state is state)

    @property
    def unexamined(self) -> list[Unexamined]:
        """What could not be looked at."""
        return self.places.unexamined

    @property
    def weight(self) -> int:
        """About how many bytes there are to move."""
        return sum(step.weight for step in self.steps if step.state is State.READY)


def plan(
    places: Iterable[str],
    operation: Operation,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    *,
    discard: bool = False,
    verifies: bool = False,
) -> Plan:
    """What ``operation`` on all overlays in ``places`` would do, and whether it ``verifies``.

    Raises :class:`ImageError` when none of the places is there, :class:`RestartsError` when
    ``hooks`` stops it.
    """
    found = files_of(places, options.access)
    access = found.access
    dependency_index = DependencyIndex(found.files, access)
    found.unexamined = in_order((*found.unexamined, *dependency_index.unexamined))
    overlays = frozenset(one.identity for one in dependency_index.farm)
    wanted = _Wanted(operation, discard, verifies, overlays)
    steps = [_step(one, wanted, dependency_index) for one in dependency_index.farm]
    steps.sort(key=lambda step: (-step.depth, step.path))
    options = replace(options, access=access)
    for step, estimate_of in zip(steps, _foreseen(steps, options, hooks), strict=True):
        _enter(step, estimate_of)
    made = Plan(operation, steps, dependency_index, access, found)
    made.filesystems = _Accounts(steps, options).settle()
    return made


class _Wanted(NamedTuple):
    """What is to be done, and with which overlays."""

    operation: Operation
    discard: bool
    verifies: bool
    overlays: frozenset[Identity]


def _step(named: Named, wanted: _Wanted, dependency_index: DependencyIndex) -> Step:
    commits = wanted.operation is Operation.COMMIT
    # Those above are gone by then; if one is not, its step says so, and the accounts below.
    leaving = wanted.overlays if wanted.discard else frozenset()
    around = dependency_index.around(named, as_backing=commits, leaving=leaving)
    image_job = ImageJob(
        named.path,
        wanted.operation,
        around,
        discard=wanted.discard,
        verifies=wanted.verifies,
    )
    chain = tuple(_chain(named, dependency_index.graph))
    return Step(named, image_job, len(chain), chain, written=2 if commits else 1)


def _chain(named: Named, graph: Graph[Named]) -> Iterator[Identity]:
    """The files of a chain, down to a raw file or to where a cycle closes."""
    chain = list(graph.chain(named))
    yield from (one.identity for one in chain)
    base = chain[-1].backing
    if base is not None and graph.below(chain[-1]) is None:
        yield base


def _enter(step: Step, estimate_of: Estimate | AddcowError | None) -> None:
    if isinstance(estimate_of, AddcowError):
        step.refuse(estimate_of)
    elif estimate_of is not None:
        step.state, step.estimate = State.READY, estimate_of
        step.space, step.weight = estimate_of.space, estimate_of.weight


# Looking at each image


class _Estimates:
    """The work of a task: what the errands ``[first, stop)`` would do."""

    def __init__(self, image_jobs: list[ImageJob], options: RunOptions) -> None:
        self.image_jobs = image_jobs
        self.options = options

    def __reduce__(self) -> tuple[object, ...]:
        return (_Estimates, (self.image_jobs, self.options))

    def __call__(self, task: Task, worker: WorkerContext) -> list[Estimate | AddcowError | None]:  # noqa: ARG002
        return [estimate_of(one, self.options) for one in self.image_jobs[task.first : task.stop]]


def estimate_of(image_job: ImageJob, options: RunOptions) -> Estimate | AddcowError | None:
    """What ``image_job`` would do, or why it would be refused."""
    try:
        return image_job.estimate(options)
    except AddcowError as error:
        return error.without_traceback()


def _foreseen(
    steps: list[Step], options: RunOptions, hooks: Hooks
) -> list[Estimate | AddcowError | None]:
    count = len(steps)
    tasks = equal_tasks(count, BATCH)

    def failed(result: Failed) -> list[AddcowError]:
        """When a worker died, nothing is known of its images."""
        return [result.error] * result.task.weight

    scan_hooks = ScanHooks(f"{count} images", failed, hooks.stopping)
    work = _Estimates([step.image_job for step in steps], options)
    scan_options = ScanOptions(options.jobs, counts=True)
    found = {task.number: some for task, some in scan(work, tasks, scan_options, scan_hooks)}
    return [one for task in tasks for one in found[task.number]]


# Counting space


class _Accounts:
    """The space of every file system that is written to, as the steps go by."""

    def __init__(self, steps: list[Step], options: RunOptions) -> None:
        self._steps = steps
        self._options = options
        self._by_identity = {step.named.identity: step for step in steps}
        #: Paths of overlays that are not discarded, by what they stand on.
        self._staying: dict[Identity, list[str]] = {}
        #: Bytes that steps so far bring into each overlay.
        self._brought: dict[Identity, int] = {}
        self._paths: dict[int, str] = {}
        self._free: dict[int, int] = {}
        self._taken: Counter[int] = Counter()
        self._peak: Counter[int] = Counter()

    def settle(self) -> list[FileSystem]:
        """Refuse the steps that do not fit; what the others take of each file system."""
        for step in self._steps:
            self._refuse_while_needed(step)
            self._receive(step)
            if step.state is State.READY and step.estimate is not None:
                self._take(step, step.estimate)
            self._leave(step)
        return [
            FileSystem(path, self._free[device], self._peak[device], self._taken[device])
            for device, path in self._paths.items()
        ]

    def _refuse_while_needed(self, step: Step) -> None:
        """An overlay is not discarded while one stands on it that will not be."""
        needing = self._staying.get(step.named.identity)
        if needing and step.state is State.READY and not self._options.access.force:
            remedy = "repair or remove them first, or leave --discard out"
            names = ", ".join(sorted(needing))
            step.refuse(DependantsError(path=step.path, dependants=names, remedy=remedy))

    def _leave(self, step: Step) -> None:
        """Take note of an overlay that stays, for the one that it stands on."""
        if step.image_job.discard and step.state is not State.READY and step.named.backing:
            self._staying.setdefault(step.named.backing, []).append(step.path)

    def _receive(self, step: Step) -> None:
        """Count what deeper ones bring here; an overlay that was idle has something to do then."""
        brought = self._brought.get(step.named.identity)
        if brought is None:
            return
        if step.state is State.IDLE:
            step.image_job = replace(step.image_job, receives=True)
            _enter(step, estimate_of(step.image_job, self._options))
        if step.estimate is not None:
            peak, kept, freed = step.space.peak, step.space.kept, step.space.freed
            freed += brought if step.estimate.gives_back else 0
            step.space = SpaceNeeded(peak + brought, kept + brought, freed)
            step.weight += brought

    def _take(self, step: Step, estimate: Estimate) -> None:
        device, space = estimate.device, step.space
        if device not in self._free:
            try:
                self._free[device] = free_bytes(os.statvfs(estimate.target))
            except OSError as error:
                step.refuse(FileError.of(estimate.target, "look at its file system", error))
                return
            self._paths[device] = estimate.target
        taken = self._taken[device]
        left = self._free[device] - taken
        if space.peak > left:
            step.refuse(SpaceError(path=estimate.target, needed=space.peak, free=max(0, left)))
            return
        self._peak[device] = max(self._peak[device], taken + space.peak)
        self._taken[device] = taken + space.kept - space.freed
        if step.image_job.operation is Operation.COMMIT:
            self._brought[step.chain[1]] = self._brought.get(step.chain[1], 0) + space.kept
