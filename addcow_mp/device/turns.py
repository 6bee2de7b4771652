"""Turns: of several threads of a process, one at a time works; the others wait for the disk.

Each of these threads works on an image of its own. A thread that syncs a file or frees space gives
up its turn until that is done, so that the waits of several images overlap. Threads that work at
the same time would gain nothing: they would wait for the interpreter at each system call.
"""

from __future__ import annotations

import threading


class _Own(threading.local):
    """What a thread knows: its turn, if it takes turns with others."""

    turn: Turn | None = None


_own = _Own()


class Turn:
    """A context in which the threads that share it work one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        _own.turn = self

    def __exit__(self, *_: object) -> None:
        _own.turn = None
        self._lock.release()


class waiting:  # noqa: N801 - used like a function
    """A context in which this thread waits for the disk, and another one has its turn."""

    def __enter__(self) -> None:
        self._turn = _own.turn
        if self._turn is not None:
            self._turn.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._turn is not None:
            self._turn.__enter__()
