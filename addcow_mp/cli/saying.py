"""What goes to stderr: one line each, beginning with the name of the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def complain(message: str, status: int) -> int:
    """Say what went wrong, in one line, and pass the exit status on."""
    sys.stdout.flush()
    print(f"addcow: {one_line(message)}", file=sys.stderr)
    return status


def warn(messages: Sequence[str]) -> None:
    """Say what the user should know although the command goes on."""
    for message in messages:
        print(f"addcow: warning: {one_line(message)}", file=sys.stderr)


def one_line(text: str) -> str:
    """``text`` without line breaks, which the name of a file may well contain."""
    return " ".join(text.splitlines())
