"""The pool: starts worker processes, deals out tasks to them, and handles the death of one.

The parent owns the processes: one pipe and one sentinel each. A worker process that dies (a file
that shrinks under a mapping, the memory killer, a kill) closes its pipe, which wakes the parent.
Its task is tried once more in a fresh process and fails if that process dies too; other tasks are
not affected. When the parent dies, the pipes close and the worker processes end.

Processes are spawned, never forked. Each receives its work and the descriptors that the work needs
once. The pool knows numbers of tasks and no images.

With ``jobs`` 0, or when the system has no room for a process, the parent does the tasks itself, one
after the other. It can also take part beside its workers (:class:`ParentRole`): one process less to
start, and none for a job that ends before another process would be ready.

A pool is made for one work. Other works can be lent to it while it runs: their tasks precede those
of its own work, in the same processes. Results are kept for each work until they are asked for.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from addcow_mp.engine.fd_passing import Packed, UnstartedError, lend
from addcow_mp.engine.stop_flag import StopFlag, never
from addcow_mp.engine.tasks import TASK_BYTES, Task
from addcow_mp.engine.throttle import Throttle, share_of
from addcow_mp.engine.worker import (
    OWN,
    Done,
    Failed,
    Order,
    Place,
    Withdrawal,
    Work,
    WorkerContext,
    attempt,
    serve,
)
from addcow_mp.errors import AddcowError, ResourceError, is_shortage

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

#: Tasks that a worker process has at a time, the current one included: it does not wait for the
#: parent while the parent syncs, and its death affects one task.
AHEAD = 2

#: How often a task may meet the death of its process before it fails, and how many processes may
#: die before their first task.
TRIES = 2

#: Seconds of remaining work for which more processes pay: they start in about half of that.
WORTH = 0.1

#: Seconds between two steps of a pool while no result arrives.
TICK = 0.2

#: The status of a task whose process died and cannot be replaced.
_NO_ROOM_AGAIN = "an error, and there is no room to start another,"

#: Signals that are blocked in worker processes: the parent, which also receives them, handles them.
_FOR_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU}


class ParentRole(Enum):
    """The part of the work that the parent does."""

    NONE = "none"
    START = "tasks, until its worker processes are ready: a small job ends before that"
    FULL = "as much as a worker process"
    FIRST = "the same; worker processes start when its first tasks take long enough"


SHARING = (ParentRole.FULL, ParentRole.FIRST)


class DiedError(AddcowError):
    """Each process that worked on a task ended without an answer."""

    template = "a worker process ended with {status} at this place"


def usable_cpus() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0))


def workers_for(jobs: int | None, tasks: Sequence[Task], most: int | None = None) -> int:
    """Return how many processes to start: ``jobs``, by default ``most`` or the usable processors.

    A single small task is done in this process: starting another takes longer.
    """
    if jobs is not None:
        return min(jobs, len(tasks))
    if sum(task.weight for task in tasks) <= TASK_BYTES:
        return 0
    return min(most or usable_cpus(), len(tasks))


class _Assigned(NamedTuple):
    """A work of the pool, and its context in the parent."""

    work: Work
    context: WorkerContext


@dataclass
class _Worker:
    """A worker process as the parent sees it: its orders, and the works that it has."""

    process: SpawnProcess
    pipe: Connection
    slot: int
    orders: deque[Order] = field(default_factory=deque)
    works: set[int] = field(default_factory=lambda: {OWN})
    ready: bool = False
    used: bool = False

    def give(self, order: Order, assigned: _Assigned) -> bool:
        """Send a task. Returns false when the process has died, as its sentinel will show."""
        try:
            if order.number not in self.works:
                lend(self.pipe, order.number, (assigned.work, assigned.context.stop))
                self.works.add(order.number)
            self.pipe.send(order)
        except OSError:
            return False
        self.orders.append(order)
        self.used = True
        return True

    def withdraw(self, number: int) -> None:
        """Make the process close a lent work."""
        if number in self.works:
            self.works.discard(number)
            try:
                self.pipe.send(Withdrawal(number))
            except OSError:
                return  # it has died, as its sentinel will show

    def end(self) -> None:
        """End a process that is idle or whose work is no longer needed."""
        self.pipe.close()
        # It would end on the closed pipe; one that hangs in the kernel must not block the parent.
        self.process.kill()
        self.process.join()

    @property
    def exit_status(self) -> str:
        """How the process ended, for an error."""
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"status {code}"


def run_here(
    work: Work,
    tasks: Sequence[Task],
    stopping: Callable[[], bool],
    enough: Callable[[], bool],
    rate: int = 0,
) -> Iterator[Done | Failed]:
    """Do the tasks one after the other in this process, as a pool without processes does."""
    context = WorkerContext(0, Throttle(rate), StopFlag(), stopping)
    for task in tasks:
        if context.must_stop() or enough():
            return
        yield attempt(work, task, context)


class Pool:
    """``jobs`` processes that do ``work``. A context manager: leaving it ends them.

    ``parent_role``: the part that the parent takes; its slot is behind those of the workers.
    ``tries``: how often a task may meet the death of its process before it fails. ``rate``: bytes
    per second for all processes together, 0 = no limit. ``stopping``: asked whether all must stop.
    """

    def __init__(
        self,
        work: Work,
        jobs: int,
        *,
        parent_role: ParentRole = ParentRole.NONE,
        tries: int = TRIES,
        rate: int = 0,
        stopping: Callable[[], bool] = never,
    ) -> None:
        self.jobs = jobs
        self._rate = share_of(rate, jobs)
        self._throttle = Throttle(self._rate)
        self._assigned = {OWN: self._assign(work, stopping)}
        self._numbers = count(OWN + 1)
        self._parent_role = parent_role
        self._most_tries = tries
        self._done_here = 0
        #: Whether more processes are worth their start; with ParentRole.FIRST this is measured.
        self._pays = parent_role is not ParentRole.FIRST
        self._workers: list[_Worker] = []
        #: Whether the system refused to start a process.
        self._has_no_room = False
        self._waiting: deque[Order] = deque()
        #: Tasks whose process died, to be tried again.
        self._retries: deque[Order] = deque()
        #: Parts of a task whose process died: any of them may have ended it.
        self._suspects: deque[Order] = deque()
        self._suspected: set[tuple[int, int]] = set()
        self._deaths: Counter[tuple[int, int]] = Counter()
        #: Processes that died before they were ready.
        self._unstarted = 0
        #: For each work: its unfinished tasks, and its results that were not asked for yet.
        self._unfinished: Counter[int] = Counter()
        self._results: defaultdict[int, list[Done | Failed]] = defaultdict(list)

    def _assign(self, work: Work, stopping: Callable[[], bool]) -> _Assigned:
        return _Assigned(work, WorkerContext(self.jobs, self._throttle, StopFlag(), stopping))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._assigned[OWN].context.stop.close()

    # What a caller asks for

    def start(self, most: int) -> None:
        """Start up to ``most`` processes now, before there are tasks for them."""
        for slot in self._free_slots()[:most]:
            self._start_worker(slot)

    def run(
        self, tasks: Sequence[Task], enough: Callable[[], bool] = never
    ) -> Iterator[Done | Failed]:
        """Do the tasks and yield each result as it arrives.

        When ``enough()`` is true or all must stop, no further task begins.
        """
        self.add(tasks)
        yield from self._steps(OWN, enough)

    def run_lent(
        self,
        work: Work,
        tasks: Sequence[Task],
        stopping: Callable[[], bool],
        enough: Callable[[], bool] = never,
    ) -> Iterator[Done | Failed]:
        """Do the tasks of another work, as :meth:`run` does; it is returned afterwards."""
        number = next(self._numbers)
        assigned = self._assigned[number] = self._assign(work, stopping)
        try:
            assigned.context.stop.share()
        except OSError as error:
            raise ResourceError.of("get memory to share with other processes", error) from error
        try:
            # Lent tasks precede others: a job waits for them.
            self._add(number, tasks, first=True)
            yield from self._steps(number, enough)
        finally:
            self._withdraw(number)

    def add(self, tasks: Sequence[Task], *, first: bool = False) -> None:
        """Add tasks of the pool's own work; :meth:`step` returns their results."""
        self._add(OWN, tasks, first=first)

    def step(self, number: int = OWN) -> list[Done | Failed]:
        """Deal out tasks, do one here if the parent takes part, and return new results.

        Waits a moment for results. Those of other works are kept.
        """
        self._start_workers()
        self._deal_out()
        if not self._results[number]:
            wait = TICK
            if self._waiting and self._parent_works:
                self._do_here(self._waiting.popleft())
                self._start_workers()
                wait = 0
            self._receive_answers(wait)
        return self._results.pop(number, [])

    def was_retried(self, task: Task) -> bool:
        """Return whether a process died at this task of the pool's own work."""
        key = OWN, task.number
        return key in self._suspected or bool(self._deaths[key])

    def stop(self) -> None:
        """Tell all processes to end their tasks of the pool's own work."""
        self._assigned[OWN].context.stop.set()

    def drop_waiting(self, number: int = OWN) -> list[Task]:
        """Drop and return the tasks that have not begun."""
        dropped: list[Task] = []
        for orders in (self._waiting, self._retries, self._suspects):
            dropped += [one.task for one in orders if one.number == number]
            kept = [one for one in orders if one.number != number]
            orders.clear()
            orders.extend(kept)
        self._unfinished[number] -= len(dropped)
        return dropped

    # Works

    def _add(self, number: int, tasks: Sequence[Task], *, first: bool) -> None:
        orders = [Order(number, task) for task in tasks]
        if first:
            self._waiting.extendleft(reversed(orders))
        else:
            self._waiting.extend(orders)
        self._unfinished[number] += len(orders)

    def _steps(self, number: int, enough: Callable[[], bool]) -> Iterator[Done | Failed]:
        context = self._assigned[number].context
        try:
            while self._unfinished[number] or self._results[number]:
                if context.must_stop() or enough():
                    self.drop_waiting(number)
                yield from self.step(number)
        except UnstartedError:
            yield from self._results.pop(number, [])
            raise

    def _withdraw(self, number: int) -> None:
        self.drop_waiting(number)
        for worker in self._workers:
            worker.withdraw(number)
        self._assigned.pop(number).context.stop.close()

    def _record(self, number: int, result: Done | Failed) -> None:
        self._unfinished[number] -= 1
        self._results[number].append(result)

    # The parent's own part

    @property
    def _parent_works(self) -> bool:
        starting = self._parent_role is ParentRole.START and not self._all_ready
        alone = self.jobs == 0 or (self._has_no_room and not self._workers)
        return alone or self._parent_role in SHARING or starting

    def _do_here(self, order: Order) -> None:
        """Do a task in the parent; measure whether the others are worth more processes."""
        begun = time.monotonic()
        work, context = self._assigned[order.number]
        self._record(order.number, attempt(work, order.task, context))
        seconds = time.monotonic() - begun
        # The first task includes one-time costs, and says little about the others.
        if self._parent_role is ParentRole.FIRST and self._done_here and not self._pays:
            left = sum(one.task.weight for one in self._waiting)
            self._pays = seconds * left > WORTH * max(1, order.task.weight)
        self._done_here += 1

    # Starting processes

    def _start_workers(self) -> None:
        """Start as many processes as there are tasks for."""
        free = self._free_slots() if self._pays else []
        if free:
            wanted = len(self._waiting) - sum(1 for worker in self._workers if not worker.orders)
            for slot in free[: max(0, wanted)]:
                self._start_worker(slot)

    def _free_slots(self) -> list[int]:
        """Return the slots of processes that could still be started."""
        others = self.jobs - (self._parent_role in SHARING)
        if self._has_no_room or len(self._workers) >= others:
            return []
        return sorted(set(range(others)) - {worker.slot for worker in self._workers})

    def _start_worker(self, slot: int) -> None:
        """Start a process. Without room for it those that exist do the work, or the parent."""
        if self._has_no_room:
            return
        try:
            self._workers.append(self._new_worker(slot))
        except OSError as error:
            if not is_shortage(error):
                raise
            self._has_no_room = True

    def _new_worker(self, slot: int) -> _Worker:
        from multiprocessing import get_context

        self._assigned[OWN].context.stop.share()
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

        work, context = self._assigned[OWN]
        # This process passes the limit on only if it handles the signal itself.
        handles_limit = callable(signal.getsignal(signal.SIGXCPU))
        place = Place(slot, os.getpid(), self._rate, passes_limit=handles_limit)
        arguments = (theirs, Packed((work, context.stop)), place)
        process = get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        # Requests to stop reach the whole process group, and the parent handles them. Signals that
        # are blocked here are blocked in the new process from its first instruction on.
        resource_tracker.ensure_running()  # its process unblocks them, so it starts before
        old = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        return process

    # Dealing out tasks

    @property
    def _all_ready(self) -> bool:
        return all(worker.ready for worker in self._workers)

    def _deal_out(self) -> None:
        self._deal_out_retries()
        # No process gets a second task that may be the last one for another process.
        many = self._all_ready and len(self._waiting) > len(self._workers)
        for depth in range(AHEAD if many else 1):
            for worker in self._workers:
                free = worker.ready and len(worker.orders) == depth
                if self._waiting and free and self._give(worker, self._waiting[0]):
                    self._waiting.popleft()

    def _give(self, worker: _Worker, order: Order) -> bool:
        return worker.give(order, self._assigned[order.number])

    def _deal_out_retries(self) -> None:
        """Try tasks whose process died again; those that are suspected alone in fresh processes."""
        self._fail_without_room()
        for worker in list(self._workers):
            if worker.orders or not worker.ready:
                continue
            if self._retries and worker.used:
                self._workers.remove(worker)
                worker.end()
                self._start_worker(worker.slot)
                continue
            orders = self._retries or self._suspects
            if orders and self._give(worker, orders[0]):
                orders.popleft()

    def _fail_without_room(self) -> None:
        """Fail tasks that no worker can try again: they might end this process."""
        while self._has_no_room and (self._retries or (self._suspects and not self._workers)):
            number, task = (self._retries or self._suspects).popleft()
            self._record(number, Failed(task, DiedError(status=_NO_ROOM_AGAIN)))

    # Answers

    def _receive_answers(self, wait_for: float) -> None:
        """Record the answers of the workers; wait up to ``wait_for`` seconds for the first."""
        if not self._workers:
            return
        from multiprocessing.connection import wait

        sources: dict[Any, _Worker] = {}
        for worker in self._workers:
            sources[worker.pipe] = sources[worker.process.sentinel] = worker
        ready = wait(list(sources), timeout=wait_for)
        for worker in {sources[source].slot: sources[source] for source in ready}.values():
            self._read_answers(worker)

    def _read_answers(self, worker: _Worker) -> None:
        try:
            while worker.pipe.poll():
                answer: tuple[int, Done | Failed] | UnstartedError | str = worker.pipe.recv()
                if isinstance(answer, UnstartedError):
                    raise answer
                if isinstance(answer, str):
                    worker.ready = True
                    continue
                worker.orders.popleft()
                self._record(*answer)
        except (EOFError, OSError):
            self._replace_dead(worker)

    def _replace_dead(self, worker: _Worker) -> None:
        """Replace a process that died; its current task is tried again, or has failed."""
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        self._unstarted += not worker.ready
        if self._unstarted >= TRIES:
            raise UnstartedError(cause=f"it ended with {worker.exit_status}; try --jobs 0")
        if worker.orders:
            self._retry_or_fail(worker.orders.popleft(), worker)
            self._waiting.extendleft(reversed(worker.orders))
        if self._waiting or self._retries or self._suspects:
            self._start_worker(worker.slot)

    def _retry_or_fail(self, order: Order, worker: _Worker) -> None:
        number, task = order
        parts = task.divided()
        if len(parts) > 1:
            self._suspected.update((number, part.number) for part in parts)
            self._suspects.extend(Order(number, part) for part in parts)
            self._unfinished[number] += len(parts) - 1
            return
        self._deaths[number, task.number] += 1
        if self._deaths[number, task.number] < self._most_tries:
            self._retries.append(order)
        else:
            self._record(number, Failed(task, DiedError(status=worker.exit_status)))
