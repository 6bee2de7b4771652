"""What commit, flatten and convert share: from a plan to an assignment carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from addcow_mp.device import faults
from addcow_mp.device.access import Access
from addcow_mp.device.files import File
from addcow_mp.device.layer import Layer
from addcow_mp.device.manifest_file import invalidate_all, refuse_unremovable_manifests
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.done_map import DoneMap
from addcow_mp.engine.pool import ParentRole, Pool
from addcow_mp.engine.publisher import Publisher
from addcow_mp.engine.space import SpaceNeeded, refuse_without_space, space_for
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.transfer import OverlayTarget, Target, Totals, Transfer, Which
from addcow_mp.engine.transfer_run import Assignment, run_transfer, workers_for
from addcow_mp.format.geometry import Geometry
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.report import Report
from addcow_mp.units import GiB

#: Bytes that take longer to copy, on any machine, than processes to start.
LARGE = 1 * GiB


@dataclass
class Movement:
    """What a job moves: ``which`` clusters of ``source``, cut into ``tasks``, into ``target``.

    ``publish`` is the overlay whose bits become the given value for what was moved; an add-cow
    target's own bits are published before them. ``frees`` then gives back the space of what was
    moved. ``prepare`` is called when nothing is left to refuse. ``changed``: the layers whose files
    become others by it.
    """

    source: Layer
    geometry: Geometry
    which: Which
    target: Target
    tasks: list[Task]
    publish: tuple[Overlay, int] | None = None
    frees: bool = False
    changed: tuple[Layer, ...] = ()
    prepare: Callable[[], None] = lambda: None

    @property
    def weight(self) -> int:
        """About how many bytes there are to move."""
        return sum(task.weight for task in self.tasks)

    def transfer(self, done_map: DoneMap, options: RunOptions, workers: int) -> Transfer:
        """The work of one task."""
        parts = (self.source, self.geometry, self.which, self.target)
        return Transfer(*parts, done_map, options.copy_options, workers)


def space(movement: Movement, options: RunOptions) -> SpaceNeeded:
    """The space that ``movement`` would take, and give back; nothing is moved."""
    done_map = DoneMap.create((0, 0), 0)
    try:
        work = movement.transfer(done_map, options, 1)
        return space_for(work, movement.tasks, 1, frees=movement.frees)
    finally:
        done_map.close()


def refuse_unwritable(movement: Movement, written: list[File], access: Access) -> None:
    """Raise when a file that the job has open for reading yet could not be changed by it.

    ``written`` are the files that the job will open for writing.
    """
    for file in written:
        access.refuse_unwritable(file)
    for layer in movement.changed:
        refuse_unremovable_manifests(layer)


def move(
    movement: Movement,
    report: Report,
    options: RunOptions,
    hooks: Hooks,
    pool: Pool | None = None,
) -> None:
    """Move the clusters and publish them. Refusals come before the first byte.

    ``pool``: processes that work for several jobs; None = the job starts its own.
    """
    tasks, geometry, target = movement.tasks, movement.geometry, movement.target
    report.warnings = movement.source.warnings()
    below = _published_target(target)
    report.jobs = workers_for(options.jobs, tasks) if pool is None else pool.jobs
    layers = (geometry.clusters, below.geometry.clusters if below is not None else 0)
    done_map = DoneMap.create(layers, report.jobs)
    try:
        overlay, value = movement.publish if movement.publish is not None else (None, 0)
        publisher = Publisher(
            target.file, done_map, overlay=overlay, value=value, backing=below, frees=movement.frees
        )
        work = movement.transfer(done_map, options, max(1, report.jobs))
        refuse_without_space(work, tasks, report.jobs, frees=movement.frees)
        report.working()
        for layer in movement.changed:
            invalidate_all(layer, durable=target.file.durable)
        movement.prepare()
        job = Assignment(work, tasks, geometry, done_map, publisher, movement.source.path)
        job.parent_role = _parent_role(options, work, tasks)
        job.crew = pool
        run_transfer(job, report.jobs, hooks.progress, hooks.stopping)
    finally:
        report.totals = Totals.on(done_map)
        done_map.close()


def _parent_role(options: RunOptions, work: Transfer, tasks: list[Task]) -> ParentRole:
    """What this process does itself: all it can, unless so many workers were asked for."""
    # Fault rules are for workers, and so are limits: this process would exceed them.
    if faults.armed or options.copy_options.is_for_workers:
        return ParentRole.NONE
    if options.jobs is not None:
        return ParentRole.START
    # What is small, or can be cloned, is often done before another process has started.
    small = sum(task.weight for task in tasks) < LARGE
    return ParentRole.FIRST if small or work.may_clone else ParentRole.FULL


def _published_target(target: Target) -> Overlay | None:
    """The add-cow backing whose bits change, if the target is one that has bits."""
    if isinstance(target, OverlayTarget) and not target.overlay.all_allocated:
        return target.overlay
    return None
