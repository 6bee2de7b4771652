"""Commit: move the overlay's local clusters down into its backing file.

Afterwards the backing alone shows what the overlay showed, no cluster of the overlay
is local, and its image file takes no space. A shorter raw backing grows first; a longer
one keeps its length; an add-cow backing receives the clusters as local ones and is never
grown. With ``keep`` the overlay and its image stay as they were.

With ALL_ALLOCATED set the bits may be stale, so they are all set, then the flag is
cleared, and only then does the commit begin: at each of these instants every cluster
is local.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice

from addcow_mp.device.chain import COMMIT, COMMIT_KEEPING, ESTIMATING, open_chain
from addcow_mp.device.files import File, is_device
from addcow_mp.device.hardlinks import link_warnings, refuse_linked
from addcow_mp.device.layer import Layer
from addcow_mp.device.magic import resembles
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.allocation import alignment, allocated_stretches
from addcow_mp.engine.selection import AllocatedClusters
from addcow_mp.engine.space import space_for
from addcow_mp.engine.targets import OverlayTarget, RawTarget, Target
from addcow_mp.engine.tasks import Task, cut
from addcow_mp.engine.transfer_plan import TransferPlan
from addcow_mp.errors import ImageError, RestartsError, StoppedError
from addcow_mp.format.header import ADD_COW
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.options import ALONE, DEFAULTS, NO_HOOKS, Hooks, RunOptions, Shared
from addcow_mp.jobs.readback import Proof, reading_back
from addcow_mp.jobs.report import Estimate, Outcome, Report, reporting
from addcow_mp.jobs.transfer_job import move, refuse_unwritable
from addcow_mp.units import round_down


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

    When it ``verifies``, the backing file is read back from the disk. Raises
    :class:`AddcowError`; refusals come before the first byte is written.
    """
    uses = COMMIT_KEEPING if keep else COMMIT
    with reporting("commit", path) as report, open_chain(path, uses, options.access) as overlay:
        plan = _plan(overlay, options, shared, keep=keep)
        proof = _proof(overlay, keep=keep) if verifies else None
        with reading_back(overlay, proof, options, hooks, report) as job_hooks:
            with _saying_what_is_kept(overlay.path, keep=keep):
                move(plan, report, options, job_hooks, shared.pool)
            report.outcome = Outcome.DONE
            report.warnings += _raw_link_warnings(overlay)
    return report


def _proof(overlay: Overlay, *, keep: bool) -> Proof:
    """Where to see what was committed: through the overlay, if it holds nothing any more."""
    backing = _accepted_backing(overlay)
    return (
        Proof(backing, backing, (backing,)) if keep else Proof(overlay, backing, (overlay, backing))
    )


def estimate(
    path: str, options: RunOptions, shared: Shared = ALONE, *, receives: bool = False
) -> Estimate | None:
    """What a commit of ``path`` would do; None when there is nothing to do.

    ``receives`` says that there will be, since others are committed into it before. Raises what
    the commit would be refused for.
    """
    with open_chain(path, ESTIMATING, options.access) as overlay:
        if overlay.backing is None or (_is_done(overlay) and not receives):
            return None
        plan = _plan(overlay, options, shared, keep=False)
        refuse_unwritable(plan, _opened_to_write(overlay), options.access)
        target = plan.target.file
        device = target.status.st_dev
        gives_back = overlay.image.file.status.st_dev == device
        taken = space_for(plan, options.copy_options)
        return Estimate(plan.weight, taken, target.path, device, gives_back)


def _opened_to_write(overlay: Overlay) -> list[File]:
    """The files that a commit opens for writing."""
    backing = _accepted_backing(overlay)
    raw = [backing.file] if isinstance(backing, RawLayer) else []
    return [*_written(overlay, backing, keep=False), *raw]


def _is_done(overlay: Overlay) -> bool:
    """Whether no cluster is local, and no space is left that could be freed."""
    image, end = overlay.image.file, overlay.size
    if image.length > end:  # bytes behind the view are nobody's, and keep the block of its end
        end = round_down(end, image.block_size)
    data = image.next_data(0)
    return overlay.allocated_clusters == 0 and (data is None or data >= end)


