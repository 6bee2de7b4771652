"""What goes to stderr: one line each, beginning with the name of the command.

While a job runs, lines go there in the background (:mod:`addcow_mp.cli.background`): it waits for
no reader. Before and after it they are written at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from addcow_mp.cli.background import Background

#: Control characters steer a terminal instead of being shown.
_STEERING = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0))}


class _Manner:
    """How this command speaks, and what it has still to say."""

    quiet = False
    background: Background | None = None
    #: Said before the job began, to be told once it runs or has not begun.
    early: tuple[str, ...] = ()
    #: What clears the line of a bar, before another line is put in its place.
    clearing = ""


def begin() -> None:
    """Speak as a new command does."""
    _Manner.quiet, _Manner.background, _Manner.early = False, None, ()


@contextmanager
def in_background() -> Iterator[None]:
    """During the block nobody waits for whoever reads stderr; at its end, the rest is told."""
    from addcow_mp.cli.background import Background

    try:
        sys.stderr.flush()
        _Manner.background = Background(sys.stderr.fileno())
    except (OSError, ValueError):  # a stream of a program that calls this
        _Manner.background = None
    tell_the_rest()
    try:
        yield
    finally:
        background, _Manner.background = _Manner.background, None
        if background is not None:
            background.finish()


def tell_the_rest() -> None:
    """Tell what was kept back before the job began."""
    early, _Manner.early = _Manner.early, ()
    for line in early:
        tell(line)


def report_failure(message: str, status: int) -> int:
    """Say what went wrong, in one line, and pass the exit status on."""
    sys.stdout.flush()
    tell_the_rest()
    say(message)
    return status


def say(message: str) -> None:
    """Say something in one line, in the name of the command."""
    tell(f"addcow: {one_line(message)}")


def hush(*, quiet: bool) -> None:
    """Whether nothing but errors is said from now on."""
    _Manner.quiet = quiet


def warn(messages: Sequence[str]) -> None:
    """Say what the user should know although the command goes on."""
    for message in messages:
        note(f"warning: {message}")


def warn_early(messages: Sequence[str]) -> None:
    """Warn of something before the job begins, which shall not wait for a reader."""
    if not _Manner.quiet:
        lines = (f"addcow: warning: {one_line(message)}" for message in messages)
        _Manner.early = (*_Manner.early, *lines)


def note(message: str) -> None:
    """Say what is no error: with ``-q`` nothing."""
    if not _Manner.quiet:
        say(message)


def tell(line: str) -> None:
    """Print a line on stderr; a job goes on though nobody can be told of it."""
    if _Manner.background is not None:
        _Manner.background.keep(f"{_Manner.clearing}{line}\n")
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        lead_nowhere(sys.stderr)


def write_progress(line: str) -> None:
    """Print a line on stderr that may be missed: progress."""
    if _Manner.background is not None:
        _Manner.background.offer(f"{line}\n")
    else:
        tell(line)


class Screen:
    """What draws a bar on a terminal: a file for rich, whose frames may be missed.

    Once it ``is_ending``, nothing is: the terminal gets its cursor back.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        self._text = ""
        self.is_ending = False

    def write(self, text: str) -> int:
        """Take a part of a frame."""
        self._text += text
        return len(text)

    def flush(self) -> None:
        """Show the frame."""
        text, self._text = self._text, ""
        background = _Manner.background
        if background is None:
            return
        if self.is_ending:
            background.keep(text)
        elif text:
            background.offer(text)

    def isatty(self) -> bool:
        """It is one."""
        return True


@contextmanager
def on_screen() -> Iterator[Screen]:
    """A screen for a bar of one line, which other lines take the place of."""
    screen = Screen()
    _Manner.clearing = "\r\x1b[2K"
    try:
        yield screen
    finally:
        _Manner.clearing = ""


def lead_nowhere(stream: TextIO) -> None:
    """Let what could not be printed go: the interpreter would try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(text: str) -> str:
    """``text`` without line breaks, and with control characters spelt out.

    The name of a file may contain anything: it must neither forge a line nor steer the terminal.
    """
    return " ".join(text.splitlines()).translate(_STEERING)
