"""Writing as a guest does: an overlay that is open for reading and writing.

What would be refused to a job is refused to the first write, before it changes anything: other
overlays depend on this one or its files, or these have several hard links. Until then the
overlay is only read, which depends on nobody.
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
