"""What a caller tells a job: settings, hooks, and what several jobs share.

Settings (:class:`RunOptions`) are plain data and reach worker processes by pickling. Hooks
(:class:`Hooks`) are functions of the calling process and never leave it. A farm also gives each job
what its jobs share (:class:`Shared`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from addcow_mp.device.access import Access
from addcow_mp.device.copying import CopyOptions
from addcow_mp.engine.scan import ScanOptions
from addcow_mp.engine.stop_flag import never
from addcow_mp.engine.transfer_run import OnProgress, no_progress

if TYPE_CHECKING:
    from addcow_mp.device.discovery import NearbyOverlays
    from addcow_mp.engine.pool import Pool


def ignore(_: str) -> None:
    """Drop a line that no user wants to read."""


@dataclass(frozen=True)
class RunOptions:
    """The settings of a run, whatever the job.

    ``jobs``: worker processes; 0 = work in this process, None = the usable processors.
    ``access``: which files may be opened and how. ``copy_options``: how bytes are copied.
    ``idle``: the command line gives its processes idle input/output priority.
    """

    jobs: int | None = None
    access: Access = Access()  # noqa: RUF009 - frozen
    copy_options: CopyOptions = CopyOptions()  # noqa: RUF009 - frozen
    idle: bool = False

    @property
    def scan_options(self) -> ScanOptions:
        """The processes of a scan."""
        return ScanOptions(self.jobs, self.copy_options.rate)


@dataclass(frozen=True)
class Hooks:
    """Functions of the caller that a job calls.

    ``progress``: called with the bytes done and all bytes. ``stopping``: asked between tasks; once
    it returns true, no further task begins. ``counted``: called with the images done and all
    images, after ``progress``. ``note``: called with a line about what keeps the job waiting.
    ``looking``: a context around steps that only read and may be interrupted anywhere.
    """

    progress: OnProgress = no_progress
    stopping: Callable[[], bool] = never
    counted: OnProgress = no_progress
    note: Callable[[str], None] = ignore
    looking: Callable[[], AbstractContextManager[None]] = nullcontext

    def within(self, before: int, after: int) -> Hooks:
        """The hooks of one step of a job: ``before`` bytes precede it and ``after`` follow it."""

        def progress(done: int, total: int) -> None:
            self.progress(before + done, before + total + after)

        return replace(self, progress=progress)


@dataclass(frozen=True)
class Shared:
    """What the jobs of a farm share.

    ``pool``: the processes that work for all of them; None = the job starts its own. ``nearby``:
    the overlays around the image's files; None = the job looks for them.
    """

    pool: Pool | None = None
    nearby: NearbyOverlays | None = None


#: The defaults of every job.
DEFAULTS, NO_HOOKS, ALONE = RunOptions(), Hooks(), Shared()
