"""Removes an ``.add-cow`` file whose image file is the whole disk.

Afterwards the raw file alone is the guest's disk, with all of its bytes. So bytes behind the
overlay's virtual size, which no guest has seen, are cut off first, durably. Whatever interrupts
this, the disk is one of the two: the overlay, or the raw file without such bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from addcow_mp.device import faults
from addcow_mp.device.access import Access
from addcow_mp.device.changeable import why_not_removable
from addcow_mp.device.discovery import NearbyOverlays
from addcow_mp.device.files import File, identity_of, sync_directory
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.manifest_file import invalidate, invalidate_all, is_manifest, manifest_of
from addcow_mp.device.overlay import Overlay
from addcow_mp.errors import ImageError
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.report import Outcome, Report, ending


def _changed(overlay: Overlay) -> list[File]:
    """The files that :func:`remove` changes; other overlays may need them."""
    return [overlay.cow, *([overlay.image.file] if _is_longer(overlay) else [])]


def _is_longer(overlay: Overlay) -> bool:
    return overlay.image.file.length > overlay.size


def refuse_removal(
    overlay: Overlay,
    access: Access,
    around: NearbyOverlays | None = None,
    *,
    written: Sequence[File] = (),
    remedy: str = "leave --discard out",
) -> None:
    """Raise where the ``.add-cow`` file is needed, or it or its manifest cannot be removed.

    ``around``: the overlays around it; None = look for them. ``written``: files that the job writes
    before. ``remedy``: what to do where the file cannot be removed.
    """
    changed = [*written, *_changed(overlay)]
    refuse_dependants(overlay, changed, access, around=around)
    refuse_linked([overlay.cow, overlay.image.file], force=access.force)
    for path in (overlay.cow.real, manifest_of(overlay.path)):
        is_there = path == overlay.cow.real or is_manifest(path)
        reason = why_not_removable(path) if is_there else None
        if reason is not None:
            raise ImageError(path=path, problem=f"it cannot be removed: {reason}; {remedy}")


def refuse_partial(overlay: Overlay) -> None:
    """Raise unless the image file holds the whole disk: every cluster is allocated.

    ALL_ALLOCATED says so, or every bit, all of which must be in the file.
    """
    clusters = overlay.geometry.clusters
    is_whole = not overlay.bitmap.short and overlay.allocated_clusters == clusters
    if not (overlay.all_allocated or is_whole):
        raise ImageError(
            path=overlay.path,
            problem="not every cluster is allocated; 'addcow flatten --discard' makes them so",
        )


def remove(overlay: Overlay, report: Report, done: str = "flattened") -> None:
    """Remove the ``.add-cow`` file, also when a symbolic link named it.

    Its image file is open for resizing, and :func:`refuse_removal` has not refused it. ``done``:
    what the job has done before. Raises :class:`CleanupError`, which says that.
    """
    with ending(overlay.path, done, "the .add-cow file was not removed"):
        refuse_partial(overlay)
        _remove(overlay, report)
    report.outcome = Outcome.DONE
    if overlay.cow.durable:
        left = "the .add-cow file is removed, and may be back after a power cut"
        with ending(overlay.path, done, left):
            sync_directory(overlay.cow.real)


def _remove(overlay: Overlay, report: Report) -> None:
    path = overlay.cow.real
    overlay.image.file.sync()
    _refuse_replaced(overlay, path)
    report.begin_changes()
    _cut_image(overlay, report)
    _refuse_replaced(overlay, path)
    with overlay.cow.doing("remove it"):
        removed = invalidate(overlay.path, durable=overlay.cow.durable)
        report.manifests_removed += removed
        if faults.armed:
            faults.hit("discard")
        os.unlink(path)


def _refuse_replaced(overlay: Overlay, path: str) -> None:
    with overlay.cow.doing("remove it"):
        if identity_of(os.stat(path)) != overlay.cow.identity:
            raise ImageError(path=path, problem="it was replaced meanwhile, and is not removed")


def _cut_image(overlay: Overlay, report: Report) -> None:
    """Cut the image file to the virtual size; this invalidates its manifest as a raw disk."""
    if not _is_longer(overlay):
        return
    image = overlay.image.file
    report.manifests_removed += invalidate_all(overlay, durable=image.durable)
    image.cut(overlay.size)
    image.sync()
