"""Farm check: every image of a farm by itself, and then what no image can know of itself.

Each image goes through the checks of :mod:`addcow_mp.jobs.check`, and its report is the same as
if it had been checked alone. Over all of them stand the checks of the *graph*: a file that two
overlays take for their image, and an image that is somebody's backing file besides.

Images are dealt out in small parcels to the engine's pool: this process takes part, and others
are started only when there are so many images that it pays. There is no process for each image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from addcow_mp.device.access import Access
from addcow_mp.engine.plan import Task
from addcow_mp.engine.pool import Done, Part, Pool, usable_cpus
from addcow_mp.errors import BeginsAnewError
from addcow_mp.jobs.check import check
from addcow_mp.jobs.dependants import Identity, Named
from addcow_mp.jobs.farm import found_in
from addcow_mp.jobs.findings import CheckReport, Finding, Severity
from addcow_mp.jobs.report import Conduct

#: Images in one task: enough that handing it out costs nothing against it.
PARCEL = 32

#: Exit statuses of single images, the worst first.
WORST_FIRST = (2, 1, 3, 0)


@dataclass
class FarmReport:
    """The report of each image, in order of paths, and the findings about the farm as a whole."""

    images: list[CheckReport] = field(default_factory=list)
    graph: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """That of the worst image; a finding about the graph is a corruption."""
        statuses = {one.exit_code for one in self.images} | ({2} if self.graph else {0})
        return next(status for status in WORST_FIRST if status in statuses)

    def count(self, status: int) -> int:
        """How many images have this exit status."""
        return sum(1 for one in self.images if one.exit_code == status)


class _Checks:
    """The work of a task: the images ``[first, stop)`` of the list, checked one by one."""

    def __init__(self, paths: list[str], access: Access) -> None:
        self.paths = paths
        self.access = access

    def __call__(self, task: Task, slot: int) -> list[CheckReport]:  # noqa: ARG002
        return [self._checked(path) for path in self.paths[task.first : task.stop]]

    def _checked(self, path: str) -> CheckReport:
        try:
            return check(path, self.access)
        except OSError as error:
            return _unexamined(path, error)


def _unexamined(path: str, error: Exception) -> CheckReport:
    """The report of an image that nobody could look at: it is not clean, and ends alone."""
    return CheckReport(path, [Finding("file", Severity.CHECK_ERROR, str(error))])


def farm_check(places: Iterable[str], conduct: Conduct | None = None) -> FarmReport:
    """Check every overlay in ``places``. Raises :class:`ImageError` for a place that is not there.

    Raises :class:`BeginsAnewError` when ``conduct`` stops it: a list of some is no answer.
    """
    conduct = conduct or Conduct()
    found, access = found_in(places, conduct.access)
    paths = [one.path for one in found]
    reports = _checked(paths, access, conduct)
    return FarmReport(reports, list(graph_findings(found)))


def _checked(paths: list[str], access: Access, conduct: Conduct) -> list[CheckReport]:
    count = len(paths)
    tasks = [
        Task(number, first, min(first + PARCEL, count), min(PARCEL, count - first))
        for number, first in enumerate(range(0, count, PARCEL))
    ]
    done: dict[int, list[CheckReport]] = {}
    jobs = usable_cpus() if conduct.jobs is None else conduct.jobs
    with Pool(_Checks(paths, access), jobs, idle=conduct.manner.idle, part=Part.FIRST) as pool:
        for result in pool.run(tasks, conduct.stopping):
            if result is not None:
                task = result.task
                done[task.number] = (
                    result.result
                    if isinstance(result, Done)
                    else [_unexamined(path, result.error) for path in paths[task.first : task.stop]]
                )
                conduct.progress(sum(map(len, done.values())), count)
    if len(done) < len(tasks):
        raise BeginsAnewError(path=f"{count} images")
    return [report for task in tasks for report in done[task.number]]


def graph_findings(found: list[Named]) -> Iterator[Finding]:
    """What is wrong between images: each file at fault once, with all who name it."""
    images = _by(found, lambda one: one.image)
    backings = _by(found, lambda one: one.backing)
    for identity, owners in images.items():
        names = ", ".join(one.path for one in owners)
        if len(owners) > 1:
            told = f"one image file is named by several overlays: {names}"
            yield Finding("shared-image", Severity.CORRUPTION, told)
        if identity in backings:
            users = ", ".join(one.path for one in backings[identity])
            told = f"the image file of {names} is the backing file of {users}"
            yield Finding("image-as-backing", Severity.CORRUPTION, told)


def _by(found: list[Named], of: Callable[[Named], Identity | None]) -> dict[Identity, list[Named]]:
    groups: dict[Identity, list[Named]] = defaultdict(list)
    for one in found:
        identity = of(one)
        if identity is not None:
            groups[identity].append(one)
    return groups
