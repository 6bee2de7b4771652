"""Resize: another virtual size for an overlay.

The virtual size is the image file's length, so one ftruncate of the image file changes the guest's
view, and everything else is prepared before it or cleared after it. Whatever interrupts this, the
view is the old one or the new one.

Growing. The new part reads as zeros, also where the backing file is longer:

1. Bits past the last cluster, which an interrupted resize has left, are cleared. Synced.
2. Bytes of the image file behind the old size become zeros. The old last cluster, if it is partial
   and the backing file continues it, is copied up as far as the old size. Synced.
3. The bitmap gets its new length. Clusters of the new part that the backing file covers become
   allocated; the image file has only a hole there. Synced. The old view does not reach there.
4. The image file gets its new length. Synced.

Shrinking: the image file is cut and synced. Only then bits past the new end are cleared, so a
cluster whose bit is cleared is no longer part of the disk. Running the same command again finishes
what was interrupted.
"""

from __future__ import annotations

from contextlib import suppress

from addcow_mp.device.access import Access
from addcow_mp.device.chain import RESIZE, open_chain
from addcow_mp.device.files import BUFFER_SIZE, File, is_device, new_buffer
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.manifest_file import invalidate_all
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.errors import AddcowError, ImageError, SpaceError, SyncError
from addcow_mp.format.bitmap import PAGE
from addcow_mp.format.bits import BITS_PER_BYTE, Run
from addcow_mp.format.geometry import Geometry
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.report import Outcome, Report, reporting
from addcow_mp.units import SizeChange, round_up


def resize(
    path: str, change: SizeChange, *, shrink: bool = False, access: Access | None = None
) -> Report:
    """Give the overlay at ``path`` another virtual size, in whole sectors.

    Without ``shrink`` a smaller size is refused. Raises :class:`AddcowError`; refusals come before
    the first change.
    """
    access = access or Access()
    with reporting("resize", path) as report, open_chain(path, RESIZE, access) as overlay:
        size = change.applied(overlay.size)
        if size < overlay.size and not shrink:
            raise ImageError(
                path=path,
                problem=f"shrinking it from {overlay.size} to {size} bytes deletes what lies "
                "behind; allow it with --shrink",
            )
        _refuse(overlay, size, access)
        report.warnings = overlay.warnings()
        report.begin_changes()
        report.manifests_removed = set_size(overlay, size)
        report.virtual_size, report.outcome = size, Outcome.DONE
    return report


def _refuse(overlay: Overlay, size: int, access: Access) -> None:
    """Raise where other overlays need what changes.

    Growing changes nothing for the overlays above: they read zeros behind the end of their backing
    file, and zeros in its new part.
    """
    files = [overlay.cow, overlay.image.file]
    changed = files if size < overlay.size else [overlay.image.file]
    remedy = "flatten them first, or use --force to change it under them"
    refuse_dependants(overlay, changed, access, remedy)
    refuse_linked(files, force=access.force)
    refuse_size(overlay, size)


