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
from addcow_mp.device.discovery import Unexamined
from addcow_mp.device.files import free_bytes
from addcow_mp.engine.plan import Task, parcels
from addcow_mp.engine.pool import Done, Failed, Part, Pool, usable_cpus
from addcow_mp.engine.space import Room
from addcow_mp.errors import AddcowError, BeginsAnewError, DependantsError, FileError, SpaceError
from addcow_mp.farm.errand import Errand, Operation
from addcow_mp.farm.neighbours import Neighbours
from addcow_mp.farm.places import Found, files_of, in_order
from addcow_mp.jobs.dependants import Identity, Named
from addcow_mp.jobs.report import Conduct, Prospect, Report

#: Images in one task of looking: each takes half a millisecond.
PARCEL = 32


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
    """One image. ``room`` is the space that its job takes, with what others bring to it.

    ``chain``: the files of its chain from the ``.add-cow`` file down, of which ``written`` change.
    """

    named: Named
    errand: Errand
    depth: int
    chain: tuple[Identity, ...]
    written: int
    state: State = State.IDLE
    prospect: Prospect | None = None
    room: Room = field(default_factory=Room)
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
    neighbours: Neighbours
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
    conduct: Conduct | None = None,
    *,
    discard: bool = False,
    verifies: bool = False,
) -> Plan:
    """What ``operation`` on all overlays in ``places`` would do, and whether it ``verifies``.

    Raises :class:`ImageError` when none of the places is there, :class:`BeginsAnewError` when
    ``conduct`` stops it.
    """
    conduct = conduct or Conduct()
    found = files_of(places, conduct.access)
    access = found.access
    neighbours = Neighbours(found.files, access)
    found.unexamined = in_order((*found.unexamined, *neighbours.unexamined))
    overlays = frozenset(one.identity for one in neighbours.farm)
    wanted = _Wanted(operation, discard, verifies, overlays)
    steps = [_step(one, wanted, neighbours) for one in neighbours.farm]
    steps.sort(key=lambda step: (-step.depth, step.path))
    conduct = replace(conduct, access=access)
    for step, outlook in zip(steps, _foreseen(steps, conduct), strict=True):
        _enter(step, outlook)
    made = Plan(operation, steps, neighbours, access, found)
    made.filesystems = _Accounts(steps, conduct).settle()
    return made


class _Wanted(NamedTuple):
    """What is to be done, and with which overlays."""

    operation: Operation
    discard: bool
    verifies: bool
    overlays: frozenset[Identity]


def _step(named: Named, wanted: _Wanted, neighbours: Neighbours) -> Step:
    commits = wanted.operation is Operation.COMMIT
    # Those above are gone by then; if one is not, its step says so, and the accounts below.
    leaving = wanted.overlays if wanted.discard else frozenset()
    around = neighbours.around(named, as_backing=commits, leaving=leaving)
    errand = Errand(
        named.path,
        wanted.operation,
        around,
        discard=wanted.discard,
        verifies=wanted.verifies,
    )
    chain = tuple(_chain(named, neighbours))
    return Step(named, errand, len(chain), chain, written=2 if commits else 1)


def _chain(named: Named, neighbours: Neighbours) -> Iterator[Identity]:
    """The files of a chain, each by the one that a name means; a circle is gone round once."""
    seen: set[Identity] = set()
    here: Named | None = named
    last: Identity | None = named.identity
    while here is not None and here.identity not in seen:
        seen.add(here.identity)
        yield here.identity
        last, here = here.backing, neighbours.below(here)
    if here is None and last is not None:
        yield last


def _enter(step: Step, outlook: Prospect | AddcowError | None) -> None:
    if isinstance(outlook, AddcowError):
        step.refuse(outlook)
    elif outlook is not None:
        step.state, step.prospect = State.READY, outlook
        step.room, step.weight = outlook.room, outlook.weight


# Looking at each image


