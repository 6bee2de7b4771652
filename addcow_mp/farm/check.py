"""Farm check: every image of a farm by itself, and then what no image can know of itself.

Each image goes through the checks of :mod:`addcow_mp.jobs.check`, and its report is the same as
if it had been checked alone. Over all of them stand the checks of the *graph*: a file that two
overlays take for their image, an image that is somebody's backing file besides, and circles.

Files are dealt out in parcels to the engine's pool: this process takes part, and others are
started only when there are so many that it pays. There is no process for each image. Most images
are proved clean by a glance (:mod:`addcow_mp.farm.quick_check`); the others get the full check.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity, Named, Unexamined, examined, is_gone, named_by
from addcow_mp.engine.scan import ScanHooks, scan
from addcow_mp.engine.tasks import Task, equal_tasks
from addcow_mp.engine.worker import Failed, WorkerContext
from addcow_mp.farm.graph import Graph
from addcow_mp.farm.places import Found, files_of, without_backups
from addcow_mp.farm.quick_check import NeedsFullCheckError, QuickCheck
from addcow_mp.jobs.check import check
from addcow_mp.jobs.findings import CheckReport, Finding, Severity
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions

#: Files in one task: enough that handing it out costs nothing against it.
BATCH = 128

#: Files for which other processes are started at once: they take longer than to find it out.
MANY = 4096

#: Exit statuses of single images, the worst first.
WORST_FIRST = (2, 1, 3, 0)


class Checked(NamedTuple):
    """An overlay, what is wrong with it, and the files that it names, where that is known."""

    path: str
    named: Named | None
    findings: tuple[Finding, ...] = ()

    @property
    def exit_code(self) -> int:
        """The exit status that the check of this image alone would have."""
        return CheckReport(self.path, list(self.findings)).exit_code if self.findings else 0


@dataclass
class FarmReport:
    """The report of each image, in order of paths, and the findings about the farm as a whole.

    ``places`` are directories, and files that are named, that could not be looked at.
    """

    images: list[Checked] = field(default_factory=list)
    graph: list[Finding] = field(default_factory=list)
    places: list[Checked] = field(default_factory=list)
    found: Found = field(default_factory=lambda: Found(Access()))

    @property
    def all(self) -> list[Checked]:
        """Images and places."""
        return [*self.images, *self.places]

    @property
    def exit_code(self) -> int:
        """That of the worst image; a finding about the graph is a corruption."""
        statuses = {one.exit_code for one in self.all} | ({2} if self.graph else {0})
        return next(status for status in WORST_FIRST if status in statuses)

    def count(self, status: int) -> int:
        """How many images and places have this exit status."""
        return sum(1 for one in self.all if one.exit_code == status)


class _Checks:
    """The work of a task: the overlays among the files ``[first, stop)`` of the list."""

    def __init__(self, paths: list[str], access: Access) -> None:
        self.paths = paths
        self.access = access
        self._quick_check: QuickCheck | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return (_Checks, (self.paths, self.access))

    def __call__(self, task: Task, worker: WorkerContext) -> list[Checked]:  # noqa: ARG002
        self._quick_check = self._quick_check or QuickCheck(self.access)
        looked_at = map(self._checked, self.paths[task.first : task.stop])
        return [one for one in looked_at if one is not None]

    def _checked(self, path: str) -> Checked | None:
        assert self._quick_check is not None  # noqa: S101 - made by the call above
        try:
            seen = self._quick_check.at(path)
        except NeedsFullCheckError:
            return full_check(path, self.access)
        if seen is None:
            return None
        return Checked(path, Named(path, seen.identity, seen.image, seen.backing))


def full_check(path: str, access: Access) -> Checked | None:
    """What the full check says of ``path``; None when it is no overlay."""
    # What a link leads to and is no overlay, wherever that lies, is of no concern.
    if os.path.islink(path) and examined(path) is None:
        return None
    try:
        report = check(path, access)
    except OSError as error:
        return _unexamined(path, error)
    if not (report.is_addcow and not is_gone(path)):
        return None
    return Checked(path, named_by(path), tuple(report.findings))


def _unexamined(path: str, error: Exception) -> Checked:
    """An image that nobody could look at: it is not clean, and ends alone."""
    finding = Finding("file", Severity.CHECK_ERROR, str(error))
    return Checked(path, None, (finding,))


def _place(one: Unexamined) -> Checked:
    finding = Finding("not-examined", Severity.CHECK_ERROR, one.reason)
    return Checked(one.path, None, (finding,))


def farm_check(
    places: Iterable[str], options: RunOptions = DEFAULTS, hooks: Hooks = NO_HOOKS
) -> FarmReport:
    """Check every overlay in ``places``. Raises :class:`ImageError` when none of them is there.

    Raises :class:`RestartsError` when ``hooks`` stops it: a list of some is no answer.
    """
    with hooks.looking():
        there = files_of(places, options.access)
    found = list(each_once(_checked(there.files, replace(options, access=there.access), hooks)))
    named = without_backups(one.named for one in found if one.named is not None)
    counted = {one.path for one in named}
    found = [one for one in found if one.named is None or one.path in counted]
    hidden = [_place(one) for one in there.unexamined]
    return FarmReport(found, list(graph_findings(named)), hidden, there)


def each_once(found: Iterable[Checked]) -> Iterator[Checked]:
    """Each overlay under the first of its names."""
    seen: set[Identity] = set()
    for one in found:
        if one.named is None or one.named.identity not in seen:
            yield one
        if one.named is not None:
            seen.add(one.named.identity)


def _checked(paths: list[str], options: RunOptions, hooks: Hooks) -> Iterator[Checked]:
    count = len(paths)
    tasks = equal_tasks(count, BATCH)
    scan_options = replace(options.scan_options, counts=True, many=count >= MANY)

    def failed(result: Failed) -> list[Checked]:
        """When a worker died, nothing is known of its files."""
        task = result.task
        return [_unexamined(path, result.error) for path in paths[task.first : task.stop]]

    scan_hooks = ScanHooks(f"{count} files", failed, hooks.stopping)
    done: dict[int, list[Checked]] = {}
    looked_at = images = 0
    work = _Checks(paths, options.access)
    for task, checked in scan(work, tasks, scan_options, scan_hooks):
        done[task.number] = checked
        looked_at, images = looked_at + task.weight, images + len(checked)
        # How many of the files are images shows in time: at least one is left till then.
        expected = max(round(images * count / looked_at), images + (looked_at < count))
        hooks.counted(images, expected)
    if not tasks:
        hooks.counted(0, 0)
    for task in tasks:
        yield from done.pop(task.number)


def graph_findings(found: list[Named]) -> Iterator[Finding]:
    """What is wrong between images: each file at fault once, with the overlays that name it."""
    graph = Graph(found)
    for image, owners in graph.owners.items():
        names = _listed(owners)
        if len(owners) > 1:
            message = f"one image file is named by several overlays: {names}"
            yield Finding("shared-image", Severity.CORRUPTION, message)
        if image in graph.overlays:
            users = _listed(graph.overlays[image])
            message = f"the image file of {names} is the backing file of {users}"
            yield Finding("image-as-backing", Severity.CORRUPTION, message)
    for cycle in graph.cycles():
        names = _listed(sorted(cycle, key=lambda one: one.path))
        message = f"following their backing files leads in a circle: {names}"
        yield Finding("chain-cycle", Severity.CORRUPTION, message)


def _listed(overlays: list[Named]) -> str:
    return ", ".join(one.path for one in overlays)