def _plan(overlay: Overlay, options: RunOptions, shared: Shared, *, keep: bool) -> TransferPlan:
    """What is moved, once it is known that it may be."""
    backing = _accepted_backing(overlay)
    if not options.access.force:
        _refuse_overlay_as_raw(backing)
    changed = list(islice(backing.files(), 1)) + ([] if keep else [overlay.image.file])
    changed = [*_cow_of(backing), *changed]
    refuse_dependants(overlay, changed, options.access, around=shared.nearby)
    refuse_linked(_written(overlay, backing, keep=keep), force=options.access.force)
    changes = not _is_done(overlay) or _grows(overlay, backing)
    # Tasks cover every cluster, also those that an earlier commit cleared and was cut off before
    # it freed their space: it is freed with the others.
    return TransferPlan(
        AllocatedClusters(overlay),
        _target(backing),
        _tasks(overlay, backing),
        bit=None if keep else 0,
        # With ``keep``, too: the overlay's manifest also describes what lies below it.
        changed=(backing, overlay) if changes else (),
        prepare=partial(_prepare, overlay, backing, keep=keep),
    )


def _grows(overlay: Overlay, backing: Layer) -> bool:
    """Whether the backing file is raw and has fewer bytes than the overlay."""
    return isinstance(backing, RawLayer) and backing.held < overlay.size


def _written(overlay: Overlay, backing: Layer, *, keep: bool) -> list[File]:
    """The files of overlays that are written; names in a raw backing file mean nothing."""
    own = [] if keep else [overlay.cow, overlay.image.file]
    return own + ([backing.cow, backing.image.file] if isinstance(backing, Overlay) else [])


def _raw_link_warnings(overlay: Overlay) -> list[str]:
    """What is told of a raw backing file with several names: overlays elsewhere may need it."""
    backing = overlay.backing
    return link_warnings([backing.file]) if isinstance(backing, RawLayer) else []


@contextmanager
def _saying_what_is_kept(path: str, *, keep: bool) -> Iterator[None]:
    """With ``keep`` no bit says which clusters have been copied: the next run copies them all."""
    try:
        yield
    except StoppedError as error:
        raise (RestartsError(path=path) if keep else error) from None


def _accepted_backing(overlay: Overlay) -> Layer:
    backing = overlay.backing
    if backing is None:
        raise ImageError(
            path=overlay.path, problem="it has no backing file, there is nothing to commit into"
        )
    refuse_short(overlay)
    if isinstance(backing, Overlay):
        refuse_short(backing)
        if backing.size < overlay.size:
            raise ImageError(
                path=backing.path,
                problem=f"it is shorter ({backing.size} bytes) than the overlay "
                f"({overlay.size} bytes); resize it first",
            )
    elif backing.size < overlay.size and is_device(next(backing.files()).identity):
        raise ImageError(
            path=backing.path,
            problem=f"the device is shorter ({backing.size} bytes) than the overlay "
            f"({overlay.size} bytes), and cannot grow; give the overlay a larger one",
        )
    return backing


def _refuse_overlay_as_raw(backing: Layer) -> None:
    """Raw data written into an ``.add-cow`` file would destroy the overlay that it is."""
    if isinstance(backing, RawLayer) and resembles(backing.file) == ADD_COW:
        raise ImageError(
            path=backing.path,
            problem="it is declared raw, but is an add-cow file, which a commit would destroy; "
            "repair the overlay's header, or use --force if its guest's data looks like that",
        )


def _cow_of(backing: Layer) -> list[File]:
    return [backing.cow] if isinstance(backing, Overlay) else []


def _target(backing: Layer) -> Target:
    if isinstance(backing, Overlay):
        return OverlayTarget(backing)
    return RawTarget(next(backing.files()))


def _tasks(overlay: Overlay, backing: Layer) -> list[Task]:
    other = backing.cluster_size if isinstance(backing, Overlay) else 0
    aligned = alignment(overlay.cluster_size, other)
    return cut(allocated_stretches(overlay, aligned), overlay.geometry.clusters)


def _prepare(overlay: Overlay, backing: Layer, *, keep: bool) -> None:
    """What changes first, once nothing can be refused any more."""
    if isinstance(backing, RawLayer):
        backing.grow(overlay.size)
    if overlay.all_allocated and not keep:
        _replace_flag_by_bits(overlay)


def _replace_flag_by_bits(overlay: Overlay) -> None:
    overlay.publish([(0, overlay.geometry.clusters)], 1)
    overlay.set_all_allocated(False)
