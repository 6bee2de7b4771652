"""Writing to a slow reader in the background, so that the job does not wait.

A thread writes the texts, each as a whole. *Droppable* texts (progress) are dropped, oldest first,
if the reader is slow; all others arrive, however late. The descriptor is used as it is: whether it
blocks is a property that other programs share.

A thread that still waits for its reader ends with the process.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from contextlib import suppress
from typing import NamedTuple

#: Droppable texts that may wait: a slower reader misses some.
MOST = 16

#: Seconds that the last droppable texts may take at the end.
GRACE = 1.0


class _Text(NamedTuple):
    data: bytes
    droppable: bool


class Background:
    """Writes to the descriptor ``fd``, which stays open until the process ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting: deque[_Text] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        #: Whether the thread is writing a text that is not droppable.
        self._is_writing = False
        self._ended = False
        self._failed = False

    def write(self, text: str, *, droppable: bool = False) -> None:
        """Write ``text``, unless it is ``droppable`` and the reader is slow."""
        with self._changed:
            waiting = [one for one in self._waiting if one.droppable]
            if droppable and len(waiting) >= MOST:
                self._waiting.remove(waiting[0])
            self._waiting.append(_Text(text.encode(errors="backslashreplace"), droppable))
            self._changed.notify_all()
        if self._thread is None:
            thread = threading.Thread(target=self._write_all, daemon=True)
            with suppress(RuntimeError):  # no room for a thread: finish() writes
                thread.start()
                self._thread = thread

    def _write_all(self) -> None:
        while (text := self._next()) is not None:
            self._write_one(text)

    def _next(self) -> _Text | None:
        """Wait for the next text; None at the end."""
        with self._changed:
            self._is_writing = False
            while not self._waiting and not self._ended:
                self._changed.wait()
            text = self._waiting.popleft() if self._waiting else None
            self._is_writing = text is not None and not text.droppable
            return text

    def _write_one(self, text: _Text) -> None:
        if not self._failed:
            try:
                _write_whole(self._fd, text.data)
            except OSError:  # the reader has gone
                self._failed = True

    def finish(self) -> None:
        """Wait a moment for droppable texts, and as long as it takes for all others."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(GRACE)
        with self._changed:
            self._waiting = deque(one for one in self._waiting if not one.droppable)
            is_owed = bool(self._waiting) or self._is_writing
        if self._thread is None:
            for text in self._waiting:
                self._write_one(text)
        elif is_owed:
            self._thread.join()


def _write_whole(fd: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            wait_until_writable(fd)


def wait_until_writable(fd: int) -> None:
    """Wait for the reader of a descriptor that does not block."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
