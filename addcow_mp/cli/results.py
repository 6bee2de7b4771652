"""Standard output, and what is said when it fails: results are late or lost, the job is done.

An output that fails never ends what is under way: the rest goes nowhere, and the end says so. An
output that was made not to wait is waited for.
"""

from __future__ import annotations

import io
import sys
from typing import TextIO

#: The exit status of a command that did its work, and could not tell.
UNTOLD = 1


class _Descriptor(io.FileIO):
    """Descriptor 1 that keeps its first error to itself."""

    error: OSError | None = None

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        """Write, or forget what can no longer be written."""
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
    """What is known of this command's output."""

    descriptor: _Descriptor | None = None
    #: The stream in whose place it is, which would close it.
    replaced: TextIO | None = None
    is_job_done = False
    is_document_printed = False


def begin() -> None:
    """Let standard output fail without ending the command, if it is the process's own."""
    _State.descriptor, _State.is_job_done = None, False
    _State.is_document_printed = False
    old = sys.stdout
    if type(old) is not io.TextIOWrapper:
        return
    old.flush()
    try:
        number = old.fileno()
    except OSError:  # a stream in memory, of a program that calls this
        old.reconfigure(errors="backslashreplace")
        return
    _State.replaced = old
    _State.descriptor = _Descriptor(number, "wb", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_State.descriptor),
        encoding=old.encoding,
        # Names of files are bytes: what the terminal cannot show is no reason to fail.
        errors="backslashreplace",
        line_buffering=old.line_buffering,
    )


def job_is_done() -> None:
    """Whatever comes of the output now, the job is done."""
    _State.is_job_done = True


def document_is_printed() -> None:
    """Standard output has its JSON document: a second one would make both unreadable."""
    _State.is_document_printed = True


def is_document_printed() -> bool:
    """Whether standard output has its JSON document."""
    return _State.is_document_printed


def given_up() -> str:
    """Let go of output that nobody has taken yet; what is to be said of a job that is done."""
    if _State.descriptor is not None and _State.descriptor.error is None:
        _State.descriptor.error = InterruptedError()
    return "; the job is done" if _State.is_job_done else ""


def failed() -> bool:
    """Whether something of the output could not be written."""
    sys.stdout.flush()
    return _error() is not None


def failure() -> str | None:
    """What is to be said of that.

    A query whose reader has gone (a pager, ``head``) has nobody left to tell.
    """
    error = _error()
    if error is None or (isinstance(error, BrokenPipeError) and not _State.is_job_done):
        return None
    done = "the job is done, but its" if _State.is_job_done else "the"
    return f"{done} output cannot be written: {error.strerror}"


def _error() -> OSError | None:
    error = None if _State.descriptor is None else _State.descriptor.error
    return None if isinstance(error, InterruptedError) else error
