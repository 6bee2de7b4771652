"""What a job tells when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from addcow_mp.device.access import Access
from addcow_mp.device.copying import CopyMethod, CopyOptions
from addcow_mp.engine.scan import ScanOptions
from addcow_mp.engine.transfer import Totals
from addcow_mp.engine.transfer_run import Progress, no_progress
from addcow_mp.errors import AddcowError, StoppedError, UnendedError

if TYPE_CHECKING:
    from addcow_mp.engine.pool import Pool
    from addcow_mp.engine.space import SpaceNeeded
    from addcow_mp.jobs.dependants import NearbyOverlays


def never() -> bool:
    """No reason to stop."""
    return False


def ignore(_: str) -> None:
    """Nobody to be told."""


@dataclass(frozen=True)
class Conduct:
    """How a job is carried out, whatever it does.

    ``jobs``: worker processes; 0 = in this process, None = the usable processors. ``crew``:
    processes that work for several jobs, instead of its own. ``progress`` is called with bytes
    done and bytes in all, ``counted`` with images done and images in all by jobs that look at
    many, after ``progress`` where they tell both. ``note`` is called with a line about what keeps
    the job waiting. ``stopping`` is asked between tasks, and once it is true no new one is begun.
    ``looking`` is around what only looks, and may be ended anywhere. ``access`` says what may be
    opened and how, ``copy_options`` how bytes are moved, ``around`` what is known of other overlays
    nearby; None = look.
    """

    jobs: int | None = None
    progress: Progress = no_progress
    stopping: Callable[[], bool] = never
    access: Access = field(default_factory=Access)
    copy_options: CopyOptions = field(default_factory=CopyOptions)
    crew: Pool | None = None
    around: NearbyOverlays | None = None
    counted: Progress = no_progress
    note: Callable[[str], None] = ignore
    looking: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def scan_options(self) -> ScanOptions:
        """Who takes part in what only looks."""
        return ScanOptions(self.jobs, is_limited=self.copy_options.rate > 0)

    def amid(self, before: int, after: int) -> Conduct:
        """The same for one step of several: so many bytes ``before`` it and ``after`` it."""

        def progress(done: int, total: int) -> None:
            self.progress(before + done, before + total + after)

        return replace(self, progress=progress)


@dataclass(frozen=True)
class Estimate:
    """What a job would do: about so many bytes to move, into ``target`` on ``device``.

    ``gives_back`` says that what was moved is freed on that device.
    """

    weight: int
    space: SpaceNeeded
    target: str
    device: int
    gives_back: bool = False


class Reach(Enum):
    """How far a job has come."""

    LOOKING = "nothing was changed"
    WORKING = "something may have been changed"
    DONE = "the work is done; what comes after it may not be"


@dataclass
class Report:
    """Which job, on which file, how much was copied or made zero, and how long it took.

    A job that fails says the same of what it had done: its error carries the report.
    """

    operation: str
    filename: str
    totals: Totals = field(default_factory=Totals)
    jobs: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    #: Of what was read back and found to be as before; None when nobody asked for it.
    guest_digest: str | None = None
    reach: Reach = Reach.LOOKING
    #: Whether it was asked to stop before its end.
    stopped: bool = False

    def working(self) -> None:
        """Something is about to be changed."""
        if self.reach is Reach.LOOKING:
            self.reach = Reach.WORKING

    def as_json(self) -> dict[str, object]:
        """The report with qemu-img's manner of keys."""
        verified = {} if self.guest_digest is None else {"guest-digest": self.guest_digest}
        return {
            "operation": self.operation,
            "filename": self.filename,
            "bytes-moved": self.totals.bytes_moved,
            "clusters-moved": self.totals.clusters_moved,
            "bytes-zeroed": self.totals.bytes_zeroed,
            "clusters-zeroed": self.totals.clusters_zeroed,
            "moved-by": dict(zip(CopyMethod, self.totals.ways, strict=True)),
            "seconds": round(self.seconds, 6),
            "jobs": self.jobs,
            **verified,
        }


@contextmanager
def reporting(operation: str, filename: str) -> Iterator[Report]:
    """A report whose seconds are those of the block; an error that ends the block carries it."""
    report = Report(operation, filename)
    start = time.monotonic()
    try:
        yield report
    except AddcowError as error:
        report.stopped = isinstance(error, StoppedError)
        error.report = report
        raise
    finally:
        report.seconds = time.monotonic() - start


@contextmanager
def ending(path: str, done: str, left: str) -> Iterator[None]:
    """What comes after the work of a job; an error says what is ``done``, and what is ``left``."""
    try:
        yield
    except AddcowError as error:
        raise UnendedError(path=path, done=done, left=left, cause=str(error)) from error
