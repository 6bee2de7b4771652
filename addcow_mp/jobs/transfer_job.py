"""What commit, flatten and convert share: carrying out a transfer plan."""

from __future__ import annotations

from addcow_mp.device import faults
from addcow_mp.device.access import Access
from addcow_mp.device.copying import CopyOptions
from addcow_mp.device.files import File
from addcow_mp.device.manifest_file import refuse_unremovable_manifests
from addcow_mp.engine.done_map import DoneMap, Totals
from addcow_mp.engine.pool import ParentRole, Pool, workers_for
from addcow_mp.engine.publisher import Publisher
from addcow_mp.engine.space import SpaceNeeded, refuse_without_space, space_for
from addcow_mp.engine.transfer import Transfer
from addcow_mp.engine.transfer_plan import TransferPlan
from addcow_mp.engine.transfer_run import Processes, TransferRun, run_transfer
from addcow_mp.jobs.following import Follower
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.report import Estimate, Report
from addcow_mp.units import GiB

#: Copying so many bytes takes longer, on any machine, than starting a process.
LARGE = 1 * GiB


def refuse_unwritable(plan: TransferPlan, written: list[File], access: Access) -> None:
    """Raise when the job, which has opened its files for reading only, could not change them.

    ``written``: the files that the job will open for writing.
    """
    for file in written:
        access.refuse_unwritable(file)
    for layer in plan.changed:
        refuse_unremovable_manifests(layer)


def estimated(plan: TransferPlan, options: RunOptions, bitmap_space: int = 0) -> Estimate:
    """Return what ``plan`` would do; its bits take ``bitmap_space`` bytes."""
    file, space = plan.target.file, space_for(plan, options.copy_options)
    space = SpaceNeeded(space.peak + bitmap_space, space.kept + bitmap_space, space.freed)
    return Estimate(plan.weight, space, file.path, file.first_status.st_dev, plan.gives_back)


def move(
    plan: TransferPlan,
    report: Report,
    options: RunOptions,
    hooks: Hooks,
    pool: Pool | None = None,
    follower: Follower | None = None,
) -> None:
    """Move the clusters and publish them. Refusals come before the first byte.

    ``pool``: processes that work for several jobs; None = the job starts its own. ``follower``:
    removes manifests, and can make new ones afterwards; None = they are only removed.
    """
    selection, target = plan.selection, plan.target
    report.warnings = selection.layer.warnings()
    report.jobs = workers_for(options.jobs, plan.tasks) if pool is None else pool.jobs
    received = target.published.geometry.clusters if target.published is not None else 0
    done_map = DoneMap.create((selection.geometry.clusters, received), report.jobs)
    try:
        refuse_without_space(plan, options.copy_options, report.jobs)
        report.begin_changes()
        if plan.changed:
            follower = follower or Follower(report, options, hooks)
            follower.remove(plan.changed, durable=target.file.durable)
        plan.prepare()
        processes = _processes(plan, options, report.jobs, pool)
        run = _run(plan, done_map, options.copy_options)
        run_transfer(run, processes, hooks.progress, hooks.stopping)
    finally:
        report.totals = Totals.on(done_map)
        done_map.close()


def _run(plan: TransferPlan, done_map: DoneMap, options: CopyOptions) -> TransferRun:
    publisher = Publisher(
        plan.target.file,
        done_map,
        overlay=plan.published,
        value=plan.bit or 0,
        backing=plan.target.published,
        frees=plan.frees,
        by_cluster=plan.selection.leaves_some,
    )
    selection = plan.selection
    work = Transfer(selection, plan.target, done_map, options)
    return TransferRun(
        work, plan.tasks, selection.geometry, done_map, publisher, selection.layer.path
    )


def _processes(plan: TransferPlan, options: RunOptions, jobs: int, pool: Pool | None) -> Processes:
    if pool is not None:
        return Processes(jobs, shared=pool)
    return Processes(jobs, _parent_role(plan, options), options.copy_options.rate)


def _parent_role(plan: TransferPlan, options: RunOptions) -> ParentRole:
    """Return what this process does itself: all it can, unless workers were asked for."""
    # Fault rules are for workers, and so are limits: this process would exceed them.
    if faults.armed or options.copy_options.rate:
        return ParentRole.NONE
    if options.jobs is not None:
        return ParentRole.START
    # A small or cloned transfer often ends before another process has started.
    is_short = plan.weight < LARGE or plan.may_clone(options.copy_options)
    return ParentRole.FIRST if is_short else ParentRole.FULL
