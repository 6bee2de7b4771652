"""A crew: threads of one process that do many calls, so that their waits for the disk overlap."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

from addcow_mp.device.turns import Turn

T = TypeVar("T")


class Crew:
    """The threads are started when they are first needed, and end with :meth:`close`."""

    def __init__(self) -> None:
        self._turn = Turn()
        self._work: SimpleQueue[_Calls[object] | None] = SimpleQueue()
        self._threads = 0

    def run(self, calls: Sequence[Callable[[], T]], most: int) -> list[T]:
        """The results of ``calls``, done by up to ``most`` threads; without any, by this one.

        Raises what one of them raises.
        """
        size = min(most, len(calls))
        if size <= 1 or not self._has_threads(size):
            return [call() for call in calls]
        work = _Calls(calls)
        for _ in range(size):
            self._work.put(work)  # type: ignore[arg-type]
        for _ in range(size):
            error = work.ended.get()
            if error is not None:
                raise error
        return [work.results[number] for number in range(len(calls))]

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self._threads):
            self._work.put(None)
        self._threads = 0

    def _has_threads(self, wanted: int) -> bool:
        """Start the threads that are missing; whether there are any."""
        while self._threads < wanted:
            try:
                # A process that ends does not wait for them.
                threading.Thread(target=self._serve, daemon=True).start()
            except RuntimeError:  # no room for another one
                break
            self._threads += 1
        return self._threads > 0

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work.do(self._turn)


class _Calls(Generic[T]):
    """Calls that several threads do, and their results by number."""

    def __init__(self, calls: Sequence[Callable[[], T]]) -> None:
        self._left = enumerate(calls)
        self.results: dict[int, T] = {}
        #: For each thread that is done: nothing, or the error that has ended it.
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def do(self, turn: Turn) -> None:
        """Do calls until none is left."""
        try:
            while self._do_next(turn):
                pass
        except BaseException as error:
            self.ended.put(error)
        else:
            self.ended.put(None)

    def _do_next(self, turn: Turn) -> bool:
        with turn:
            number, call = next(self._left, (-1, None))
            if call is None:
                return False
            self.results[number] = call()
        return True
