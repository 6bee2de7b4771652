"""What a caller tells a job: settings, hooks, and what several jobs share.

Settings (:class:`RunOptions`) are plain data and reach worker processes by pickling. Hooks
(:class:`Hooks`) are functions of the calling process and never leave it. A farm also gives each job
what its jobs share (:class:`Shared`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from addcow_mp.device.access import Access
from addcow_mp.device.copying import CopyOptions
from addcow_mp.engine.scan import ScanOptions
from addcow_mp.engine.stop_flag import never
from addcow_mp.engine.transfer_run import OnProgress, no_progress
from addcow_mp.errors import StoppedError, TimeLimitError

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
    ``idle``: the command line gives its processes idle input/output priority. ``manifests``: a job
    that removes manifests and knows what its layers hold then makes new ones.
    """

    jobs: int | None = None
    access: Access = Access()  # noqa: RUF009 - frozen
    copy_options: CopyOptions = CopyOptions()  # noqa: RUF009 - frozen
    idle: bool = False
    manifests: bool = True

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

    def in_steps(self, weights: Sequence[int]) -> Iterator[Hooks]:
        """The hooks of each step of a job, which moves about so many bytes; some may move none.

        Progress is complete when the last step has ended.
        """
        before, after = 0, sum(weights)
        for weight in weights:
            after -= weight
            step = _Step(self.within(before, after).progress)
            yield replace(self, progress=step)
            before += step.total
        self.progress(before, before)


class _Step:
    """The progress of one step, and how many bytes it had in all."""

    def __init__(self, show: OnProgress) -> None:
        self._show = show
        self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        self._show(done, total)


def late_after(seconds: float | None) -> Callable[[], bool]:
    """A function that says whether so many seconds have passed since now; None = never."""
    if seconds is None:
        return never
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


@contextmanager
def limited(hooks: Hooks, is_late: Callable[[], bool]) -> Iterator[Hooks]:
    """Hooks that also stop a job once ``is_late``; that stop is a :class:`TimeLimitError`."""
    try:
        yield replace(hooks, stopping=lambda: hooks.stopping() or is_late())
    except TimeLimitError:
        raise
    except StoppedError as error:
        if hooks.stopping() or not is_late():
            raise
        raise error.at_time_limit() from error


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
