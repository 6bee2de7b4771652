"""What commit, flatten and convert share: from a plan to an assignment carried out."""

from __future__ import annotations

from collections.abc import Callable

from addcow_mp.device import faults
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.board import Board
from addcow_mp.engine.plan import Task
from addcow_mp.engine.pool import Part
from addcow_mp.engine.publisher import Publisher
from addcow_mp.engine.run import Assignment, carry_out, workers_for
from addcow_mp.engine.space import refuse_without_space
from addcow_mp.engine.transfer import OverlayTarget, Target, Transfer, Which
from addcow_mp.format.geometry import Geometry
from addcow_mp.jobs.report import Conduct, Report
from addcow_mp.units import GiB

#: Bytes that take longer to copy, on any machine, than processes to start.
LARGE = 1 * GiB


def move(
    source: Layer,
    geometry: Geometry,
    which: Which,
    target: Target,
    tasks: list[Task],
    conduct: Conduct,
    report: Report,
    *,
    publish: tuple[Overlay, int] | None = None,
    frees: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Move the clusters of ``tasks`` from ``source`` into ``target`` and publish them.

    ``publish`` is the overlay whose bits become the given value for what was moved;
    an add-cow target's own bits are published before them. ``frees`` then gives back
    the space of what was moved. ``prepare`` is called when nothing is left to refuse.
    """
    report.warnings = source.warnings()
    below = _published_target(target)
    report.jobs = workers_for(conduct.jobs, tasks, idle=conduct.manner.idle)
    layers = (geometry.clusters, below.geometry.clusters if below is not None else 0)
    board = Board.create(layers, report.jobs)
    try:
        overlay, value = publish if publish is not None else (None, 0)
        publisher = Publisher(
            target.file, board, overlay=overlay, value=value, backing=below, frees=frees
        )
        work = Transfer(source, geometry, which, target, board, conduct.manner, max(1, report.jobs))
        work.stopping = conduct.stopping
        refuse_without_space(work, tasks, report.jobs, frees=frees)
        prepare()
        job = Assignment(work, tasks, geometry, board, publisher, source.path)
        job.idle = conduct.manner.idle
        job.part = _part(conduct, work, tasks)
        report.amount = carry_out(job, report.jobs, conduct.progress, conduct.stopping)
    finally:
        board.close()


def _part(conduct: Conduct, work: Transfer, tasks: list[Task]) -> Part:
    """What this process does itself: all it can, unless so many workers were asked for."""
    # Fault rules are for workers, and so are limits: this process would exceed them.
    if faults.armed or conduct.manner.idle or conduct.manner.rate:
        return Part.NONE
    if conduct.jobs is not None:
        return Part.START
    # What is small, or can be cloned, is often done before another process has started.
    small = sum(task.weight for task in tasks) < LARGE
    return Part.FIRST if small or work.may_clone else Part.FULL


def _published_target(target: Target) -> Overlay | None:
    """The add-cow backing whose bits change, if the target is one that has bits."""
    if isinstance(target, OverlayTarget) and not target.overlay.all_allocated:
        return target.overlay
    return None
