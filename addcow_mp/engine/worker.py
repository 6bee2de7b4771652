"""A worker process, and what a work knows of the process that runs it.

A work is a picklable object that does tasks. The pool calls it in a worker process or in the parent
and passes a :class:`WorkerContext`: the number of the process, its share of a rate limit, and
whether it must stop. A worker process does the tasks that come through its pipe until the parent
closes the pipe.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from addcow_mp.engine.fd_passing import Lent, Received, UnstartedError
from addcow_mp.engine.stop_flag import StopFlag, never
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.throttle import Throttle
from addcow_mp.errors import AddcowError, ResourceError, StoppedError, is_shortage

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

#: The first message of a worker process. It receives no task before.
READY = "ready"

#: The number of the work that a pool is made for; works lent to it have higher numbers.
OWN = 0


@dataclass
class WorkerContext:
    """The process that does a task.

    ``slot``: its number, which selects its counters. ``throttle``: its share of a rate limit.
    ``stopping``: asked in the parent whether the job must stop. ``parent``: the id of the parent
    process, in a worker process.
    """

    slot: int = 0
    throttle: Throttle = field(default_factory=Throttle)
    stop: StopFlag = field(default_factory=StopFlag)
    stopping: Callable[[], bool] = never
    parent: int | None = None

    def must_stop(self) -> bool:
        """Return whether the job must stop. Ends a worker process whose parent has ended.

        No process publishes what an orphan writes, and its locks would block the next try.
        """
        if self.parent is not None and os.getppid() != self.parent:
            os._exit(1)
        if self.stopping():
            self.stop.set()
        return self.stop.is_set

    def check(self, path: str) -> None:
        """Raise :class:`StoppedError` for ``path`` when the job must stop."""
        if self.must_stop():
            raise StoppedError(path=path)

    def spend(self, length: int, path: str) -> None:
        """Sleep as the rate limit demands after ``length`` bytes, as long as the job continues."""
        if self.throttle.rate:
            self.throttle.spend(length, partial(self.check, path))


class Work(Protocol):
    """What a process does with each task."""

    def __call__(self, task: Task, worker: WorkerContext) -> object:
        """Do ``task``; the result is sent to the parent."""


@dataclass(frozen=True)
class Done:
    """A finished task, and its result: a small frozen dataclass."""

    task: Task
    result: Any


@dataclass(frozen=True)
class Failed:
    """A task that was not finished, and why."""

    task: Task
    error: AddcowError


class UnexpectedError(AddcowError):
    """A fault in this program, met by a worker process."""

    template = "unexpected {error}; please report it"


def attempt(work: Work, task: Task, worker: WorkerContext) -> Done | Failed:
    """Do one task and return its result or error; errors of files and users are not raised."""
    try:
        return Done(task, work(task, worker))
    except AddcowError as error:
        return Failed(task, error.without_traceback())
    except Exception as error:
        return Failed(task, _as_addcow_error(error))


def _as_addcow_error(error: Exception) -> AddcowError:
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, OSError) and is_shortage(error):
        return ResourceError.of("work on it", error)
    return UnexpectedError(error=repr(error))


# The worker process


class Order(NamedTuple):
    """A task, and the number of the work that it belongs to."""

    number: int
    task: Task


class Withdrawal(NamedTuple):
    """The message that work ``number`` gets no more tasks."""

    number: int


class Place(NamedTuple):
    """What a worker process is told when it starts.

    ``rate``: its limit in bytes per second. ``passes_limit``: whether it tells the parent that it
    has reached its limit of processor time.
    """

    slot: int
    parent: int
    rate: int = 0
    passes_limit: bool = False


def serve(pipe: Connection, packed: Received, place: Place) -> None:
    """Do the tasks that come through the pipe until it closes. The work is in ``packed``."""
    _set_up_signals(place)
    # Imported modules stay: frequent searches for garbage among them find none.
    gc.set_threshold(50_000)
    own = packed.unpacked()
    try:
        pipe.send(own if isinstance(own, UnstartedError) else READY)
        if not isinstance(own, UnstartedError):
            _Server(pipe, place).serve(own)
    except (EOFError, OSError):
        # No clean-up: the parent has ended or is done, and owns the shared memory.
        os._exit(0)


def _set_up_signals(place: Place) -> None:
    def tell_parent(number: int, _: object) -> None:
        if os.getppid() == place.parent:
            os.kill(place.parent, number)

    if place.passes_limit:
        signal.signal(signal.SIGXCPU, tell_parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGXCPU})


class _Server:
    """The works that a worker process has, each with its context."""

    def __init__(self, pipe: Connection, place: Place) -> None:
        self._pipe = pipe
        self._place = place
        self._throttle = Throttle(place.rate)
        self._works: dict[int, tuple[Work, WorkerContext] | UnstartedError] = {}

    def serve(self, own: tuple[Work, StopFlag]) -> None:
        """Obey the messages of the parent. Ends with an error when the pipe is closed."""
        self._add(OWN, own)
        while True:
            message: Order | Lent | Withdrawal = self._pipe.recv()
            if isinstance(message, Order):
                self._pipe.send((message.number, self._answer(message)))
            elif isinstance(message, Lent):
                self._add(message.number, message.unpacked(self._pipe))
            else:
                self._remove(message.number)

    def _add(self, number: int, received: tuple[Work, StopFlag] | UnstartedError) -> None:
        if isinstance(received, UnstartedError):
            self._works[number] = received
            return
        work, stop = received
        slot, parent = self._place.slot, self._place.parent
        self._works[number] = work, WorkerContext(slot, self._throttle, stop, parent=parent)

    def _answer(self, order: Order) -> Done | Failed:
        known = self._works[order.number]
        if isinstance(known, UnstartedError):
            return Failed(order.task, known)
        work, context = known
        return attempt(work, order.task, context)

    def _remove(self, number: int) -> None:
        """Close what a lent work has open in this process."""
        known = self._works.pop(number)
        if isinstance(known, UnstartedError):
            return
        work, context = known
        close: Callable[[], None] | None = getattr(work, "close", None)
        if close is not None:
            close()
        context.stop.close()
