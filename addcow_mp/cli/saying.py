"""What goes to stderr: one line each, beginning with the name of the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def complain(message: str, status: int) -> int:
    """Say what went wrong, in one line, and pass the exit status on."""
    sys.stdout.flush()
    one_line = " ".join(message.split("\n"))
    print(f"addcow: {one_line}", file=sys.stderr)
    return status


def warn(messages: Sequence[str]) -> None:
    """Say what the user should know although the command goes on."""
    for message in messages:
        print(f"addcow: warning: {message}", file=sys.stderr)
