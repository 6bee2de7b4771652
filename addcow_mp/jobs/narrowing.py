"""Restricts the mode of an image file: copied data stays readable by the same users only."""

from __future__ import annotations

import errno
import os
import stat

from addcow_mp.device.chain import readers_of_chain
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.permissions import narrow, narrowed_mode
from addcow_mp.jobs.report import Report

_NARROWING = "restrict its readers to those of its backing file"


def refuse_unnarrowable(overlay: Overlay) -> None:
    """Raise :class:`FileError` if :func:`narrow_image` must change another user's file."""
    image = overlay.image.file
    with image.doing(_NARROWING):
        wanted = narrowed_mode(image.fd, readers_of_chain(overlay.backing))
        if wanted is not None and os.geteuid() not in (0, image.status.st_uid):
            raise PermissionError(errno.EPERM, "it belongs to another user")


def narrow_image(overlay: Overlay, report: Report) -> None:
    """Restrict the readers of the image file to those of the backing files; add a warning."""
    image = overlay.image.file
    with image.doing(_NARROWING):
        if not narrow(image.fd, readers_of_chain(overlay.backing)):
            return
        if image.durable:
            os.fsync(image.fd)  # the mode is on the disk before any data
    mode = stat.S_IMODE(image.status.st_mode)
    report.warnings.append(
        f"{image.path}: more users could read it than its backing file; its mode is now {mode:04o}"
    )
