"""What goes to stderr: one line each, beginning with the name of the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

#: Control characters steer a terminal instead of being shown.
_STEERING = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0))}


class _Manner:
    """How this command speaks."""

    quiet = False


def complain(message: str, status: int) -> int:
    """Say what went wrong, in one line, and pass the exit status on."""
    sys.stdout.flush()
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


def note(message: str) -> None:
    """Say what is no error: with ``-q`` nothing."""
    if not _Manner.quiet:
        say(message)


def tell(line: str) -> None:
    """Print a line on stderr; a job goes on though nobody can be told of it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        lead_nowhere(sys.stderr)


def lead_nowhere(stream: TextIO) -> None:
    """Let what could not be printed go: the interpreter would try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(text: str) -> str:
    """``text`` without line breaks, and with control characters spelt out.

    The name of a file may contain anything: it must neither forge a line nor steer the terminal.
    """
    return " ".join(text.splitlines()).translate(_STEERING)
