"""What a job tells when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from addcow_mp.device.copying import CopyMethod
from addcow_mp.engine.done_map import Totals
from addcow_mp.errors import AddcowError, CleanupError, StoppedError

if TYPE_CHECKING:
    from addcow_mp.engine.space import SpaceNeeded


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
        raise CleanupError(path=path, done=done, left=left, cause=str(error)) from error
