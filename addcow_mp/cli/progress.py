"""Progress of one job or of a whole farm: bytes, images, rate and time left.

For people it is a bar, or a line at every tenth part where there is no terminal. For programs it
is one JSON object a line, on any descriptor that they have opened for it. Progress is dropped when
its reader does not keep up (:mod:`addcow_mp.cli.background`); it never holds up the work.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from addcow_mp.cli.background import Background
from addcow_mp.cli.jsontext import as_line
from addcow_mp.cli.messages import on_screen, write_progress
from addcow_mp.errors import UsageError
from addcow_mp.farm.progress import Progress
from addcow_mp.units import human_size

#: Seconds between two lines for a program.
EVERY = 0.5

#: Seconds between two drawings of a bar.
BAR_EVERY = 0.1

#: Lines for a person without a terminal: one at every tenth part.
STEPS = 10

#: The forms of progress, as the command line calls them.
HUMAN, JSON = "human", "json"

Show = Callable[[Progress], None]


@contextmanager
def shown(form: str | None, fd: int | None) -> Iterator[Show]:
    """Show progress in ``form``; with a descriptor and no form, as JSON lines."""
    form = JSON if form is None and fd is not None else form
    if form is None:
        yield lambda _: None
    elif form == HUMAN and fd is None and sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        with _stream(fd) as write:
            yield _Objects(write) if form == JSON else _Lines(write)


@contextmanager
def _stream(fd: int | None) -> Iterator[Callable[[str], None]]:
    """What writes a line to the descriptor, by default to stderr."""
    if fd is None:
        yield write_progress
        return
    try:
        own = os.dup(fd)
    except OSError as error:
        raise UsageError(message=f"--progress-fd {fd}: {error.strerror}; open it first") from error
    # It stays open: a line may wait for its reader until the process ends.
    background = Background(own)
    try:
        yield lambda line: background.write(f"{line}\n", droppable=True)
    finally:
        background.finish()


class _Clock:
    """Rate and time left, from what was done since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def rate(self, progress: Progress) -> float:
        """Bytes per second."""
        return progress.bytes_done / max(self.seconds, 1e-6)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self, progress: Progress) -> float | None:
        """Seconds that the rest takes at the rate so far, None while that is unknown."""
        part = progress.share
        return self.seconds * (1 - part) / part if part else None


def bytes_line(progress: Progress) -> str:
    """Percentage and bytes, in one line for a person."""
    done, total = human_size(progress.bytes_done), human_size(progress.bytes)
    return f"    ({100 * progress.share:.2f}/100%) {done} of {total}"


class _Objects:
    """A JSON object a line, every half second and when all is done."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._clock = _Clock()
        self._last = -EVERY
        self._ended = False

    def __call__(self, progress: Progress) -> None:
        seconds, complete = self._clock.seconds, progress.is_complete
        if self._ended or (seconds - self._last < EVERY and not complete):
            return
        self._last, self._ended = seconds, complete
        self._write(as_line(self._object(progress, seconds)))

    def _object(self, progress: Progress, seconds: float) -> dict[str, object]:
        images = {"images-done": progress.images_done, "images": progress.images}
        left = self._clock.left(progress)
        return {
            **(images if progress.images else {}),
            "bytes-done": progress.bytes_done,
            "bytes": progress.bytes,
            "bytes-per-second": round(self._clock.rate(progress)),
            "seconds": round(seconds, 3),
            "seconds-left": None if left is None else round(left, 3),
        }


class _Lines:
    """Plain text: one line for every tenth part."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._clock = _Clock()
        self._shown = -1

    def __call__(self, progress: Progress) -> None:
        step = STEPS + 1 if progress.is_complete else int(progress.share * STEPS)
        if step > self._shown:
            self._shown = step
            self._write(self._line(progress))

    def _line(self, progress: Progress) -> str:
        if not progress.images:
            return f"{bytes_line(progress)}, {human_size(self._clock.rate(progress))}/s"
        images = f"{progress.images_done} of {progress.images} images"
        words = f"    ({100 * progress.share:.2f}/100%) {images}"
        if progress.bytes:
            done, total = human_size(progress.bytes_done), human_size(progress.bytes)
            words += f", {done} of {total}, {human_size(self._clock.rate(progress))}/s"
        left = self._clock.left(progress)
        return words if left is None else f"{words}, {left:.0f} s left"


class _Due:
    """True at most once in so many seconds."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._last = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._every:
            return False
        self._last = now
        return True


@contextmanager
def _bar() -> Iterator[Show]:
    from rich import progress as rich
    from rich.console import Console

    with (
        on_screen() as screen,
        rich.Progress(
            rich.BarColumn(),
            "{task.percentage:>3.0f}%",
            "{task.fields[images]}",
            rich.DownloadColumn(binary_units=True),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
            console=Console(file=cast(IO[str], screen), force_terminal=True),
            redirect_stdout=False,
            redirect_stderr=False,
            auto_refresh=False,  # it needs a thread, for which there may be no room
        ) as bar,
    ):
        task, due = bar.add_task("", total=None, images=""), _Due(BAR_EVERY)

        def show(progress: Progress) -> None:
            images = (
                f"{progress.images_done} of {progress.images} images" if progress.images else ""
            )
            refresh = due() or progress.is_complete
            done, total = progress.bytes_done, progress.bytes
            bar.update(task, completed=done, total=total, images=images, refresh=refresh)

        try:
            yield show
        finally:
            screen.is_ending = True
