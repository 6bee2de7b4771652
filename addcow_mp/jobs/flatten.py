"""Flatten: copy everything that is not allocated up into the image file.

Afterwards every bit is set, ALL_ALLOCATED is set last, and the raw image file alone is the disk.
What the image held in clusters that were not allocated is overwritten, or emptied where the backing
file has nothing. The names in the header stay. With ``discard`` the ``.add-cow`` file is removed
once the image is durable (:mod:`addcow_mp.jobs.removal`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from addcow_mp.device.chain import DISCARD, READ, WRITE, open_chain
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.engine.allocation import alignment, unallocated_stretches
from addcow_mp.engine.selection import MissingClusters
from addcow_mp.engine.space import SpaceNeeded
from addcow_mp.engine.targets import RawTarget
from addcow_mp.engine.tasks import cut
from addcow_mp.engine.transfer_plan import TransferPlan
from addcow_mp.errors import SpaceError
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.following import FlattenFollower
from addcow_mp.jobs.narrowing import narrow_image, refuse_unnarrowable
from addcow_mp.jobs.options import ALONE, DEFAULTS, NO_HOOKS, Hooks, RunOptions, Shared
from addcow_mp.jobs.readback import Proof, reading_back
from addcow_mp.jobs.removal import refuse_removal, remove
from addcow_mp.jobs.report import Estimate, Outcome, Report, ending, reporting
from addcow_mp.jobs.transfer_job import estimated, move, refuse_unwritable


def flatten(
    path: str,
    *,
    discard: bool = False,
    verifies: bool = False,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    shared: Shared = ALONE,
) -> Report:
    """Allocate every cluster of the overlay at ``path``; one that has them all stays as it is.

    If it ``verifies``, the disk is read back before anything is discarded. Raises
    :class:`AddcowError`; refusals come before the first byte.
    """
    uses = DISCARD if discard else WRITE
    with reporting("flatten", path) as report, open_chain(path, uses, options.access) as overlay:
        _refuse(overlay, options, shared, discard=discard)
        plan = (
            None
            if overlay.all_allocated
            else flatten_plan(overlay, partial(narrow_image, overlay, report))
        )
        proof = Proof(overlay, overlay, (overlay,)) if verifies else None
        follower = FlattenFollower(overlay, report, options, hooks, discard=discard)
        with reading_back(overlay, proof, options, hooks, report) as job_hooks:
            if plan is not None:
                move([plan], report, options, job_hooks, shared.pool, follower)
                _set_flag(overlay)
                report.outcome = Outcome.DONE
        if discard:
            if plan is None:
                follower.remove([overlay], durable=overlay.cow.durable)
            remove(overlay, report)
        follower.renew()
    return report


def estimate(
    path: str, options: RunOptions, shared: Shared = ALONE, *, discard: bool = False
) -> Estimate | None:
    """Return what a flatten of ``path`` would do; None when there is nothing to do.

    Raises the error with which the flatten would be refused.
    """
    with open_chain(path, READ, options.access) as overlay:
        image = overlay.image.file
        if overlay.all_allocated and not discard:
            return None
        _refuse(overlay, options, shared, discard=discard)
        plan = None if overlay.all_allocated else flatten_plan(overlay)
        for file in (overlay.cow, image):
            options.access.refuse_unwritable(file)
        if plan is None:
            return Estimate(0, SpaceNeeded(), image.path, image.first_status.st_dev)
        refuse_unwritable(plan, [], options.access)
        refuse_unnarrowable(overlay)
        return estimated(plan, options, bitmap_space=overlay.bitmap.hole_bytes())


def _refuse(overlay: Overlay, options: RunOptions, shared: Shared, *, discard: bool) -> None:
    access, written = options.access, [] if overlay.all_allocated else [overlay.image.file]
    if discard:
        refuse_removal(overlay, access, shared.nearby, written=written)
    elif written:
        refuse_dependants(overlay, written, access, around=shared.nearby)
        refuse_linked([overlay.cow, overlay.image.file], force=access.force)


def flatten_plan(overlay: Overlay, prepare: Callable[[], object] = lambda: None) -> TransferPlan:
    """Return what is moved. Raises where the bits that will be set do not fit."""
    refuse_short(overlay)
    refuse_no_room_for_bits(overlay)
    aligned = alignment(overlay.cluster_size)
    tasks = cut(unallocated_stretches(overlay, aligned), overlay.geometry.clusters)
    selection, target = MissingClusters(overlay), RawTarget(overlay.image.file)
    return TransferPlan(selection, target, tasks, bit=1, changed=(overlay,), prepare=prepare)


def refuse_no_room_for_bits(overlay: Overlay) -> None:
    """Raise :class:`SpaceError` when the whole bitmap does not fit on its file system."""
    needed, free = overlay.bitmap.hole_bytes(), overlay.cow.free_space
    if needed > free:
        raise SpaceError(path=overlay.path, needed=needed, free=free)


def _set_flag(overlay: Overlay) -> None:
    left = "ALL_ALLOCATED was not set, the same command sets it"
    with ending(overlay.path, "every cluster is allocated", left):
        overlay.set_all_allocated(True)
