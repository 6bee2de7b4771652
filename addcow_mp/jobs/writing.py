"""Opens an overlay for reading and writing, as a guest does.

The first write is refused where a job would be, before it changes anything: when other overlays
depend on this one or its files, or when these have several hard links. Until then the overlay is
only read, which needs no permission.
"""

from __future__ import annotations

from functools import partial

from addcow_mp.device.access import Access
from addcow_mp.device.chain import WRITE, open_chain
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.overlay import Overlay
from addcow_mp.jobs.dependants import refuse_dependants


def open_for_writing(path: str, access: Access | None = None) -> Overlay:
    """Open the overlay at ``path`` as the guest's disk. Raises :class:`AddcowError`."""
    access = access or Access()
    overlay = open_chain(path, WRITE, access)
    overlay.refuse_change = partial(_refuse, overlay, access)
    return overlay


def _refuse(overlay: Overlay, access: Access) -> None:
    files = [overlay.cow, overlay.image.file]
    refuse_dependants(overlay, files, access)
    refuse_linked(files, force=access.force)
