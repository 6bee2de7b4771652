"""The pool: processes that do tasks, and what happens when one of them dies.

The parent owns the processes: one pipe and one sentinel each. A worker that dies (a
file that shrinks under a mapping, the memory killer, a kill) closes its pipe, which
wakes the parent; the task it was at is tried once more in a fresh process, and
fails for good when that one dies too. Nobody waits for an answer that cannot come, and
one task's failure is that task's. The parent's death closes the pipes as well, on which
the workers end.

Processes are spawned, never forked: a worker starts from nothing and receives what it
needs, descriptors included, once. The pool knows tasks by their numbers and no images.

With ``jobs`` 0 the same calls are made in this process, one after the other, and so they are
when the system has no room for any process; with room for some, these do the work. It can also
take part beside its workers (:class:`ParentRole`): a process less to start, and none at all for a
job that is done before one would stand ready.

A pool is made for one work. Others can be lent to it while it runs: their tasks go before those
of its own, in the same processes, and what comes of either is kept for whoever asks for it.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Any

from addcow_mp.engine.fd_passing import (
    LentWork,
    PackedWork,
    ReceivedWork,
    UnstartedError,
    Work,
    lend,
)
from addcow_mp.engine.tasks import Task
from addcow_mp.errors import AddcowError, ResourceError, is_shortage

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

#: Tasks given to a worker ahead of time, the one it is at included: it never waits for
#: the parent while the parent syncs, and a death costs no more than one of them.
AHEAD = 2

#: Times that a task may usually meet the death of its worker before it has failed, and that
#: workers may die before they have begun.
TRIES = 2

#: Seconds of work left for which starting processes pays: it takes about half of that.
WORTH = 0.1

#: What is said of a task whose worker died, where there is no room for another one.
_NOT_AGAIN = "an error, and there is no room to start another,"

#: A worker's first message. Tasks are kept back until it comes.
READY = "ready"

#: Seconds between looks at the progress counters while no result arrives.
TICK = 0.2


#: Signals that are blocked in workers: they go to the whole group, or to each process, and the
#: parent decides what they mean.
_FOR_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU}


class ParentRole(Enum):
    """What part of the work the process takes that hands it out."""

    NONE = "none"
    START = "tasks, as long as its workers are starting: a small job is done by then"
    FULL = "that of one of the processes"
    FIRST = "the same; the others are started if its first tasks take long enough"


SHARING = (ParentRole.FULL, ParentRole.FIRST)

#: The number of the work that a pool is made for; those lent to it have others.
OWN = 0

Order = tuple[int, Task]
"""A task, and the number of the work that it belongs to."""


@dataclass(frozen=True)
class Done:
    """A task that was finished, and what came of it: a small frozen dataclass."""

    task: Task
    result: Any


@dataclass(frozen=True)
class Failed:
    """A task that was not finished, and why."""

    task: Task
    error: AddcowError


class DiedError(AddcowError):
    """The process that worked on a task ended without an answer, every time."""

    template = "a worker process ended with {status} at this place"


class UnexpectedError(AddcowError):
    """A fault in this program, met by a worker."""

    template = "unexpected {error}; please report it"


def usable_cpus() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def attempt(work: Work, task: Task, slot: int) -> Done | Failed:
    """Do one task and say how it went; never raises for what a file or a user can cause."""
    try:
        return Done(task, work(task, slot))
    except AddcowError as error:
        return Failed(task, error.without_traceback())
    except Exception as error:
        return Failed(task, _explained(error))


def _explained(error: Exception) -> AddcowError:
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, OSError) and is_shortage(error):
        return ResourceError.of("work on it", error)
    return UnexpectedError(error=repr(error))


@dataclass(frozen=True)
class _Withdrawal:
    """Word that no more tasks of work ``number`` will come."""

    number: int


def serve(pipe: Connection, packed: ReceivedWork, slot: int, parent: int) -> None:
    """A worker's life: do the tasks that come through the pipe until it closes.

    ``parent`` is whom to tell that the limit of processor time is reached; 0 = nobody.
    """
    _pass_on_the_limit(parent)
    # What is imported stays: looking for garbage among it again and again finds none.
    gc.set_threshold(50_000)
    work = packed.unpacked()
    try:
        pipe.send(work if isinstance(work, UnstartedError) else READY)
        if not isinstance(work, UnstartedError):
            _serve(pipe, {OWN: work}, slot)
    except (EOFError, OSError):
        # No tidying up: the parent is gone or done, and the board is its to release.
        os._exit(0)


def _who_heeds_the_limit() -> int:
    """This process, if it knows what to do about SIGXCPU."""
    return os.getpid() if callable(signal.getsignal(signal.SIGXCPU)) else 0


def _pass_on_the_limit(parent: int) -> None:
    """Let ``parent`` know when this process reaches its limit of processor time."""

    def tell(number: int, _: object) -> None:
        if parent and os.getppid() == parent:
            os.kill(parent, number)

    if parent:
        signal.signal(signal.SIGXCPU, tell)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGXCPU})


def _serve(pipe: Connection, works: dict[int, Work | UnstartedError], slot: int) -> None:
    while True:
        message: Order | LentWork | _Withdrawal = pipe.recv()
        if isinstance(message, LentWork):
            works[message.number] = message.received(pipe)
        elif isinstance(message, _Withdrawal):
            _release(works.pop(message.number))
        else:
            number, task = message
            work = works[number]
            if isinstance(work, UnstartedError):
                pipe.send((number, Failed(task, work)))
            else:
                pipe.send((number, attempt(work, task, slot)))


def _release(work: Work | UnstartedError) -> None:
    """Let go of what a lent work has open here."""
    close: Callable[[], None] | None = getattr(work, "close", None)
    if close is not None:
        close()


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    slot: int
    orders: deque[Order] = field(default_factory=deque)
    works: set[int] = field(default_factory=lambda: {OWN})
    ready: bool = False
    used: bool = False

    def give(self, order: Order, work: Work) -> bool:
        """Hand over a task; false when the worker has died, as its sentinel will say."""
        number, _ = order
        try:
            if number not in self.works:
                lend(self.pipe, number, work)
                self.works.add(number)
            self.pipe.send(order)
        except OSError:
            return False
        self.orders.append(order)
        self.used = True
        return True

    def withdraw(self, number: int) -> None:
        """Let the worker forget a work that was lent."""
        if number in self.works:
            self.works.discard(number)
            try:
                self.pipe.send(_Withdrawal(number))
            except OSError:
                return  # it has died, as its sentinel will say


class Pool:
    """``jobs`` processes doing ``work``. A context manager: leaving it ends them.

    ``parent_role`` says what of the work this process does; its counter is behind the workers'.
    ``tries``: how many times a task may meet the death of its worker before it has failed.
    """

    def __init__(
        self,
        work: Work,
        jobs: int,
        *,
        parent_role: ParentRole = ParentRole.NONE,
        tries: int = TRIES,
    ) -> None:
        self._works: dict[int, Work] = {OWN: work}
        self._numbers = count(OWN + 1)
        self._parent_role = parent_role
        self._jobs = jobs
        self._most_tries = tries
        self._done_here = 0
        #: Whether other processes are worth their start; with Part.FIRST that shows in time.
        self._pays = parent_role is not ParentRole.FIRST
        self._workers: list[_Worker] = []
        #: Whether the system refused to start a process.
        self._has_no_room = False
        self._waiting: deque[Order] = deque()
        self._suspects: deque[Order] = deque()
        self._tries: Counter[tuple[int, int]] = Counter()
        self._unstarted = 0
        #: Of each work: tasks that are still to come back, and results that nobody took yet.
        self._left: Counter[int] = Counter()
        self._results: defaultdict[int, list[Done | Failed]] = defaultdict(list)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            _end(worker)
        self._workers.clear()

    @property
    def jobs(self) -> int:
        """How many processes there may be; the counter of this one is behind theirs."""
        return self._jobs

    def start(self, most: int) -> None:
        """Start up to ``most`` processes now: there will be tasks before they stand ready."""
        for slot in self._free_slots()[:most]:
            self._engage(slot)

    def run(
        self,
        tasks: Sequence[Task],
        stopping: Callable[[], bool] = lambda: False,
        work: Work | None = None,
    ) -> Iterator[Done | Failed | None]:
        """Do the tasks, yielding each result as it comes, and None at every tick.

        When ``stopping()`` turns true, no new task is begun; those begun are finished. The
        tasks are those of the pool's own work, or of ``work``, lent to it until they are done.
        """
        number = OWN if work is None else self._lend(work)
        try:
            # What is lent goes first: somebody waits for it.
            self._add(number, tasks, first=number != OWN)
            while self._left[number] or self._results[number]:
                if stopping():
                    self.abandon(number)
                yield from self.turn(number)
                yield None
        except UnstartedError:
            yield from self.take(number)
            raise
        finally:
            if work is not None:
                self._withdraw(number)

    def _lend(self, work: Work) -> int:
        number = next(self._numbers)
        self._works[number] = work
        return number

    def _withdraw(self, number: int) -> None:
        self.abandon(number)
        for worker in self._workers:
            worker.withdraw(number)
        del self._works[number]

    def _add(self, number: int, tasks: Sequence[Task], *, first: bool) -> None:
        orders = [(number, task) for task in tasks]
        if first:
            self._waiting.extendleft(reversed(orders))
        else:
            self._waiting.extend(orders)
        self._left[number] += len(orders)

    def add(self, tasks: Sequence[Task], *, first: bool = False) -> None:
        """Take further tasks of the pool's own work; what comes of them :meth:`turn` says."""
        self._add(OWN, tasks, first=first)

    def was_retried(self, task: Task) -> bool:
        """Whether a worker has died at this task of the pool's own."""
        return bool(self._tries[OWN, task.number])

    def abandon(self, number: int = OWN) -> list[Task]:
        """Forget the tasks that nobody has begun; returns them."""
        dropped = [task for owner, task in (*self._waiting, *self._suspects) if owner == number]
        self._waiting = deque(one for one in self._waiting if one[0] != number)
        self._suspects = deque(one for one in self._suspects if one[0] != number)
        self._left[number] -= len(dropped)
        return dropped

    def turn(self, number: int = OWN) -> list[Done | Failed]:
        """Hand out tasks, do one here if this process takes part, and return what has come back.

        Waits a moment for it. Results of other works are kept for those who ask for them.
        """
        self._staff()
        self._hand_out()
        if not self._results[number]:
            if self._waiting and self._takes_part:
                order = self._waiting.popleft()
                self._file(order[0], self._attempt(order))
                self._staff()
                self._gather(patience=0)
            else:
                self._gather(patience=TICK)
        return self.take(number)

    def take(self, number: int = OWN) -> list[Done | Failed]:
        """What has come back and was not taken yet."""
        return self._results.pop(number, [])

    def _file(self, number: int, result: Done | Failed) -> None:
        self._left[number] -= 1
        self._results[number].append(result)

    @property
    def _takes_part(self) -> bool:
        starting = self._parent_role is ParentRole.START and not self._all_ready
        alone = self._jobs == 0 or (self._has_no_room and not self._workers)
        return alone or self._parent_role in SHARING or starting

    def _attempt(self, order: Order) -> Done | Failed:
        """Do a task here; see from it whether the rest is worth other processes."""
        number, task = order
        begun = time.monotonic()
        result = attempt(self._works[number], task, self._jobs)
        seconds = time.monotonic() - begun
        # The very first task also pays for what is done once, and says little about the others.
        if self._parent_role is ParentRole.FIRST and self._done_here and not self._pays:
            left = sum(one.weight for _, one in self._waiting)
            self._pays = seconds * left > WORTH * max(1, task.weight)
        self._done_here += 1
        return result

    def _staff(self) -> None:
        """Start processes, as many as have something to do."""
        free = self._free_slots() if self._pays else []
        if free:
            wanted = len(self._waiting) - sum(1 for worker in self._workers if not worker.orders)
            for slot in free[: max(0, wanted)]:
                self._engage(slot)

    def _free_slots(self) -> list[int]:
        """The numbers of processes that could still be started."""
        others = self._jobs - (self._parent_role in SHARING)
        if self._has_no_room or len(self._workers) >= others:
            return []
        return sorted(set(range(others)) - {worker.slot for worker in self._workers})

    def _engage(self, slot: int) -> None:
        """Start a process; where the system has no room for it, go on with fewer.

        With none at all this process does the work itself.
        """
        if self._has_no_room:
            return
        try:
            self._workers.append(self._start(slot))
        except OSError as error:
            if not is_shortage(error):
                raise
            self._has_no_room = True

    def _start(self, slot: int) -> _Worker:
        from multiprocessing import get_context

        ours, theirs = get_context("spawn").Pipe()
        try:
            return _Worker(self._spawn(theirs, slot), ours, slot)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    def _spawn(self, theirs: Connection, slot: int) -> SpawnProcess:
        from multiprocessing import get_context, resource_tracker

        arguments = (theirs, PackedWork(self._works[OWN]), slot, _who_heeds_the_limit())
        process = get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        # Requests to stop go to the whole group; the parent decides what they mean. Blocked
        # signals stay blocked in the new process, from its first instant on.
        resource_tracker.ensure_running()  # which unblocks them, when it starts its process
        old = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        return process

    def _hand_out(self) -> None:
        self._hand_out_suspects()
        # Nobody takes a second task while it may be the last one for somebody else.
        enough = self._all_ready and len(self._waiting) > len(self._workers)
        for depth in range(AHEAD if enough else 1):
            for worker in self._workers:
                free = worker.ready and len(worker.orders) == depth
                if self._waiting and free and self._give(worker, self._waiting[0]):
                    self._waiting.popleft()

    def _give(self, worker: _Worker, order: Order) -> bool:
        return worker.give(order, self._works[order[0]])

    @property
    def _all_ready(self) -> bool:
        return all(worker.ready for worker in self._workers)

    def _hand_out_suspects(self) -> None:
        """What killed a worker is tried again in a fresh process."""
        if self._has_no_room:
            self._fail_suspects()
        for worker in list(self._workers):
            if self._suspects and worker.ready and not worker.orders:
                if worker.used:
                    self._renew(worker)
                elif self._give(worker, self._suspects[0]):
                    self._suspects.popleft()

    def _fail_suspects(self) -> None:
        while self._suspects:
            number, task = self._suspects.popleft()
            self._file(number, Failed(task, DiedError(status=_NOT_AGAIN)))

    def _renew(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end(worker)
        self._engage(worker.slot)

    def _gather(self, patience: float) -> None:
        """File what the workers have answered, waiting for it as long as that."""
        if not self._workers:
            return
        from multiprocessing.connection import wait

        sources: dict[Any, _Worker] = {}
        for worker in self._workers:
            sources[worker.pipe] = sources[worker.process.sentinel] = worker
        ready = wait(list(sources), timeout=patience)
        for worker in {sources[source].slot: sources[source] for source in ready}.values():
            self._answers(worker)

    def _answers(self, worker: _Worker) -> None:
        try:
            while worker.pipe.poll():
                answer: tuple[int, Done | Failed] | UnstartedError | str = worker.pipe.recv()
                if isinstance(answer, UnstartedError):
                    raise answer
                if isinstance(answer, str):
                    worker.ready = True
                    continue
                worker.orders.popleft()
                self._file(*answer)
        except (EOFError, OSError):
            self._bury(worker)

    def _bury(self, worker: _Worker) -> None:
        """A worker has died: its task is suspect, or has failed; the worker is replaced."""
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        self._unstarted += not worker.ready
        if self._unstarted >= TRIES:
            status = _status(worker.process.exitcode)
            raise UnstartedError(cause=f"it ended with {status}; try --jobs 0")
        if worker.orders:
            self._suspect(worker.orders.popleft(), worker)
            self._waiting.extendleft(reversed(worker.orders))
        if self._waiting or self._suspects:
            self._engage(worker.slot)

    def _suspect(self, order: Order, worker: _Worker) -> None:
        number, task = order
        self._tries[number, task.number] += 1
        if self._tries[number, task.number] < self._most_tries:
            self._suspects.append(order)
        else:
            status = _status(worker.process.exitcode)
            self._file(number, Failed(task, DiedError(status=status)))


def _end(worker: _Worker) -> None:
    """End a worker that has nothing to do, or whose work was not asked for any more."""
    worker.pipe.close()
    # It would end on the closed pipe; one that hangs in the kernel must not keep the parent.
    worker.process.kill()
    worker.process.join()


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"status {code}"
