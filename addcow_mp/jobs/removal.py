"""Removal of an ``.add-cow`` file whose image file is the whole disk.

Afterwards the raw file alone is the guest's disk, and a raw disk is all of its bytes. So bytes
behind the overlay's virtual size, which no guest has seen, are cut off first, durably. Whatever
interrupts this, the disk is one of the two: the overlay, or the raw file without such bytes.
"""

from __future__ import annotations

import os

from addcow_mp.device import faults
from addcow_mp.device.changeable import why_not_removable
from addcow_mp.device.files import File, identity_of, sync_entry
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.sidecar import invalidate, invalidate_all, is_manifest, manifest_of
from addcow_mp.errors import ImageError


def changed_by_removal(overlay: Overlay) -> list[File]:
    """The files that :func:`remove` changes: other overlays may need them."""
    return [overlay.cow, *([overlay.image.file] if _is_longer(overlay) else [])]


def _is_longer(overlay: Overlay) -> bool:
    return overlay.image.file.length > overlay.size


def refuse_unremovable(overlay: Overlay) -> None:
    """Raise where no file can be removed."""
    for path in (overlay.cow.real, manifest_of(overlay.path)):
        is_there = path == overlay.cow.real or is_manifest(path)
        reason = why_not_removable(path) if is_there else None
        if reason is not None:
            problem = f"it cannot be removed: {reason}; leave --discard out"
            raise ImageError(path=path, problem=problem)


def remove(overlay: Overlay) -> None:
    """Remove the ``.add-cow`` file itself, also when it was named by a symbolic link.

    All clusters are allocated. Its image file is open for resizing, and has what it needs.
    """
    path = overlay.cow.real
    overlay.image.file.sync()
    _refuse_replaced(overlay, path)
    _cut_image(overlay)
    _refuse_replaced(overlay, path)
    with overlay.cow.doing("remove it"):
        invalidate(overlay.path, durable=overlay.cow.durable)
        if faults.armed:
            faults.hit("discard")
        os.unlink(path)
    if overlay.cow.durable:
        sync_entry(path, "make its removal durable", "it is removed, and may be back")


def _refuse_replaced(overlay: Overlay, path: str) -> None:
    with overlay.cow.doing("remove it"):
        if identity_of(os.stat(path)) != overlay.cow.identity:
            raise ImageError(path=path, problem="it was replaced meanwhile, and is not removed")


def _cut_image(overlay: Overlay) -> None:
    """Cut the image file to the virtual size; what a manifest says of it, as a raw disk, goes."""
    if not _is_longer(overlay):
        return
    image = overlay.image.file
    invalidate_all(overlay, durable=image.durable)
    with image.doing(f"cut it to {overlay.size} bytes"):
        if faults.armed:
            faults.hit("image_cut")
        os.ftruncate(image.fd, overlay.size)
    image.sync()
