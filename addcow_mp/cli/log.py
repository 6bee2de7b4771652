"""The log of a farm job: a file with one JSON object a line, one for each event.

An error of the log, such as a full disk, is reported once and never ends the job.
"""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime

from addcow_mp.cli.farm_results import describe, describe_unexamined
from addcow_mp.cli.jsontext import as_line
from addcow_mp.cli.listing import NOT_EXAMINED
from addcow_mp.cli.messages import say
from addcow_mp.device.files import cannot_open, kind_of
from addcow_mp.device.permissions import PRIVATE_MODE
from addcow_mp.errors import ImageError
from addcow_mp.farm.farm_job import Event
from addcow_mp.farm.plan import Plan, State, Step
from addcow_mp.farm.result import ImageResult

#: The first bytes of every line of a log.
_FIRST = b'{"time": '

_EVENTS = {State.IDLE: "image-idle", State.LEFT: "image-left"}


class FarmLog:
    """Appends an object for each event to the file at ``path``; None = no log."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._fd: int | None = None

    def __call__(self, event: Event) -> None:
        """Log ``event``. Raises :class:`ImageError` for a file that is no log."""
        if isinstance(event, Plan):
            self._begin(event)
        elif isinstance(event, Step):
            operation = event.image_job.spec.operation
            self._write("image-begun", filename=event.path, operation=operation)
        elif isinstance(event, ImageResult):
            self._write(_EVENTS.get(event.state, f"image-{event.state}"), **describe(event))
        else:
            counts = {str(state): event.count(state) for state in State if event.count(state)}
            self._write("farm-ended", operation=event.plan.spec.operation, **counts)

    def _begin(self, plan: Plan) -> None:
        if self._path is not None:
            self._fd = _opened(self._path)
        operation = plan.spec.operation
        self._write("farm-begun", operation=operation, images=len(plan.steps))
        for one in plan.unexamined:
            self._write(NOT_EXAMINED, **describe_unexamined(one, operation))

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _write(self, event: str, **keys: object) -> None:
        if self._fd is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = as_line({"time": now, "event": event, **keys}) + "\n"
        try:
            os.write(self._fd, line.encode())
        except OSError as error:
            self.close()
            say(f"{self._path}: cannot write the log any more: {error.strerror}")


def _opened(path: str) -> int:
    """Open or create a log. Opening waits for no other program."""
    no_wait = os.O_NONBLOCK | os.O_NOCTTY
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | no_wait
    try:
        # It holds digests of disks that not every user may read.
        fd = os.open(path, flags, PRIVATE_MODE)
    except (OSError, ValueError) as error:
        raise cannot_open(path, "write the log there", error) from error
    try:
        _refuse_foreign(path, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_foreign(path: str, fd: int) -> None:
    """Refuse what is no log, such as a disk, and what may block, such as a FIFO or terminal."""
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev:
        return
    if not stat.S_ISREG(status.st_mode):
        problem = f"it is {kind_of(status.st_mode)}, and a log is a regular file; name one"
        raise ImageError(path=path, problem=problem)
    if os.pread(fd, len(_FIRST), 0) not in (b"", _FIRST):
        raise ImageError(path=path, problem="it exists and is no log; name another file")
