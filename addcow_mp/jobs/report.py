"""What a job reports: its estimate before, its totals and its outcome after."""

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
    """What a job would do: move about ``weight`` bytes into the file ``target`` on ``device``.

    ``gives_back``: the space of what was moved is freed on that device.
    """

    weight: int
    space: SpaceNeeded
    target: str
    device: int
    gives_back: bool = False


class Outcome(Enum):
    """How a job has ended, or would if it ended now."""

    REFUSED = "nothing was changed"
    FAILED = "something may have been changed"
    STOPPED = "it was asked to stop, and continues when it is run again"
    NOT_READ_BACK = "it is done, but was asked to stop before all was read back"
    DONE = "it is done"


@dataclass
class Report:
    """What a job on one file has moved, how many ``seconds`` it took, and how it has ended.

    ``totals``: bytes and clusters. ``jobs``: the worker processes that it had. ``guest_digest``: of
    what was read back. ``virtual_size`` and ``bytes_freed``: in bytes, of jobs that change them.
    The error of a job that fails carries the report of what was done before it.
    """

    operation: str
    filename: str
    totals: Totals = field(default_factory=Totals)
    jobs: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    #: The digest of what was read back and is as before; None when this was not asked for.
    guest_digest: str | None = None
    #: The virtual size in bytes, of a job that sets it.
    virtual_size: int | None = None
    #: Bytes of disk space that were freed, of a job that only frees.
    bytes_freed: int | None = None
    #: The state in which a job found an overlay that it takes back from QEMU.
    state_before: str | None = None
    #: Paths of manifests that were removed because what they describe was to change, and of those
    #: that were made.
    manifests_removed: list[str] = field(default_factory=list)
    manifests_made: list[str] = field(default_factory=list)
    outcome: Outcome = Outcome.REFUSED

    @property
    def manifests_gone(self) -> list[str]:
        """The manifests that were removed, and for which no new ones were made."""
        return [one for one in self.manifests_removed if one not in self.manifests_made]

    def begin_changes(self) -> None:
        """Enter that something is about to be changed."""
        if self.outcome is Outcome.REFUSED:
            self.outcome = Outcome.FAILED

    def _end_with(self, error: AddcowError) -> None:
        if isinstance(error, StoppedError):
            done = self.outcome is Outcome.DONE
            self.outcome = Outcome.NOT_READ_BACK if done else Outcome.STOPPED
        elif self.outcome is Outcome.DONE:
            self.outcome = Outcome.FAILED
        error.report = self

    def as_json(self) -> dict[str, object]:
        """Return the report with keys as qemu-img spells them."""
        verified = {} if self.guest_digest is None else {"guest-digest": self.guest_digest}
        size = {} if self.virtual_size is None else {"virtual-size": self.virtual_size}
        freed = {} if self.bytes_freed is None else {"bytes-freed": self.bytes_freed}
        state = {} if self.state_before is None else {"state-before": self.state_before}
        return {
            "operation": self.operation,
            "filename": self.filename,
            **state,
            **size,
            "bytes-moved": self.totals.bytes_moved,
            "clusters-moved": self.totals.clusters_moved,
            "bytes-zeroed": self.totals.bytes_zeroed,
            "clusters-zeroed": self.totals.clusters_zeroed,
            "moved-by": dict(zip(CopyMethod, self.totals.ways, strict=True)),
            "seconds": round(self.seconds, 6),
            "jobs": self.jobs,
            **freed,
            **verified,
            **manifest_keys(self),
        }


def manifest_keys(report: Report) -> dict[str, object]:
    """The public keys about manifests, where there is something to say."""
    keys = {"manifests-made": report.manifests_made, "manifests-removed": report.manifests_gone}
    return {key: paths for key, paths in keys.items() if paths}


@contextmanager
def reporting(operation: str, filename: str) -> Iterator[Report]:
    """Yield the report of a job; an error that ends the job carries it."""
    report = Report(operation, filename)
    start = time.monotonic()
    try:
        yield report
    except AddcowError as error:
        report._end_with(error)
        raise
    finally:
        report.seconds = time.monotonic() - start


@contextmanager
def ending(path: str, done: str, left: str) -> Iterator[None]:
    """Around what follows the work of a job: errors say what is ``done`` and what is ``left``."""
    try:
        yield
    except AddcowError as error:
        raise CleanupError(path=path, done=done, left=left, cause=str(error)) from error
