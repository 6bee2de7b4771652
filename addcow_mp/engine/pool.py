"""The pool: processes that do tasks, and what happens when one of them dies.

The parent owns the processes: one pipe and one sentinel each. A worker that dies (a
file that shrinks under a mapping, the memory killer, a kill) closes its pipe, which
wakes the parent; the task it was at is tried once more alone in a fresh process, and
fails for good when that one dies too. Nobody waits for an answer that cannot come, and
one task's failure is that task's. The parent's death closes the pipes as well, on which
the workers end.

Processes are spawned, never forked: a worker starts from nothing and receives what it
needs, descriptors included, once. The pool knows tasks by their numbers and no images.

With ``jobs`` 0 the same calls are made in this process, one after the other. It can also
take part beside its workers (:class:`Part`): a process less to start, and none at all for a
job that is done before one would stand ready.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from addcow_mp.engine.pace import step_back
from addcow_mp.engine.plan import Task
from addcow_mp.errors import AddcowError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

#: Tasks given to a worker ahead of time, the one it is at included: it never waits for
#: the parent while the parent syncs, and a death costs no more than one of them.
AHEAD = 2

#: Times that a task may meet the death of its worker before it has failed.
TRIES = 2

#: Seconds of work left for which starting processes pays: it takes about half of that.
WORTH = 0.1

#: A worker's first message. Tasks are kept back until it comes.
READY = "ready"

#: Seconds between looks at the progress counters while no result arrives.
TICK = 0.2


class Part(Enum):
    """What part of the work the process takes that hands it out."""

    NONE = "none"
    START = "tasks, as long as its workers are starting: a small job is done by then"
    FULL = "that of one of the processes"
    FIRST = "the same; the others are started if its first tasks take long enough"


SHARING = (Part.FULL, Part.FIRST)


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


class UnstartedError(AddcowError):
    """A worker process ended, or met an error, before it was ready for its first task."""

    template = "a worker process could not start: {cause}"


class UnexpectedError(AddcowError):
    """A fault in this program, met by a worker."""

    template = "unexpected {error}; please report it"


class Work(Protocol):
    """What a worker does with a task; ``slot`` numbers the worker."""

    def __call__(self, task: Task, slot: int) -> object:
        """Do ``task``; what is returned crosses to the parent."""


def usable_cpus() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def attempt(work: Work, task: Task, slot: int) -> Done | Failed:
    """Do one task and say how it went; never raises for what a file or a user can cause."""
    try:
        return Done(task, work(task, slot))
    except AddcowError as error:
        return Failed(task, error)
    except Exception as error:
        return Failed(task, UnexpectedError(error=repr(error)))


class Parcel:
    """Work on its way to a worker, who unpacks it where an error in doing so can be told.

    Packed while the process is being started, as descriptors must be.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing.reduction import ForkingPickler

        return (_Packed, (bytes(ForkingPickler.dumps(self._work)),))


class _Packed:
    """The same at the other end."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def unpacked(self) -> Work | UnstartedError:
        """The work, or what a file had against its being unpacked."""
        import pickle

        try:
            work: Work = pickle.loads(self._content)  # noqa: S301 - the parent's own words
        except (AddcowError, OSError) as error:
            return UnstartedError(cause=str(error))
        return work


def serve(pipe: Connection, parcel: _Packed, slot: int, idle: bool) -> None:
    """A worker's life: do the tasks that come through the pipe until it closes."""
    if idle:
        step_back()
    work = parcel.unpacked()
    try:
        pipe.send(work if isinstance(work, UnstartedError) else READY)
        while not isinstance(work, UnstartedError):
            pipe.send(attempt(work, pipe.recv(), slot))
    except (EOFError, OSError):
        # No tidying up: the parent is gone or done, and the board is its to release.
        os._exit(0)


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    slot: int
    tasks: deque[Task] = field(default_factory=deque)
    ready: bool = False
    used: bool = False
    alone: bool = False

    def give(self, task: Task, *, alone: bool = False) -> bool:
        """Hand over a task; false when the worker has died, as its sentinel will say."""
        try:
            self.pipe.send(task)
        except OSError:
            return False
        self.tasks.append(task)
        self.used, self.alone = True, alone
        return True


