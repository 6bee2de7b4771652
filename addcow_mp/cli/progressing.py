"""Progress over all images of a farm: images, bytes, rate and time left.

For people it is a bar, or a line at every tenth part where there is no terminal; for programs a
JSON object a line, on any descriptor that they have opened for it. A reader that goes away never
ends the work.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING, cast

from addcow_mp.cli.background import Background
from addcow_mp.cli.jsontext import as_line
from addcow_mp.cli.saying import on_screen, tell_progress
from addcow_mp.cli.working import BAR_EVERY, Due
from addcow_mp.errors import UsageError
from addcow_mp.farm.tally import Tally
from addcow_mp.units import human_size

if TYPE_CHECKING:
    from addcow_mp.jobs.report import Conduct

#: Seconds between two lines for a program.
EVERY = 0.5

#: Lines for a person who has no terminal: one at every tenth part.
STEPS = 10

#: The forms of progress, as the command line calls them.
HUMAN, JSON = "human", "json"

Show = Callable[[Tally], None]


@contextmanager
def counting(form: str | None, fd: int | None, conduct: Conduct) -> Iterator[Conduct]:
    """The conduct of work that only looks at files, and counts them."""
    read = (0, 0)

    def progress(done: int, total: int) -> None:
        nonlocal read
        read = (done, total)
        conduct.progress(done, total)

    with shown(form, fd) as show:

        def counted(done: int, total: int) -> None:
            show(Tally(done, total, *read))
            conduct.counted(done, total)

        yield replace(conduct, progress=progress, counted=counted)


@contextmanager
def shown(form: str | None, fd: int | None) -> Iterator[Show]:
    """What shows progress; a descriptor that is named is for programs if nothing else is said."""
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
    """What writes a line to the descriptor, or to nobody once its reader has gone."""
    if fd is None:
        yield tell_progress
        return
    try:
        own = os.dup(fd)
    except OSError as error:
        raise UsageError(message=f"--progress-fd {fd}: {error.strerror}; open it first") from error
    # It stays open: a line may be on its way for as long as nobody reads.
    background = Background(own)
    try:
        yield lambda line: background.offer(f"{line}\n")
    finally:
        background.finish()


class _Clock:
    """Rate and time left, from what was done since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def rate(self, tally: Tally) -> float:
        """Bytes per second."""
        return tally.bytes_done / max(self.seconds, 1e-6)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self, tally: Tally) -> float | None:
        """Seconds that the rest will take at the rate so far, None while that is unknown."""
        part = share(tally)
        return self.seconds * (1 - part) / part if part else None


def share(tally: Tally) -> float:
    """The part that is done, by bytes, by images where there are no bytes to move."""
    if tally.bytes:
        return min(1.0, tally.bytes_done / tally.bytes)
    return tally.images_done / tally.images if tally.images else 1.0


class _Objects:
    """A JSON object a line, now and then, and when all is done."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._clock = _Clock()
        self._last = -EVERY
        self._ended = False

    def __call__(self, tally: Tally) -> None:
        seconds, all_done = self._clock.seconds, tally.images_done == tally.images
        if self._ended or (seconds - self._last < EVERY and not all_done):
            return
        self._last, self._ended = seconds, all_done
        left = self._clock.left(tally)
        told = {
            "images-done": tally.images_done,
            "images": tally.images,
            "bytes-done": tally.bytes_done,
            "bytes": tally.bytes,
            "bytes-per-second": round(self._clock.rate(tally)),
            "seconds": round(seconds, 3),
            "seconds-left": None if left is None else round(left, 3),
        }
        self._write(as_line(told))


class _Lines:
    """Plain text: one line for every tenth part."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._clock = _Clock()
        self._shown = -1

    def __call__(self, tally: Tally) -> None:
        step = int(share(tally) * STEPS) if tally.images_done < tally.images else STEPS + 1
        if step > self._shown:
            self._shown = step
            self._write(f"    ({100 * share(tally):.2f}/100%) {self._words(tally)}")

    def _words(self, tally: Tally) -> str:
        told = f"{tally.images_done} of {tally.images} images"
        if tally.bytes:
            done, total = human_size(tally.bytes_done), human_size(tally.bytes)
            told += f", {done} of {total}, {human_size(self._clock.rate(tally))}/s"
        left = self._clock.left(tally)
        return told if left is None else f"{told}, {left:.0f} s left"


@contextmanager
def _bar() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    with (
        on_screen() as screen,
        Progress(
            BarColumn(),
            "{task.percentage:>3.0f}%",
            "{task.fields[images]}",
            DownloadColumn(binary_units=True),
            Speed(),
            TimeRemainingColumn(),
            console=Console(file=cast(IO[str], screen), force_terminal=True),
            redirect_stdout=False,
            redirect_stderr=False,
            auto_refresh=False,  # which would need a thread, for which there may be no room
        ) as bar,
    ):
        task, due = bar.add_task("", total=None, images=""), Due(BAR_EVERY)

        def show(tally: Tally) -> None:
            images = f"{tally.images_done} of {tally.images} images"
            bar.update(
                task,
                completed=tally.bytes_done,
                total=tally.bytes,
                images=images,
                refresh=due() or tally.images_done == tally.images,
            )

        try:
            yield show
        finally:
            screen.is_ending = True
