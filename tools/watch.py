"""A watch over files with inotify: which file was opened, read, changed or closed, in order.

A watch is set on files and directories and collects every event from then on. It sees every process
and every way of opening, so it can prove that a file was never opened. Directories report what
happens to their entries, not to deeper ones.

Opening with O_PATH is not reported, and neither is reading a name or its attributes.
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
    """An event, and the path of its file: as it was given, or as an entry of a directory."""

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
        """The events since the watch was set, or since the last call, in order."""
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
        # An overflow of the queue has no number: a "?" says that events are missing.
        path = self._paths.get(number, "?")
        for bit, what in _NAMES.items():
            if mask & bit or path == "?":
                yield Event(what, os.path.join(path, entry) if entry else path)
