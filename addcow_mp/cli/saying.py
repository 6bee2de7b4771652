"""What goes to stderr: one line each, beginning with the name of the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

#: Control characters steer a terminal instead of being shown; of them line breaks stay.
_STEERING = {
    code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) != "\n"
}


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
    return plain(" ".join(text.splitlines()))


def plain(text: str) -> str:
    """``text`` with control characters spelt out: a name must not steer the terminal."""
    return text.translate(_STEERING)
