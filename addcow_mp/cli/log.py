"""The log of a farm's job: a file with one JSON object a line, one for each event.

A full disk under the log is reported once and never ends the work.
"""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime

from addcow_mp.cli.jsontext import as_line
from addcow_mp.cli.messages import say
from addcow_mp.device.files import cannot_open, kind_of
from addcow_mp.device.permissions import PRIVATE_MODE
from addcow_mp.errors import ImageError

#: What every line of a log begins with.
_FIRST = b'{"time": '


def _refuse_foreign(path: str, fd: int) -> None:
    """Nothing is appended to a file that is no log: it may be somebody's disk.

    Nor to what may keep a writer waiting: a FIFO, a terminal.
    """
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev:
        return
    if not stat.S_ISREG(status.st_mode):
        problem = f"it is {kind_of(status.st_mode)}, and a log is a regular file; name one"
        raise ImageError(path=path, problem=problem)
    if os.pread(fd, len(_FIRST), 0) not in (b"", _FIRST):
        raise ImageError(path=path, problem="it is there and no log; name another file")


def _opened(path: str) -> int:
    """Open a log, which is made if it is not there, without waiting for anybody."""
    waits = os.O_NONBLOCK | os.O_NOCTTY
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | waits
    try:
        # It tells digests of disks that not everybody may be allowed to read.
        fd = os.open(path, flags, PRIVATE_MODE)
    except (OSError, ValueError) as error:
        raise cannot_open(path, "write the log there", error) from error
    try:
        _refuse_foreign(path, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Log:
    """A file with one JSON object a line, each appended at once; None is no log."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._fd: int | None = None
        if path is not None:
            self._fd = _opened(path)

    def write(self, event: str, **about: object) -> None:
        """Append one event."""
        if self._fd is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = as_line({"time": now, "event": event, **about}) + "\n"
        try:
            os.write(self._fd, line.encode())
        except OSError as error:
            self.close()
            say(f"{self._path}: cannot write the log any more: {error.strerror}")

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
