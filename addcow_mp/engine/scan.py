"""The scan engine: tasks that only read, done by processes, and their results as they come.

Compare, manifest, read-back, verify, and the check and the plan of a farm differ in what a task
reads and in how results are combined. What they share is decided here:

- *Processes*: as many as asked for, else the usable processors. One small task is done in this
  process. Under a rate limit there is one process: more would only share the limit.
- *The parent* does tasks too, and starts other processes when its first tasks take long enough. It
  does none under a rate limit, which it would exceed, and where tasks map files: a bad sector under
  a mapping ends the process.
- *Stopping*: no further task begins, and the scan raises :class:`RestartsError`, since a scan
  keeps no record of what it has done.
- *Progress*: the weight of finished tasks.
- *Failures*: ``failed`` gets a failed task, and raises or returns a result instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from addcow_mp.engine.pool import ParentRole, Pool, usable_cpus, workers_for
from addcow_mp.engine.stop_flag import never
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.transfer_run import OnProgress, no_progress
from addcow_mp.engine.worker import Failed, Work
from addcow_mp.errors import RestartsError, StoppedError


@dataclass(frozen=True)
class ScanOptions:
    """The processes of a scan.

    ``jobs``: processes as asked for; None = as many as pay. ``rate``: bytes per second for all
    processes together; 0 = no limit. ``maps``: tasks map files. ``many``: so many tasks that
    processes are started at once.
    ``counts``: the weight of a task is a number of things, not of bytes, and does not tell whether
    another process pays.
    """

    jobs: int | None = None
    rate: int = 0
    maps: bool = False
    many: bool = False
    counts: bool = False

    def processes(self, tasks: Sequence[Task]) -> int:
        """The number of processes to start for ``tasks``, without this one."""
        most = 1 if self.rate else usable_cpus()
        if self.counts:
            return most if self.jobs is None else self.jobs
        return workers_for(self.jobs, tasks, most)

    @property
    def parent_role(self) -> ParentRole:
        """What this process does itself."""
        if self.rate or self.maps:
            return ParentRole.NONE
        return ParentRole.FULL if self.many else ParentRole.FIRST


@dataclass(frozen=True)
class ScanHooks:
    """Functions of the caller; ``name`` is what errors call the thing that is scanned.

    ``stopping``: whether the user wants to stop. ``enough``: whether further results change
    nothing. ``failed``: returns a result in place of a failed task, or raises.
    """

    name: str
    failed: Callable[[Failed], Any]
    stopping: Callable[[], bool] = never
    enough: Callable[[], bool] = never
    progress: OnProgress = no_progress


def scan_pool(
    work: Work, tasks: Sequence[Task], options: ScanOptions, stopping: Callable[[], bool]
) -> Pool:
    """The processes of a scan, for callers that distribute tasks themselves."""
    role, rate = options.parent_role, options.rate
    return Pool(work, options.processes(tasks), parent_role=role, rate=rate, stopping=stopping)


def scan(
    work: Work, tasks: Sequence[Task], options: ScanOptions, hooks: ScanHooks
) -> Iterator[tuple[Task, Any]]:
    """Do all tasks; yields each with its result, in the order in which they end.

    Raises :class:`RestartsError` when it is stopped before all are done.
    """
    done, left, total = 0, len(tasks), sum(task.weight for task in tasks)
    with scan_pool(work, tasks, options, hooks.stopping) as pool:
        for result in pool.run(tasks, hooks.enough):
            if isinstance(result, Failed) and isinstance(result.error, StoppedError):
                continue
            answer = hooks.failed(result) if isinstance(result, Failed) else result.result
            done, left = done + result.task.weight, left - 1
            yield result.task, answer
            hooks.progress(done, total)
    if left and not hooks.enough():
        raise RestartsError(path=hooks.name)
