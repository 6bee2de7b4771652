"""Decides when finished work is published, and publishes it in a thread.

Worker processes continue with later tasks during a checkpoint: a disk that syncs must not keep
processors waiting, and idle workers must not keep the disk waiting. One checkpoint runs at a time.
"""

from __future__ import annotations

import threading
import time

from addcow_mp.engine.done_map import MOST_UNPUBLISHED, TOP, DoneMap
from addcow_mp.engine.publisher import Finished, Publisher
from addcow_mp.engine.tasks import Task
from addcow_mp.format.bits import Run, between, merged
from addcow_mp.format.geometry import Geometry

#: A checkpoint is due after so many bytes or so many seconds. Another half may be moved while it
#: runs: a crash costs 512 MiB or 5 seconds of repeated work, whichever is less. Smaller checkpoints
#: would make the disk commit its journal all the time.
CHECKPOINT_BYTES = MOST_UNPUBLISHED // 2
CHECKPOINT_SECONDS = 2.5


class Checkpoints:
    """Publishes the finished clusters of one job, one checkpoint at a time."""

    def __init__(self, publisher: Publisher, done_map: DoneMap, geometry: Geometry) -> None:
        self._publisher = publisher
        self._done_map = done_map
        self._geometry = geometry
        #: Clusters of tasks that had ended at the last checkpoint, and of those that ended since.
        self._ended: list[Run] = []
        self._new: list[Run] = []
        #: What was counted when the last checkpoint began: all counters, and bytes moved.
        self._counted = done_map.totals
        self._total = done_map.total
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def add(self, task: Task) -> None:
        """Enter a task that has ended."""
        self._new.append((task.first, task.stop))

    def begin_if_due(self) -> None:
        """Begin a checkpoint if one is due; :meth:`finish` raises its error.

        While one runs, the next begins when it has its full size, and the caller waits for the
        first: what is unpublished stays limited.
        """
        full = self._done_map.total - self._total >= CHECKPOINT_BYTES
        late = time.monotonic() - self._last >= CHECKPOINT_SECONDS
        if full or (late and not self._is_running and self._has_new_work):
            self._begin()

    @property
    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def _has_new_work(self) -> bool:
        return bool(self._new) or self._done_map.totals != self._counted

    def _under_way(self) -> list[Run]:
        """Return the clusters of all tasks that had not ended at the last checkpoint."""
        return list(between(self._ended, 0, self._geometry.clusters))

    def _begin(self) -> None:
        self.wait()
        if self.failed:
            return
        finished = self._collect()
        thread = threading.Thread(target=self._publish, args=(finished, self._total))
        try:
            thread.start()
        except RuntimeError:  # no room for a thread: the caller publishes
            self._publish(finished, self._total)
        else:
            self._thread = thread

    def _collect(self) -> Finished:
        """Return what the next checkpoint publishes."""
        self._last = time.monotonic()
        self._counted, self._total = self._done_map.totals, self._done_map.total
        new, self._new = list(merged(sorted(self._new))), []
        self._ended = list(merged(sorted((*self._ended, *new))))
        return Finished(new, self._under_way())

    def _publish(self, finished: Finished, total: int, *, last: bool = False) -> None:
        try:
            self._publisher.checkpoint(finished, self._geometry, last=last)
            self._done_map.publish(total)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for the checkpoint that runs: its files must stay open."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint has failed, so that further work cannot be published."""
        return self._error is not None

    def finish(self) -> None:
        """Publish the rest. Raises the error of this or an earlier checkpoint."""
        self.wait()
        marks = self._done_map.marks(TOP)
        has_more = self._new or any(marks.any(*run) for run in self._under_way())
        if has_more and not self.failed:
            self._publish(self._collect(), self._total, last=True)
        if self._error is not None:
            raise self._error
