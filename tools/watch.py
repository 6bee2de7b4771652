"""Who touched which file, in order: inotify, in as many lines as the tests need.

A watch is set on files and directories and collects, from then on, what the kernel tells of
them: opened, read, changed, closed after writing, created. It sees every process and every
way of opening, so that "this was never opened" can be said of a file that others were told
not to touch. Directories report what happens to their entries, not to what lies deeper.

What an open with O_PATH does is not reported, nor is a look at a name or its attributes.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

READ, CHANGED, CLOSED, OPENED, CREATED = 0x01, 0x02, 0x08, 0x20, 0x100

_NAMES = {READ: "read", CHANGED: "changed", CLOSED: "closed", OPENED: "opened", CREATED: "created"}
_EVENT = struct.Struct("iIII")
_AT_ONCE = 64 * 1024


class Event(NamedTuple):
    """What happened, and to which file: its path as it was given, or as an entry of one."""

    what: str
    path: str


class Watch:
    """A watch over ``paths`` for the kinds of events in ``mask``. A context manager."""

    def __init__(self, *paths: str, mask: int = OPENED | READ) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._paths: dict[int, str] = {}
        for path in paths:
            number = libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
            if number < 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), path)
            self._paths[number] = path

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def events(self) -> list[Event]:
        """What has happened since the watch was set or this was asked last, in order."""
        return list(self._events())

    def _events(self) -> Iterator[Event]:
        while True:
            try:
                data = os.read(self._fd, _AT_ONCE)
            except BlockingIOError:
                return
            while data:
                number, mask, _, length = _EVENT.unpack_from(data)
                end = _EVENT.size + length
                entry = os.fsdecode(data[_EVENT.size : end].rstrip(b"\0"))
                yield from self._told(mask, number, entry)
                data = data[end:]

    def _told(self, mask: int, number: int, entry: str) -> Iterator[Event]:
        # An overflow of the queue has no number: whoever reads "?" knows that events are missing.
        path = self._paths.get(number, "?")
        for bit, what in _NAMES.items():
            if mask & bit or path == "?":
                yield Event(what, os.path.join(path, entry) if entry else path)
