"""Farm check: check every image of a farm, and then what no single image shows.

Each image gets the checks of :mod:`addcow_mp.jobs.check`, and its report is that of a check of the
image alone. The checks of the *graph* come on top: an image file of two overlays, an image file
that is also a backing file, and cycles.

Batches of files are distributed by the scan engine. The quick check
(:mod:`addcow_mp.farm.quick_check`) proves most images clean; the others get the full check.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import (
    Identity,
    Named,
    examined,
    examined_user,
    is_gone,
    named_by,
)
from addcow_mp.engine.scan import ScanHooks, scan
from addcow_mp.engine.tasks import Task, equal_tasks
from addcow_mp.engine.worker import Failed, WorkerContext
from addcow_mp.farm.graph import Graph
from addcow_mp.farm.places import Found, files_of, without_backups
from addcow_mp.farm.plain import NotPlainError
from addcow_mp.farm.quick_check import QuickCheck
from addcow_mp.findings import Finding, Severity, worst
from addcow_mp.jobs.check import check, foreign_twin_finding
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions

#: Files in one task: enough that the cost of distributing it does not matter.
BATCH = 128

#: With so many files other processes are started at once, without measuring the first tasks.
MANY = 4096


class Checked(NamedTuple):
    """An overlay, what is wrong with it, and the files that it names, if they are known."""

    path: str
    named: Named | None
    findings: tuple[Finding, ...] = ()
    is_lent: bool = False

    @property
    def exit_code(self) -> int:
        """The exit status of a check of this image alone."""
        return worst(one.severity.exit_code for one in self.findings)

    @property
    def is_clean_and_lent(self) -> bool:
        """Whether nothing is wrong as far as that can be seen while QEMU uses the image."""
        return self.is_lent and self.exit_code == 0


@dataclass
class FarmReport:
    """The result for each image, in order of paths, and the findings on the whole farm.

    ``places``: directories, and files given by name, that could not be examined.
    """

    exit_statuses: ClassVar = {
        0: "no errors were found",
        1: "an image or place could not be checked, or the given files are no overlays",
        2: "an image or the graph is corrupt",
        3: "only leaks were found",
    }

    images: list[Checked]
    graph: list[Finding]
    places: list[Checked]
    found: Found = field(repr=False)

    @property
    def all(self) -> list[Checked]:
        """Images and places."""
        return [*self.images, *self.places]

    @property
    def exit_code(self) -> int:
        """The status of the worst image or finding; 1 when the given files are no overlays."""
        findings = (one.severity.exit_code for one in self.graph)
        found = worst([*findings, *(one.exit_code for one in self.all)])
        return found or int(not self.images and bool(self.found.named))

    def count(self, status: int) -> int:
        """The number of images and places with this exit status, without clean lent images."""
        return sum(one.exit_code == status and not one.is_clean_and_lent for one in self.all)

    @property
    def lent(self) -> int:
        """The number of images that are lent to QEMU and have no findings."""
        return sum(one.is_clean_and_lent for one in self.all)


class _Checks:
    """Does a task: checks the overlays among the files ``[first, stop)`` of the list."""

    def __init__(self, paths: list[str], access: Access) -> None:
        self.paths = paths
        self.access = access
        self._quick_check: QuickCheck | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return (_Checks, (self.paths, self.access))

    def __call__(self, task: Task, worker: WorkerContext) -> list[Checked]:  # noqa: ARG002
        self._quick_check = self._quick_check or QuickCheck(self.access)
        paths = self.paths[task.first : task.stop]
        results = (self._checked(path, self._quick_check) for path in paths)
        return [one for one in results if one is not None]

    def _checked(self, path: str, quick_check: QuickCheck) -> Checked | None:
        try:
            seen = quick_check.at(path)
        except NotPlainError:
            return full_check(path, self.access)
        if seen is None:
            return _qcow2_user(path) if quick_check.met_qcow2 else None
        return Checked(path, Named(path, seen.identity, seen.image, seen.backing))


def full_check(path: str, access: Access) -> Checked | None:
    """The result of the full check of ``path``; None when it is no overlay."""
    # A link may lead to any file that is no overlay, wherever it lies.
    if os.path.islink(path) and examined(path) is None:
        return None
    try:
        report = check(path, access, alone=False)
    except OSError as error:
        return _unexamined(path, str(error))
    if not report.is_addcow or is_gone(path):
        return None
    return Checked(path, named_by(path), tuple(report.findings), report.is_lent)


def _qcow2_user(path: str) -> Checked | None:
    """A qcow2 file that may write the image file of an overlay."""
    user = examined_user(path)
    if not isinstance(user, Named) or user.image is None:
        return None
    return Checked(path, user)


def _unexamined(path: str, reason: str, name: str = "file") -> Checked:
    """The result for a file or place that could not be examined."""
    return Checked(path, None, (Finding(name, Severity.CHECK_ERROR, reason),))


def farm_check(
    places: Iterable[str], options: RunOptions = DEFAULTS, hooks: Hooks = NO_HOOKS
) -> FarmReport:
    """Check every overlay in ``places``. Raises :class:`ImageError` when none of them is there.

    Raises :class:`RestartsError` when ``hooks`` stops it: a list of some is no answer.
    """
    with hooks.looking():
        there = files_of(places, options.access)
    found = list(_each_once(_checked(there.files, replace(options, access=there.access), hooks)))
    found = _with_foreign_twins(found)
    named = without_backups(one.named for one in found if one.named is not None)
    counted = {one.path for one in named}
    found = [one for one in found if one.named is None or one.path in counted]
    hidden = [_unexamined(one.path, one.reason, "not-examined") for one in there.unexamined]
    return FarmReport(found, list(graph_findings(named)), hidden, there)


def _with_foreign_twins(found: list[Checked]) -> list[Checked]:
    """The overlays, with a finding for each twin through which QEMU may write without a mark."""
    twins = {one.named.image: one.path for one in found if one.named and not one.named.is_overlay}
    return [
        one._replace(findings=(*one.findings, foreign_twin_finding(twins[one.named.image])))
        if one.named and one.named.image in twins and not one.named.is_lent
        else one
        for one in found
        if one.named is None or one.named.is_overlay
    ]


def _each_once(found: Iterable[Checked]) -> Iterator[Checked]:
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
        return [_unexamined(path, str(result.error)) for path in paths[task.first : task.stop]]

    scan_hooks = ScanHooks(f"{count} files", failed, hooks.stopping)
    work = _Checks(paths, options.access)
    done: dict[int, list[Checked]] = {}
    examined_files = images = 0
    for task, checked in scan(work, tasks, scan_options, scan_hooks):
        done[task.number] = checked
        examined_files, images = examined_files + task.weight, images + len(checked)
        # The number of images is estimated until all files are examined; at least one is left.
        expected = max(round(images * count / examined_files), images + (examined_files < count))
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
