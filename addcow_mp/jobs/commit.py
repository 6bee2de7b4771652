"""Commit: move the overlay's allocated clusters down into its backing file.

Afterwards the backing file alone shows what the overlay showed, the overlay has no allocated
cluster, and its image file takes no space. A shorter raw backing file grows first; a longer one
keeps its length. An add-cow backing file allocates the clusters that it receives, and never grows.
With ``keep`` the overlay and its image stay as they were.

With ALL_ALLOCATED set the bits may be out of date. So all bits are set, then the flag is cleared,
and only then the commit begins: at each of these instants every cluster is allocated.
"""

from __future__ import annotations

from functools import partial

from addcow_mp.device.chain import COMMIT, COMMIT_KEEPING, ESTIMATING, open_chain
from addcow_mp.device.files import File, is_device
from addcow_mp.device.hardlinks import link_warnings, refuse_linked
from addcow_mp.device.layer import Layer
from addcow_mp.device.layers import own_files
from addcow_mp.device.magic import resembles
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.allocation import alignment, allocated_stretches
from addcow_mp.engine.selection import AllocatedClusters
from addcow_mp.engine.targets import OverlayTarget, RawTarget, Target
from addcow_mp.engine.tasks import Task, cut
from addcow_mp.engine.transfer_plan import TransferPlan
from addcow_mp.errors import ImageError
from addcow_mp.format.header import ADD_COW
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.following import CommitFollower
from addcow_mp.jobs.options import ALONE, DEFAULTS, NO_HOOKS, Hooks, RunOptions, Shared
from addcow_mp.jobs.readback import Proof, reading_back
from addcow_mp.jobs.report import Estimate, Outcome, Report, reporting
from addcow_mp.jobs.transfer_job import estimated, move, refuse_unwritable


def commit(
    path: str,
    *,
    keep: bool = False,
    verifies: bool = False,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    shared: Shared = ALONE,
) -> Report:
    """Commit the overlay at ``path`` into its backing file.

    If it ``verifies``, the backing file is read back from the disk. Raises :class:`AddcowError`;
    refusals come before the first byte.
    """
    uses = COMMIT_KEEPING if keep else COMMIT
    with reporting("commit", path) as report, open_chain(path, uses, options.access) as overlay:
        plan = _plan(overlay, options, shared, keep=keep)
        proof = _proof(overlay, keep=keep) if verifies else None
        backing = accepted_backing(overlay)
        follower = CommitFollower(overlay, backing, report, options, hooks, keep=keep)
        with reading_back(overlay, proof, options, hooks, report) as job_hooks:
            move([plan], report, options, job_hooks, shared.pool, follower)
            report.outcome = Outcome.DONE
            if isinstance(backing, RawLayer):
                # Overlays elsewhere may need a file with several names.
                report.warnings += link_warnings([backing.file])
        follower.renew()
    return report


def _proof(overlay: Overlay, *, keep: bool) -> Proof:
    """Return where to read what was committed: through the overlay, once it is empty."""
    backing = accepted_backing(overlay)
    if keep:
        return Proof(backing, backing, (backing,))
    return Proof(overlay, backing, (overlay, backing))


def estimate(
    path: str,
    options: RunOptions,
    shared: Shared = ALONE,
    *,
    keep: bool = False,
    receives: bool = False,
) -> Estimate | None:
    """Return what a commit of ``path`` would do; None when there is nothing to do.

    ``receives``: other overlays are committed into this one before, so there will be something to
    do. Raises the error with which the commit would be refused.
    """
    with open_chain(path, ESTIMATING, options.access) as overlay:
        if overlay.backing is None or (overlay.is_empty and not receives):
            return None
        plan = _plan(overlay, options, shared, keep=keep)
        written = [*_own_files(overlay, keep=keep), *own_files(overlay.backing)]
        refuse_unwritable(plan, written, options.access)
        return estimated(plan, options)


