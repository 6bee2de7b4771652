"""Messages on stderr: one line each, beginning with the name of the command.

While a job runs, a background thread writes them (:mod:`addcow_mp.cli.background`), so that the job
does not wait for a slow reader. Before and after it they are written at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from addcow_mp.cli.background import Background

#: Control characters, which a terminal obeys and does not show, and how they are shown.
#: So are Unicode's own line breaks: programs that read lines split there.
_CONTROL = {
    code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
}


class _State:
    """The settings of this command, and lines that are not yet written."""

    quiet = False
    background: Background | None = None
    #: Warnings from before the job, written when it runs or when the command ends without it.
    early: tuple[str, ...] = ()
    #: What erases a progress bar before another line takes its place.
    erase = ""


def begin() -> None:
    """Reset the state for a new command."""
    _State.quiet, _State.background, _State.early = False, None, ()


@contextmanager
def in_background() -> Iterator[None]:
    """Write lines in the background during the block; wait for them at its end."""
    from addcow_mp.cli.background import Background

    try:
        sys.stderr.flush()
        _State.background = Background(sys.stderr.fileno())
    except (OSError, ValueError):  # the stream of a program that calls this package
        _State.background = None
    write_early_warnings()
    try:
        yield
    finally:
        background, _State.background = _State.background, None
        if background is not None:
            background.finish()


def set_quiet(*, quiet: bool) -> None:
    """Print errors only, if ``quiet``."""
    _State.quiet = quiet


def report_failure(message: str, status: int) -> int:
    """Print why the command failed, in one line; returns ``status``, its exit status."""
    sys.stdout.flush()
    write_early_warnings()
    say(message)
    return status


def say(message: str) -> None:
    """Print one line in the name of the command."""
    write_line(f"addcow: {one_line(message)}")


def note(message: str) -> None:
    """Print a line that is no error: with ``-q``, nothing."""
    if not _State.quiet:
        say(message)


def warn(messages: Sequence[str]) -> None:
    """Print warnings: the command continues."""
    for message in messages:
        note(f"warning: {message}")


def warn_early(message: str) -> None:
    """Print a warning later, so that the job need not wait for a slow reader to begin."""
    if not _State.quiet:
        _State.early = (*_State.early, f"addcow: warning: {one_line(message)}")


def write_early_warnings() -> None:
    """Print the warnings from before the job."""
    early, _State.early = _State.early, ()
    for line in early:
        write_line(line)


def write_line(line: str) -> None:
    """Print a line on stderr; errors of the stream are ignored."""
    if _State.background is not None:
        _State.background.write(f"{_State.erase}{line}\n")
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # the job continues without its messages
        discard(sys.stderr)


def write_progress(line: str) -> None:
    """Print a line of progress, which may be dropped if the reader is slow."""
    if _State.background is not None:
        _State.background.write(f"{line}\n", droppable=True)
    else:
        write_line(line)


class Screen:
    """The terminal, as a file for a progress bar whose frames may be dropped.

    When ``is_ending`` is set, no frame is dropped any more: the terminal gets its cursor back.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        self._text = ""
        self.is_ending = False

    def write(self, text: str) -> int:
        """Add a part of a frame."""
        self._text += text
        return len(text)

    def flush(self) -> None:
        """Show the frame."""
        text, self._text = self._text, ""
        if text and _State.background is not None:
            _State.background.write(text, droppable=not self.is_ending)

    def isatty(self) -> bool:
        """True: it is a terminal."""
        return True


@contextmanager
def on_screen() -> Iterator[Screen]:
    """A screen for a progress bar of one line, which other lines replace."""
    _State.erase = "\r\x1b[2K"
    try:
        yield Screen()
    finally:
        _State.erase = ""


def discard(stream: TextIO) -> None:
    """Discard output that cannot be written: the interpreter would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(text: str) -> str:
    """``text`` in one line, with control characters escaped.

    A file name may contain any byte: it must neither forge a line nor control the terminal. A line
    break in it is escaped too: with a blank instead it would be the name of another file.
    """
    return text.translate(_CONTROL)


def print_manifests_gone(paths: Sequence[str]) -> None:
    """Print which manifests a job has removed without making new ones."""
    for path in paths:
        print(one_line(f"Removed the manifest '{path}', which no longer applies."))
