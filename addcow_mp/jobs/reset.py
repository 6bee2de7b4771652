"""Reset: an overlay shows its backing file again, and what its guest has written is lost.

Afterwards no cluster is allocated, ALL_ALLOCATED is clear, and the image file takes no space. The
guest sees the backing file: of a leaf of a chain its parent, which keeps what it holds.

The order is such that at any moment, whatever interrupts it, the guest sees all that it saw before
or the backing file, and never a mixture:

1. The manifests are removed, and the directory is synced.
2. The bitmap is cut off and the file grows again, synced: one step, as a file that ends inside its
   bitmap reads as 0. Clearing bits one by one would leave a mixture after a power cut.
3. ALL_ALLOCATED is cleared where it was set, synced. Until then the bitmap is not consulted.
4. The space of the image file is freed.
5. A manifest of the empty overlay is made where there was one and the backing file has one.
"""

from __future__ import annotations

from addcow_mp.device.chain import ESTIMATING, RESET, open_chain
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.manifest_file import refuse_unremovable_manifests
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.space import SpaceNeeded
from addcow_mp.errors import ImageError
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.following import EmptyFollower
from addcow_mp.jobs.options import ALONE, DEFAULTS, NO_HOOKS, RunOptions, Shared
from addcow_mp.jobs.report import Estimate, Outcome, Report, ending, reporting

_REMEDY = "only an overlay that no other one needs is reset; flatten or remove them first"


def reset(path: str, *, options: RunOptions = DEFAULTS, shared: Shared = ALONE) -> Report:
    """Let the overlay at ``path`` show its backing file again; one that does stays as it is.

    Raises :class:`AddcowError`; refusals come before the first change.
    """
    with reporting("reset", path) as report, open_chain(path, RESET, options.access) as overlay:
        _refuse(overlay, options, shared)
        before = overlay.image.file.allocated
        follower = EmptyFollower(overlay, report, options, NO_HOOKS)
        if not _is_done(overlay):
            report.begin_changes()
            follower.remove([overlay], durable=overlay.cow.durable)
            _reset(overlay)
        report.bytes_freed = max(0, before - overlay.image.file.allocated)
        report.outcome = Outcome.DONE
        follower.renew()
    return report


def estimate(path: str, options: RunOptions, shared: Shared = ALONE) -> Estimate | None:
    """What a reset of ``path`` would do; None when there is nothing to do.

    Raises the error with which the reset would be refused.
    """
    with open_chain(path, ESTIMATING, options.access) as overlay:
        _refuse(overlay, options, shared)
        if _is_done(overlay):
            return None
        image = overlay.image.file
        for file in (overlay.cow, image):
            options.access.refuse_unwritable(file)
        refuse_unremovable_manifests(overlay)
        freed = SpaceNeeded(freed=image.allocated)
        return Estimate(0, freed, image.path, image.first_status.st_dev)


def _refuse(overlay: Overlay, options: RunOptions, shared: Shared) -> None:
    access = options.access
    if overlay.backing is None:
        problem = "it has no backing file to go back to; remove it, and create another one"
        raise ImageError(path=overlay.path, problem=problem)
    if overlay.all_allocated and not access.force:
        raise ImageError(
            path=overlay.path,
            problem="it does not need its backing file (ALL_ALLOCATED), which may hold something "
            "else by now; go back to that with --force",
        )
    changed = [overlay.cow, overlay.image.file]
    refuse_dependants(overlay, changed, access, _REMEDY, shared.nearby, can_force=False)
    refuse_linked(changed, force=access.force)


def _is_done(overlay: Overlay) -> bool:
    return overlay.is_empty and not overlay.all_allocated and not overlay.bitmap.short


def _reset(overlay: Overlay) -> None:
    overlay.clear_bitmap()
    if overlay.all_allocated:
        overlay.set_all_allocated(False)
    left = "not all space of its image file was freed, the same command frees it"
    with ending(overlay.path, "it shows its backing file", left):
        overlay.image.file.punch(0, overlay.size)
