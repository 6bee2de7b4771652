"""What commit, flatten and convert share: carrying out transfer plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
from addcow_mp.errors import RestartsError, StoppedError
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
    plans: Sequence[TransferPlan],
    report: Report,
    options: RunOptions,
    hooks: Hooks,
    pool: Pool | None = None,
    follower: Follower | None = None,
) -> None:
    """Carry out ``plans``, one after the other. Refusals come before the first byte of all.

    All that the first plan publishes is durable before the second one begins. ``pool``: processes
    that work for several jobs; None = the job starts its own. ``follower``: removes manifests, and
    can make new ones afterwards; None = they are only removed.
    """
    report.warnings = plans[-1].selection.layer.warnings()
    jobs = [workers_for(options.jobs, one.tasks) if pool is None else pool.jobs for one in plans]
    report.jobs = max(jobs)
    with _done_maps(plans, jobs, report) as done_maps:
        refuse_without_space(plans, options.copy_options, report.jobs)
        report.begin_changes()
        for plan in plans:
            if plan.changed:
                follower = follower or Follower(report, options, hooks)
                follower.remove(plan.changed, durable=plan.target.file.durable)
        done, weight = 0, sum(plan.weight for plan in plans)
        for plan, done_map, count in zip(plans, done_maps, jobs, strict=True):
            done += plan.weight
            step_hooks = hooks.within(done - plan.weight, weight - done)
            _carry_out(plan, done_map, options, step_hooks, _processes(plan, options, count, pool))


@contextmanager
def _done_maps(
    plans: Sequence[TransferPlan], jobs: list[int], report: Report
) -> Iterator[list[DoneMap]]:
    """A done map for each of ``plans``; the report gets what they count."""
    made = list[DoneMap]()
    try:
        for plan, workers in zip(plans, jobs, strict=True):
            published = plan.target.published
            received = 0 if published is None else published.geometry.clusters
            made.append(DoneMap.create((plan.selection.geometry.clusters, received), workers))
        yield made
    finally:
        report.totals = sum(map(Totals.on, made), Totals())
        for done_map in made:
            done_map.close()


def _carry_out(
    plan: TransferPlan, done_map: DoneMap, options: RunOptions, hooks: Hooks, processes: Processes
) -> None:
    plan.prepare()
    run = _run(plan, done_map, options.copy_options)
    try:
        run_transfer(run, processes, hooks.progress, hooks.stopping)
    except StoppedError as error:
        raise (RestartsError(path=run.path) if plan.restarts else error) from None


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