class Pool:
    """``jobs`` processes doing ``work``. A context manager: leaving it ends them.

    With ``idle`` they take the disk only when nobody else wants it. ``part`` says what of the
    work this process does; its counter is the one behind the workers'.
    """

    def __init__(
        self, work: Work, jobs: int, *, idle: bool = False, part: Part = Part.NONE
    ) -> None:
        self._work = work
        self._part = part
        self._idle = idle
        self._jobs = jobs
        self._done_here = 0
        self._workers: list[_Worker] = []
        self._waiting: deque[Task] = deque()
        self._suspects: deque[Task] = deque()
        self._tries: dict[int, int] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            _end(worker)
        self._workers.clear()

    def run(
        self, tasks: Sequence[Task], stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[Done | Failed | None]:
        """Do the tasks, yielding each result as it comes, and None at every tick.

        When ``stopping()`` turns true, no new task is begun; those begun are finished.
        """
        if self._jobs == 0:
            yield from self._in_this_process(tasks, stopping)
            return
        self._waiting.extend(tasks)
        if self._part is not Part.FIRST:
            self._start_all()
        while self._waiting or self._suspects or any(worker.tasks for worker in self._workers):
            if stopping():
                self._waiting.clear()
                self._suspects.clear()
            self._hand_out()
            if self._waiting and self._takes_part:
                yield self._attempt(self._waiting.popleft())
                yield from self._collect(patience=0)
            else:
                yield from self._collect(patience=TICK)

    @property
    def _takes_part(self) -> bool:
        return self._part in SHARING or (self._part is Part.START and not self._all_ready)

    def _attempt(self, task: Task) -> Done | Failed:
        """Do a task here; see from it whether the rest is worth other processes."""
        begun = time.monotonic()
        result = attempt(self._work, task, self._jobs)
        seconds = time.monotonic() - begun
        # The very first task also pays for what is done once, and says little about the others.
        if self._part is Part.FIRST and self._done_here and not self._workers:
            left = sum(one.weight for one in self._waiting)
            if seconds * left > WORTH * max(1, task.weight):
                self._start_all()
        self._done_here += 1
        return result

    def _start_all(self) -> None:
        others = self._jobs - (self._part in SHARING)
        for slot in range(min(others, len(self._waiting))):
            self._workers.append(self._start(slot))

    def _in_this_process(
        self, tasks: Sequence[Task], stopping: Callable[[], bool]
    ) -> Iterator[Done | Failed | None]:
        for task in tasks:
            if stopping():
                return
            yield attempt(self._work, task, 0)

    def _start(self, slot: int) -> _Worker:
        import signal
        from multiprocessing import get_context, resource_tracker

        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(theirs, Parcel(self._work), slot, self._idle), daemon=True
        )
        # An interrupt goes to the whole group; the parent decides what it means. Blocked
        # signals stay blocked in the new process, from its first instant on.
        resource_tracker.ensure_running()  # which unblocks them, when it starts its process
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        theirs.close()
        return _Worker(process, ours, slot)

    def _hand_out(self) -> None:
        self._hand_out_suspects()
        # Nobody takes a second task while it may be the last one for somebody else.
        enough = self._all_ready and len(self._waiting) > len(self._workers)
        for depth in range(AHEAD if enough else 1):
            for worker in self._workers:
                free = worker.ready and len(worker.tasks) == depth and not worker.alone
                if self._waiting and free and worker.give(self._waiting[0]):
                    self._waiting.popleft()

    @property
    def _all_ready(self) -> bool:
        return all(worker.ready for worker in self._workers)

    def _hand_out_suspects(self) -> None:
        """What killed a worker is tried again in a fresh process, with nothing else at stake."""
        for worker in list(self._workers):
            if self._suspects and worker.ready and not worker.tasks:
                if worker.used:
                    self._renew(worker)
                elif worker.give(self._suspects[0], alone=True):
                    self._suspects.popleft()

    def _renew(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end(worker)
        self._workers.append(self._start(worker.slot))

    def _collect(self, patience: float) -> Iterator[Done | Failed | None]:
        from multiprocessing.connection import wait

        sources: dict[Any, _Worker] = {}
        for worker in self._workers:
            sources[worker.pipe] = sources[worker.process.sentinel] = worker
        ready = wait(list(sources), timeout=patience)
        for worker in {sources[source].slot: sources[source] for source in ready}.values():
            yield from self._answers(worker)
        yield None

    def _answers(self, worker: _Worker) -> Iterator[Done | Failed]:
        try:
            while worker.pipe.poll():
                result: Done | Failed | UnstartedError | str = worker.pipe.recv()
                if isinstance(result, UnstartedError):
                    raise result
                if isinstance(result, str):
                    worker.ready = True
                    continue
                worker.tasks.popleft()
                worker.alone = False
                yield result
        except (EOFError, OSError):
            yield from self._bury(worker)

    def _bury(self, worker: _Worker) -> Iterator[Failed]:
        """A worker has died: its task is suspect, or has failed; the worker is replaced."""
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        if not worker.ready:
            status = _status(worker.process.exitcode)
            raise UnstartedError(cause=f"it ended with {status}; try --jobs 0")
        if worker.tasks:
            suspect = worker.tasks.popleft()
            self._waiting.extendleft(reversed(worker.tasks))
            self._tries[suspect.number] = self._tries.get(suspect.number, 0) + 1
            if self._tries[suspect.number] < TRIES:
                self._suspects.append(suspect)
            else:
                yield Failed(suspect, DiedError(status=_status(worker.process.exitcode)))
        if self._waiting or self._suspects:
            self._workers.append(self._start(worker.slot))


def _end(worker: _Worker) -> None:
    """End a worker that has nothing to do, or whose work was not asked for any more."""
    worker.pipe.close()
    # It would end on the closed pipe; one that hangs in the kernel must not keep the parent.
    worker.process.kill()
    worker.process.join()


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        import signal

        return f"signal {signal.Signals(-code).name}"
    return f"status {code}"
