"""Work for the pool of workers that writes down who did what, and some that goes wrong.

A work writes a line into a log for each try at a task, so that a test sees who did what, how
often and when, whatever became of the process. Where a test must act while a task is running, the
task waits at a FIFO until the test opens its other end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from addcow_mp import FileError
from addcow_mp.engine.done_map import TOP, DoneMap, Totals
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import WorkerContext


@dataclass(frozen=True)
class Plain:
    """Writes a line for the try, with task and process, and reports the weight as moved."""

    directory: Path

    def __call__(self, task: Task, worker: WorkerContext) -> Totals:  # noqa: ARG002 - a slot is for boards
        with (self.directory / "log").open("a") as log:
            log.write(f"{task.number} {os.getpid()}\n")
        self.act(task)
        return Totals(bytes_moved=task.weight, clusters_moved=task.stop - task.first)

    def act(self, task: Task) -> None:
        """What else there is to do."""


@dataclass(frozen=True)
class Bad(Plain):
    """Does something bad at the tasks ``at``; ``how`` says what."""

    at: frozenset[int]
    how: str

    def act(self, task: Task) -> None:
        if task.number in self.at:
            BADNESS[self.how]()


def refuse() -> None:
    raise FileError(path="base.img", action="read it", reason="Input/output error", errno=5)


def divide() -> None:
    raise ZeroDivisionError("division\nby zero")


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_myself() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)


def leave() -> None:
    os._exit(3)


BADNESS: dict[str, Callable[[], None]] = {
    "refuse": refuse,
    "divide": divide,
    "kill": kill_myself,
    "end": end_myself,
    "leave": leave,
}


@dataclass(frozen=True)
class DiesOnce(Plain):
    """Is killed at the first try of each of the tasks ``at``."""

    at: frozenset[int]

    def act(self, task: Task) -> None:
        if task.number in self.at:
            try:
                (self.directory / f"dead-{task.number}").touch(exist_ok=False)
            except FileExistsError:
                return
            kill_myself()


@dataclass(frozen=True)
class Waits(Plain):
    """Waits at the FIFO ``gate`` at the tasks ``at``, and then does ``how``, if anything."""

    at: frozenset[int]
    how: str = ""

    @property
    def gate(self) -> Path:
        return self.directory / "gate"

    def act(self, task: Task) -> None:
        if task.number in self.at:
            self.gate.read_bytes()
            BADNESS.get(self.how, lambda: None)()


@dataclass(frozen=True)
class Marks:
    """Marks the first half of a task on the board and counts it; at ``fatal`` then dies."""

    board: DoneMap
    fatal: int

    def __call__(self, task: Task, worker: WorkerContext) -> Totals:
        half = (task.first + task.stop) // 2
        self.board.marks(TOP).set(task.first, half)
        self.board.add(worker.slot, (half - task.first,))
        if task.number == self.fatal:
            kill_myself()
        self.board.marks(TOP).set(half, task.stop)
        self.board.add(worker.slot, (task.stop - half,))
        return Totals()


def tasks_of(count: int) -> list[Task]:
    return [Task(number, 16 * number, 16 * number + 16, 100 + number) for number in range(count)]


def log_of(directory: Path) -> list[tuple[int, int]]:
    """Every try so far: task and process."""
    log = directory / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(number), int(process)) for number, process in map(str.split, lines)]


def tries(directory: Path) -> dict[int, list[int]]:
    """The processes that tried each task."""
    found: dict[int, list[int]] = {}
    for number, process in log_of(directory):
        found.setdefault(number, []).append(process)
    return found
