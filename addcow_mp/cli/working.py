"""What surrounds a job of the command line: progress, signals, and messages that do not block."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from addcow_mp.cli import results, signals
from addcow_mp.cli.messages import in_background, note, write_progress
from addcow_mp.cli.progress import Show, bytes_line, shown
from addcow_mp.engine.throttle import idle_priority
from addcow_mp.errors import StoppedError
from addcow_mp.farm.progress import Progress
from addcow_mp.jobs.options import Hooks, ignore


@contextmanager
def working(
    progress: tuple[str | None, int | None],
    *,
    idle: bool = False,
    counts_images: bool = False,
    quiet: bool = False,
) -> Iterator[Hooks]:
    """Yield the hooks of a job; signals stop it. ``progress``: its format and its descriptor.

    ``idle``: this process uses the disk only when no other program does; planning and publishing
    use it too. ``counts_images``: the job also counts images, after the bytes. ``quiet``: lines
    about what keeps the job waiting are dropped.
    """
    with (
        idle_priority(wanted=idle),
        in_background(),
        signals.stop_requests() as received,
        shown(*progress) as show,
    ):
        display = _Display(show, counts_images=counts_images)
        old = signal.signal(signal.SIGUSR1, display.request_line)
        try:
            yield Hooks(
                display.progress,
                partial(bool, received),
                display.counted,
                ignore if quiet else note,
                signals.interruptible,
            )
        except StoppedError as error:
            raise signals.by_signal(error) from error
        finally:
            signal.signal(signal.SIGUSR1, old)
    results.job_is_done()


class _Display:
    """Shows the bytes and images that a job counts, and one line on stderr after SIGUSR1."""

    def __init__(self, show: Show, *, counts_images: bool) -> None:
        self._show = show
        self._bytes = (0, 0)
        self._counts_images = counts_images
        self._is_line_due = False

    def request_line(self, *_: object) -> None:
        self._is_line_due = True

    def progress(self, done: int, total: int) -> None:
        self._bytes = done, total
        if not self._counts_images:
            self._update(Progress(done, total))

    def counted(self, done: int, total: int) -> None:
        if self._counts_images:
            self._update(Progress(*self._bytes, done, total))

    def _update(self, progress: Progress) -> None:
        self._show(progress)
        if self._is_line_due:
            self._is_line_due = False
            counts_only = progress.images and not progress.bytes
            images = f"    {progress.images_done} of {progress.images} images"
            write_progress(images if counts_only else bytes_line(progress))
