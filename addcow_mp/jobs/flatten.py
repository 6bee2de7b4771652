"""Flatten: bring everything that is not local up into the image file.

Afterwards every bit is set, ALL_ALLOCATED is set last, and the raw image file alone is
the disk. What the image held in clusters that were not local is overwritten, or emptied
where the backing has nothing. The names in the header stay; with ``discard`` the
``.add-cow`` file is removed once the image is durable.
"""

from __future__ import annotations

import os

from addcow_mp.device.chain import WRITE, open_chain
from addcow_mp.device.files import sync_directory
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.engine.plan import cut
from addcow_mp.engine.survey import alignment, missing_stretches
from addcow_mp.engine.transfer import RawTarget, Which
from addcow_mp.errors import FileError, ImageError
from addcow_mp.jobs.moving import move
from addcow_mp.jobs.report import Conduct, Report, reporting


def flatten(path: str, *, discard: bool = False, conduct: Conduct | None = None) -> Report:
    """Make every cluster of the overlay at ``path`` local.

    An image that is there already is left as it is. Raises :class:`AddcowError`;
    refusals come before the first byte is written.
    """
    with reporting("flatten", path) as report, open_chain(path, WRITE) as overlay:
        if not overlay.all_allocated:
            _bring_up(overlay, conduct or Conduct(), report)
        if discard:
            _discard(overlay)
    return report


def _bring_up(overlay: Overlay, conduct: Conduct, report: Report) -> None:
    refuse_short(overlay)
    aligned = alignment(overlay.cluster_size)
    move(
        overlay,
        overlay.geometry,
        Which.MISSING,
        RawTarget(overlay.image.file),
        cut(missing_stretches(overlay, aligned), overlay.geometry.clusters),
        conduct,
        report,
        publish=(overlay, 1),
    )
    overlay.set_all_allocated(True)


def _discard(overlay: Overlay) -> None:
    """Remove the ``.add-cow`` file itself, also when it was named by a symbolic link."""
    path = os.path.realpath(overlay.path)
    overlay.image.file.sync()
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) != overlay.cow.identity:
            raise ImageError(path=path, problem="it was replaced meanwhile, and is not removed")
        os.unlink(path)
    except OSError as error:
        raise FileError.of(path, "remove it", error) from error
    sync_directory(path)
