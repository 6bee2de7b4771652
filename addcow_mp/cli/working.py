"""How long jobs are conducted from the command line: progress, and stopping cleanly."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, cast

from addcow_mp.cli import results, signals
from addcow_mp.cli.saying import in_background, note, on_screen, tell_progress
from addcow_mp.device.access import Access
from addcow_mp.device.moving import Manner
from addcow_mp.engine.pace import step_back
from addcow_mp.engine.run import Progress, no_progress
from addcow_mp.errors import StoppedError
from addcow_mp.jobs.report import Conduct, ignore
from addcow_mp.units import human_size

#: Seconds between two drawings of a bar.
BAR_EVERY = 0.1

#: Without a terminal a line is printed at every tenth part, not at every moment.
STEPS = 10


@contextmanager
def working(
    jobs: int | None, access: Access, manner: Manner, *, progress: bool, quiet: bool = False
) -> Iterator[Conduct]:
    """A conduct with progress on stderr, which signals end between tasks.

    What keeps a job waiting is told too, unless it shall be ``quiet``. An idle one steps back with
    all that it does: also planning, looking and publishing compete for the disk.
    """
    if manner.idle:
        step_back()
    told = ignore if quiet else note
    with in_background(), signals.asking() as stop, _shown(progress) as (show, counted):
        try:
            stops = partial(bool, stop)
            yield Conduct(
                jobs,
                show,
                stops,
                access,
                manner,
                counted=counted,
                note=told,
                looking=signals.interrupting,
            )
        except StoppedError as error:
            raise signals.as_met(error) from error
    results.job_is_done()


@contextmanager
def _shown(progress: bool) -> Iterator[tuple[Progress, Progress]]:
    """Progress in bytes as asked for, and once more whenever SIGUSR1 comes, also in images."""
    asked: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))

    def answer(line: str) -> None:
        if asked:
            asked.clear()
            tell_progress(line)

    try:
        with _renderer(progress) as show:

            def shown(done: int, total: int) -> None:
                show(done, total)
                answer(_line(done, total))

            yield shown, lambda done, total: answer(f"    {done} of {total} images")
    finally:
        signal.signal(signal.SIGUSR1, old)


@contextmanager
def _renderer(progress: bool) -> Iterator[Progress]:
    if not progress:
        yield no_progress
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _Lines()


def _line(done: int, total: int) -> str:
    percent = 100.0 if total == 0 else 100 * done / total
    return f"    ({percent:.2f}/100%) {human_size(done)} of {human_size(total)}"


class _Lines:
    """Progress as plain text: one line for every tenth part."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        step = STEPS if total == 0 else done * STEPS // total
        if step == self._shown:
            return
        self._shown = step
        rate = done / max(time.monotonic() - self._start, 1e-6)
        tell_progress(f"{_line(done, total)}, {human_size(rate)}/s")


class Due:
    """True now and then, but not more often than every so many seconds."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._last = 0.0

    def __call__(self) -> bool:
        """Whether it is time again."""
        now = time.monotonic()
        if now - self._last < self._every:
            return False
        self._last = now
        return True


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar with rate and time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with (
        on_screen() as screen,
        Progress(
            BarColumn(),
            "{task.percentage:>3.0f}%",
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=cast(IO[str], screen), force_terminal=True),
            redirect_stdout=False,
            redirect_stderr=False,
            auto_refresh=False,  # which would need a thread, for which there may be no room
        ) as bar,
    ):
        task, due = bar.add_task("", total=None), Due(BAR_EVERY)
        try:
            yield lambda done, total: bar.update(
                task, completed=done, total=total, refresh=due() or done == total
            )
        finally:
            screen.is_ending = True