class _Outlooks:
    """The work of a task: what the errands ``[first, stop)`` would do."""

    def __init__(self, errands: list[Errand], conduct: Conduct) -> None:
        self.errands = errands
        self.conduct = conduct

    def __reduce__(self) -> tuple[object, ...]:
        plain = Conduct(access=self.conduct.access, manner=self.conduct.manner)
        return (_Outlooks, (self.errands, plain))

    def __call__(self, task: Task, slot: int) -> list[Prospect | AddcowError | None]:  # noqa: ARG002
        return [outlook(one, self.conduct) for one in self.errands[task.first : task.stop]]


def outlook(errand: Errand, conduct: Conduct) -> Prospect | AddcowError | None:
    """What ``errand`` would do, or why it would be refused."""
    try:
        return errand.foresee(conduct)
    except AddcowError as error:
        return error.kept()


def _foreseen(steps: list[Step], conduct: Conduct) -> list[Prospect | AddcowError | None]:
    count = len(steps)
    tasks = parcels(count, PARCEL)
    found: dict[int, list[Prospect | AddcowError | None]] = {}
    jobs = usable_cpus() if conduct.jobs is None else conduct.jobs
    work = _Outlooks([step.errand for step in steps], conduct)
    with Pool(work, jobs, part=Part.FIRST) as pool:
        for result in pool.run(tasks, conduct.stopping):
            if result is not None:
                found[result.task.number] = _of(result)
    if len(found) < len(tasks):
        raise BeginsAnewError(path=f"{count} images")
    return [one for task in tasks for one in found[task.number]]


def _of(result: Done | Failed) -> list[Prospect | AddcowError | None]:
    """What came of a task; when its worker died, nothing is known of its images."""
    if isinstance(result, Failed):
        return [result.error] * result.task.weight
    outlooks: list[Prospect | AddcowError | None] = result.result
    return outlooks


# Counting space


class _Accounts:
    """The space of every file system that is written to, as the steps go by."""

    def __init__(self, steps: list[Step], conduct: Conduct) -> None:
        self._steps = steps
        self._conduct = conduct
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
            if step.state is State.READY and step.prospect is not None:
                self._take(step, step.prospect)
            self._leave(step)
        return [
            FileSystem(path, self._free[device], self._peak[device], self._taken[device])
            for device, path in self._paths.items()
        ]

    def _refuse_while_needed(self, step: Step) -> None:
        """An overlay is not discarded while one stands on it that will not be."""
        needing = self._staying.get(step.named.identity)
        if needing and step.state is State.READY and not self._conduct.access.force:
            mend = "mend or remove them first, or leave --discard out"
            names = ", ".join(sorted(needing))
            step.refuse(DependantsError(path=step.path, dependants=names, mend=mend))

    def _leave(self, step: Step) -> None:
        """Take note of an overlay that stays, for the one that it stands on."""
        if step.errand.discard and step.state is not State.READY and step.named.backing:
            self._staying.setdefault(step.named.backing, []).append(step.path)

    def _receive(self, step: Step) -> None:
        """Count what deeper ones bring here; an overlay that was idle has something to do then."""
        brought = self._brought.get(step.named.identity)
        if brought is None:
            return
        if step.state is State.IDLE:
            step.errand = replace(step.errand, receives=True)
            _enter(step, outlook(step.errand, self._conduct))
        if step.prospect is not None:
            peak, kept, freed = step.room.peak, step.room.kept, step.room.freed
            freed += brought if step.prospect.gives_back else 0
            step.room = Room(peak + brought, kept + brought, freed)
            step.weight += brought

    def _take(self, step: Step, prospect: Prospect) -> None:
        device, room = prospect.device, step.room
        if device not in self._free:
            try:
                self._free[device] = free_bytes(os.statvfs(prospect.target))
            except OSError as error:
                step.refuse(FileError.of(prospect.target, "look at its file system", error))
                return
            self._paths[device] = prospect.target
        taken = self._taken[device]
        left = self._free[device] - taken
        if room.peak > left:
            step.refuse(SpaceError(path=prospect.target, needed=room.peak, free=max(0, left)))
            return
        self._peak[device] = max(self._peak[device], taken + room.peak)
        self._taken[device] = taken + room.kept - room.freed
        if step.errand.operation is Operation.COMMIT:
            self._brought[step.chain[1]] = self._brought.get(step.chain[1], 0) + room.kept
