"""Standard output: a failure of it never ends a job, and is reported at the end.

After the first error all further output is discarded. A descriptor that does not block is waited
for.
"""

from __future__ import annotations

import io
import sys
from typing import TextIO

#: The exit status of a command that did its work but could not print its result.
NOT_PRINTED = 1


class _Descriptor(io.FileIO):
    """Descriptor 1; it stores its first error and raises none."""

    error: OSError | None = None

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        """Write, or discard after an error."""
        while self.error is None:
            try:
                written = super().write(data)
            except OSError as error:
                self.error = error
                break
            if written is not None:
                return written
            from addcow_mp.cli.background import wait_until_writable

            wait_until_writable(self.fileno())
        return len(data)


class _State:
    """The output of this command."""

    descriptor: _Descriptor | None = None
    #: The former sys.stdout, kept because it would close its descriptor with its end.
    replaced: TextIO | None = None
    is_job_done = False
    is_document_printed = False


def begin() -> None:
    """Replace sys.stdout by a stream that never raises, if it is the process's own."""
    _State.descriptor, _State.is_job_done, _State.is_document_printed = None, False, False
    old = sys.stdout
    if type(old) is not io.TextIOWrapper:
        return
    old.flush()
    try:
        number = old.fileno()
    except OSError:  # a stream in memory, of a program that calls this package
        old.reconfigure(errors="backslashreplace")
        return
    _State.replaced = old
    _State.descriptor = _Descriptor(number, "wb", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_State.descriptor),
        encoding=old.encoding,
        # File names are bytes: one that the terminal cannot show is no reason to fail.
        errors="backslashreplace",
        line_buffering=old.line_buffering,
    )


def job_is_done() -> None:
    """Record that the job is done: only its output can fail now."""
    _State.is_job_done = True


def document_is_printed() -> None:
    """Record that the JSON document is printed: a second one would make both unreadable."""
    _State.is_document_printed = True


def is_document_printed() -> bool:
    """Whether the JSON document of this command is printed."""
    return _State.is_document_printed


def abandon() -> str:
    """Discard output that is not yet written; returns what to add to the command's last message."""
    if _State.descriptor is not None and _State.descriptor.error is None:
        _State.descriptor.error = InterruptedError()
    return "; the job is done" if _State.is_job_done else ""


def failure() -> OSError | None:
    """The error of writing the output, if any."""
    sys.stdout.flush()
    error = None if _State.descriptor is None else _State.descriptor.error
    return None if isinstance(error, InterruptedError) else error


def describe(error: OSError) -> str | None:
    """The message about a :func:`failure`.

    None for a query whose reader has gone (a pager, ``head``), which needs no message.
    """
    if isinstance(error, BrokenPipeError) and not _State.is_job_done:
        return None
    what = "the job is done, but its" if _State.is_job_done else "the"
    return f"{what} output cannot be written: {error.strerror}"