def _plan(overlay: Overlay, options: RunOptions, shared: Shared, *, keep: bool) -> TransferPlan:
    """Return what is moved. Raises what forbids it."""
    backing, access = accepted_backing(overlay), options.access
    if not access.force:
        refuse_overlay_as_raw(backing)
    own, below = _own_files(overlay, keep=keep), own_files(backing)
    # No overlay needs the .add-cow file at the top.
    refuse_dependants(overlay, [*below, *own[1:]], access, around=shared.nearby)
    # The names of a raw backing file have no meaning.
    refuse_linked([*own, *(below if isinstance(backing, Overlay) else [])], force=access.force)
    grows = isinstance(backing, RawLayer) and backing.held < overlay.size
    changes = grows or not overlay.is_empty
    # The overlay's manifest also describes what lies below it, if that is visible.
    stays = keep and overlay.all_allocated
    # Tasks cover every cluster, also those that an earlier commit cleared and was cut off before
    # it freed their space: it is freed with the others.
    return TransferPlan(
        AllocatedClusters(overlay),
        target_in(backing),
        _tasks(overlay, backing),
        bit=None if keep else 0,
        changed=(() if not changes else (backing,) if stays else (backing, overlay)),
        prepare=partial(_prepare, overlay, backing, keep=keep),
        # With ``keep`` no bit says which clusters have been copied.
        restarts=keep,
    )


def _own_files(overlay: Overlay, *, keep: bool) -> list[File]:
    return [] if keep else [overlay.cow, overlay.image.file]


def accepted_backing(overlay: Overlay) -> Layer:
    """Return the backing file. Raises where it cannot receive what the overlay shows."""
    backing = overlay.backing
    if backing is None:
        problem = "it has no backing file, there is nothing to commit into"
        raise ImageError(path=overlay.path, problem=problem)
    return accepted_base(overlay, backing)


def accepted_base(overlay: Overlay, backing: Layer) -> Layer:
    """Return ``backing``. Raises where it cannot receive what the overlay above it shows."""
    refuse_short(overlay)
    if isinstance(backing, Overlay):
        refuse_short(backing)
    elif not is_device(next(backing.files()).identity):
        return backing
    if backing.size < overlay.size:
        what, remedy = (
            ("it", "; resize it first")
            if isinstance(backing, Overlay)
            else ("the device", ", and cannot grow; give the overlay a larger one")
        )
        sizes = f"({backing.size} bytes) than the overlay ({overlay.size} bytes)"
        raise ImageError(path=backing.path, problem=f"{what} is shorter {sizes}{remedy}")
    return backing


def refuse_overlay_as_raw(backing: Layer) -> None:
    """Refuse to write raw data into an ``.add-cow`` file, which would destroy that overlay."""
    if isinstance(backing, RawLayer) and resembles(backing.file) == ADD_COW:
        raise ImageError(
            path=backing.path,
            problem="it is declared raw, but is an add-cow file, which a commit would destroy; "
            "correct the overlay's header, or use --force if its guest's data looks like that",
        )


def target_in(backing: Layer) -> Target:
    """Return where a commit into ``backing`` writes."""
    if isinstance(backing, Overlay):
        return OverlayTarget(backing)
    return RawTarget(next(backing.files()))


def _tasks(overlay: Overlay, backing: Layer) -> list[Task]:
    other = backing.cluster_size if isinstance(backing, Overlay) else 0
    aligned = alignment(overlay.cluster_size, other)
    return cut(allocated_stretches(overlay, aligned), overlay.geometry.clusters)


def _prepare(overlay: Overlay, backing: Layer, *, keep: bool) -> None:
    """Change what must change first, once nothing can be refused any more."""
    if isinstance(backing, RawLayer):
        backing.grow(overlay.size)
    if overlay.all_allocated and not keep:
        overlay.publish([(0, overlay.geometry.clusters)], 1)
        overlay.set_all_allocated(False)
