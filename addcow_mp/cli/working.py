"""What surrounds a job of the command line: progress, signals, and messages that do not block."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from addcow_mp.cli import results, signals
from addcow_mp.cli.messages import in_background, note, write_progress
from addcow_mp.cli.progress import Show, bytes_line, shown
from addcow_mp.engine.throttle import use_idle_priority
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
    if idle:
        use_idle_priority()
    with (
        in_background(),
        signals.stop_requests() as met,
        shown(*progress) as show,
        _asked(show) as tell,
    ):
        state = _State(tell, counts_images=counts_images)
        try:
            yield Hooks(
                state.progress,
                partial(bool, met),
                state.counted,
                ignore if quiet else note,
                signals.interruptible,
            )
        except StoppedError as error:
            raise signals.by_signal(error) from error
    results.job_is_done()


class _State:
    """Bytes and images, told apart by a job and shown together."""

    def __init__(self, tell: Show, *, counts_images: bool) -> None:
        self._tell = tell
        self._bytes = (0, 0)
        self._counts_images = counts_images

    def progress(self, done: int, total: int) -> None:
        """Take note of bytes."""
        self._bytes = done, total
        if not self._counts_images:
            self._tell(Progress(done, total))

    def counted(self, done: int, total: int) -> None:
        """Take note of images."""
        if self._counts_images:
            self._tell(Progress(*self._bytes, done, total))


@contextmanager
def _asked(show: Show) -> Iterator[Show]:
    """``show``, and one more line on stderr whenever SIGUSR1 has come."""
    asked: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))

    def tell(progress: Progress) -> None:
        show(progress)
        if asked:
            asked.clear()
            write_progress(_answer(progress))

    try:
        yield tell
    finally:
        signal.signal(signal.SIGUSR1, old)


def _answer(progress: Progress) -> str:
    if progress.images and not progress.bytes:
        return f"    {progress.images_done} of {progress.images} images"
    return bytes_line(progress)
