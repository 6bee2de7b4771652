"""Lines on their way to a reader who may not read: the job does not wait for them.

They are written by a thread of their own. *Offered* lines, of progress, are dropped when the reader
does not keep up, the oldest first; *kept* lines come late, but they come. The descriptor is used as
it is: whether it blocks is a property that other programs share. Lines are written whole.

A thread that is stuck ends with the process.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from typing import NamedTuple

#: Offered lines that wait at most: a reader who is further behind misses some.
MOST = 16

#: Seconds for the last offered lines, when all is done.
GRACE = 1.0


class _Text(NamedTuple):
    data: bytes
    kept: bool


class Background:
    """Writes to the descriptor ``fd``, which stays open as long as the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting: deque[_Text] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._writes_kept = False
        self._ended = False
        self._failed = False

    def offer(self, text: str) -> None:
        """Write ``text`` if the reader keeps up."""
        self._add(_Text(text.encode(errors="backslashreplace"), kept=False))

    def keep(self, text: str) -> None:
        """Write ``text``, however late."""
        self._add(_Text(text.encode(errors="backslashreplace"), kept=True))

    def _add(self, text: _Text) -> None:
        with self._changed:
            offered = [one for one in self._waiting if not one.kept]
            if not text.kept and len(offered) >= MOST:
                self._waiting.remove(offered[0])
            self._waiting.append(text)
            self._changed.notify_all()
        self._start()

    def _start(self) -> None:
        """Start the thread; without room for one, what is kept is written at the end."""
        if self._thread is None:
            thread = threading.Thread(target=self._write, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return
            self._thread = thread

    def _write(self) -> None:
        while (text := self._next()) is not None:
            self._write_one(text)

    def _next(self) -> _Text | None:
        with self._changed:
            self._writes_kept = False
            while not self._waiting and not self._ended:
                self._changed.wait()
            text = self._waiting.popleft() if self._waiting else None
            self._writes_kept = text is not None and text.kept
            return text

    def _write_one(self, text: _Text) -> None:
        """Write it, unless nobody is there any more."""
        if not self._failed:
            try:
                write_whole(self._fd, text.data)
            except OSError:
                self._failed = True

    def finish(self) -> None:
        """Give the reader a moment for what was offered, and as long as it takes for the rest."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is None:
            self._write_kept()
            return
        self._thread.join(GRACE)
        with self._changed:
            self._waiting = deque(one for one in self._waiting if one.kept)
            owed = bool(self._waiting) or self._writes_kept
        if owed:
            self._thread.join()

    def _write_kept(self) -> None:
        while self._waiting:
            text = self._waiting.popleft()
            if text.kept:
                self._write_one(text)


def write_whole(fd: int, data: bytes) -> None:
    """Write all of ``data``; a descriptor that does not wait is waited for."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            wait_until_writable(fd)


def wait_until_writable(fd: int) -> None:
    """Wait for the reader of a descriptor that was made not to wait."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
