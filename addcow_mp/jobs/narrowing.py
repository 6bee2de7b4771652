"""Who may read the image file: only users who may read the backing files that it gets data of."""

from __future__ import annotations

import errno
import os
import stat

from addcow_mp.device.chain import readers_of_chain
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.permissions import narrow, narrowed_mode
from addcow_mp.jobs.report import Report

_NARROWING = "let no more users read it than may read its backing file"


def refuse_unnarrowable(overlay: Overlay) -> None:
    """Raise when :func:`narrow_image` would have to change the mode of another user's file."""
    image = overlay.image.file
    with image.doing(_NARROWING):
        wanted = narrowed_mode(image.fd, readers_of_chain(overlay.backing))
        if wanted is not None and os.geteuid() not in (0, image.status.st_uid):
            raise PermissionError(errno.EPERM, "it belongs to another user")


def narrow_image(overlay: Overlay, report: Report) -> None:
    """Let no more users read the image file than may read what is copied into it."""
    image = overlay.image.file
    with image.doing(_NARROWING):
        if not narrow(image.fd, readers_of_chain(overlay.backing)):
            return
        if image.durable:
            os.fsync(image.fd)  # the mode as well, before any data
    mode = stat.S_IMODE(image.status.st_mode)
    report.warnings.append(
        f"{image.path}: more users could read it than its backing file; its mode is now {mode:04o}"
    )
