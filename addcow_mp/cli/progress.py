"""Progress of one job or of a whole farm: bytes, images, rate and time left.

Users see a bar, or without a terminal a line at every tenth part. Programs get one JSON object a
line, on any descriptor that they have opened. Progress is dropped if its reader is slow
(:mod:`addcow_mp.cli.background`); it never delays the work.
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

#: Without a terminal, one line is printed at every tenth part.
STEPS = 10

Show = Callable[[Progress], None]


@contextmanager
def shown(form: str | None, fd: int | None) -> Iterator[Show]:
    """Show progress in ``form`` (human, json); with a descriptor and no form, as JSON lines."""
    form = "json" if form is None and fd is not None else form
    if form is None:
        yield lambda _: None
    elif form == "human" and fd is None and sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        with _stream(fd) as write:
            yield _Objects(write) if form == "json" else _Lines(write)


@contextmanager
def _stream(fd: int | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a line to the descriptor, by default to stderr."""
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


def bytes_line(progress: Progress) -> str:
    """Percentage and bytes, in one line for users."""
    return f"    ({100 * progress.share:.2f}/100%) {_bytes(progress)}"


def _bytes(progress: Progress) -> str:
    return f"{human_size(progress.bytes_done)} of {human_size(progress.bytes)}"


def _images(progress: Progress) -> str:
    return f"{progress.images_done} of {progress.images} images" if progress.images else ""


class _Printer:
    """Prints lines of progress; knows the rate and the time left."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._start = time.monotonic()

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _rate(self, progress: Progress) -> float:
        """Bytes per second since the start."""
        return progress.bytes_done / max(self._seconds, 1e-6)

    def _left(self, progress: Progress) -> float | None:
        """Seconds that the rest takes at the rate so far, if that is known."""
        part = progress.share
        return self._seconds * (1 - part) / part if part else None


class _Objects(_Printer):
    """A JSON object a line, every half second and at the end."""

    _last = -EVERY
    _ended = False

    def __call__(self, progress: Progress) -> None:
        seconds, complete = self._seconds, progress.is_complete
        if self._ended or (seconds - self._last < EVERY and not complete):
            return
        self._last, self._ended = seconds, complete
        images = {"images-done": progress.images_done, "images": progress.images}
        left = self._left(progress)
        self._write(
            as_line(
                {
                    **(images if progress.images else {}),
                    "bytes-done": progress.bytes_done,
                    "bytes": progress.bytes,
                    "bytes-per-second": round(self._rate(progress)),
                    "seconds": round(seconds, 3),
                    "seconds-left": None if left is None else round(left, 3),
                }
            )
        )


class _Lines(_Printer):
    """Plain text: one line at every tenth part."""

    _shown = -1

    def __call__(self, progress: Progress) -> None:
        step = STEPS + 1 if progress.is_complete else int(progress.share * STEPS)
        if step > self._shown:
            self._shown = step
            self._write(self._line(progress))

    def _line(self, progress: Progress) -> str:
        rate = f"{human_size(self._rate(progress))}/s"
        if not progress.images:
            return f"{bytes_line(progress)}, {rate}"
        line = f"    ({100 * progress.share:.2f}/100%) {_images(progress)}"
        if progress.bytes:
            line += f", {_bytes(progress)}, {rate}"
        left = self._left(progress)
        return line if left is None else f"{line}, {left:.0f} s left"


@contextmanager
def _bar() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.progress import TransferSpeedColumn as Speed

    with (
        on_screen() as screen,
        Bar(
            BarColumn(),
            "{task.percentage:>3.0f}%",
            "{task.fields[images]}",
            DownloadColumn(binary_units=True),
            Speed(),
            TimeRemainingColumn(),
            console=Console(file=cast(IO[str], screen), force_terminal=True),
            redirect_stdout=False,
            redirect_stderr=False,
            auto_refresh=False,  # it needs a thread, for which there may be no room
        ) as bar,
    ):
        task, drawn = bar.add_task("", total=None, images=""), 0.0

        def show(progress: Progress) -> None:
            nonlocal drawn
            now = time.monotonic()
            refresh = now - drawn >= BAR_EVERY or progress.is_complete
            drawn = now if refresh else drawn
            done, total, images = progress.bytes_done, progress.bytes, _images(progress)
            bar.update(task, completed=done, total=total, images=images, refresh=refresh)

        try:
            yield show
        finally:
            screen.is_ending = True