def refuse_size(overlay: Overlay, size: int) -> None:
    """Raise when the overlay cannot have this size: its files are devices, or are full."""
    refuse_short(overlay)
    for file in (overlay.cow, overlay.image.file):
        if is_device(file.identity):
            problem = "it is a block device, whose size cannot be changed here"
            raise ImageError(path=file.path, problem=problem)
    runs = _covered(overlay, size)
    if runs:
        bits = sum(stop - first for first, stop in runs)
        _refuse_without_space(overlay.cow, round_up(-(-bits // BITS_PER_BYTE), PAGE))
        start, stop = _partial_cluster(overlay)
        _refuse_without_space(overlay.image.file, stop - start)


def _refuse_without_space(file: File, needed: int) -> None:
    free = file.free_space
    if needed > free:
        raise SpaceError(path=file.path, needed=needed, free=free)


def truncate(overlay: Overlay, size: int) -> None:
    """Give a guest's disk that is open for writing another size, after all that it has written.

    It is refused where a write would be. Raises :class:`AddcowError`.
    """
    overlay.check_writable()
    overlay.check_permission()
    refuse_size(overlay, size)
    overlay.flush()
    overlay.manifests_removed += set_size(overlay, size)


def set_size(overlay: Overlay, size: int) -> list[str]:
    """Change the virtual size of an overlay with no pending writes, durably.

    Returns the paths of the manifests that it had, which are removed.
    """
    if size == overlay.size and not _has_bits_beyond(overlay):
        # An earlier command may have been interrupted before its last sync.
        overlay.image.file.sync()
        return []
    removed = invalidate_all(overlay, durable=overlay.cow.durable)
    if size > overlay.size:
        _grow(overlay, size)
    else:
        _shrink(overlay, size)
    return removed


# Growing


def _grow(overlay: Overlay, size: int) -> None:
    image, old = overlay.image.file, overlay.size
    if _has_bits_beyond(overlay):
        _clear_beyond(overlay)
    runs = _covered(overlay, size)
    image.make_zero(old, image.length)
    if runs:
        _copy_up_last(overlay)
    image.sync()
    try:
        _lengthen_bitmap(overlay, size, runs)
        image.set_length(size)
    except AddcowError as error:
        _take_back(overlay, old, error)
        raise
    image.sync()


def _covered(overlay: Overlay, size: int) -> list[Run]:
    """The clusters of the new part that the backing file covers: they become allocated."""
    below = 0 if overlay.backing is None else overlay.backing.size
    stop = min(size, below)
    if overlay.all_allocated or stop <= overlay.size:
        return []
    return [Geometry(size, overlay.cluster_size).touched(overlay.size, stop)]


def _partial_cluster(overlay: Overlay) -> Run:
    """The bytes of the last cluster, if it is partial and not allocated; else none."""
    start = overlay.size - overlay.size % overlay.cluster_size
    if start == overlay.size or overlay.is_allocated(overlay.geometry.cluster_of(start)):
        return overlay.size, overlay.size
    return start, overlay.size


def _copy_up_last(overlay: Overlay) -> None:
    start, stop = _partial_cluster(overlay)
    if start < stop:
        overlay.copy_up(start, stop, new_buffer(min(BUFFER_SIZE, overlay.cluster_size)))


def _lengthen_bitmap(overlay: Overlay, size: int, runs: list[Run]) -> None:
    """Give the bitmap its new length and bits, durably."""
    length = _end_of_bitmap(overlay, size)
    if overlay.cow.length < length:
        overlay.cow.set_length(length)
    overlay.use_size(size)
    overlay.publish(runs, 1)


def _take_back(overlay: Overlay, size: int, error: AddcowError) -> None:
    """Return to the old size after an error; nothing is written after a failed sync."""
    overlay.use_size(size)
    if not isinstance(error, SyncError):
        with suppress(AddcowError):
            _clear_beyond(overlay)


# Shrinking


def _shrink(overlay: Overlay, size: int) -> None:
    image = overlay.image.file
    if size < overlay.size:
        image.cut(size)
    image.sync()
    overlay.use_size(size)
    _clear_beyond(overlay)


# Behind the end


def _end_of_bitmap(overlay: Overlay, size: int) -> int:
    """Where the bitmap of an overlay of this size ends in the file."""
    bitmap = Geometry(size, overlay.cluster_size).bitmap_length
    return overlay.header.header_size + bitmap


def _has_bits_beyond(overlay: Overlay) -> bool:
    end = _end_of_bitmap(overlay, overlay.size)
    return overlay.cow.length > end or overlay.bitmap.stray() > 0


def _clear_beyond(overlay: Overlay) -> None:
    """Clear every bit past the last cluster, durably, and cut what lies behind the bitmap."""
    end = _end_of_bitmap(overlay, overlay.size)
    if overlay.cow.length > end:
        overlay.cow.set_length(end)
    overlay.publish([], 0)
