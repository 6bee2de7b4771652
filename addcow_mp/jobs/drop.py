"""Drop: remove the ``.add-cow`` file of an overlay whose image file is the whole disk.

It proves that first, as ``flatten --discard`` does (:mod:`addcow_mp.jobs.removal`): every cluster
is allocated, and no other overlay needs the file.
"""

from __future__ import annotations

from addcow_mp.device.chain import DISCARD, open_chain
from addcow_mp.jobs.options import ALONE, DEFAULTS, RunOptions, Shared
from addcow_mp.jobs.removal import refuse_partial, refuse_removal, remove
from addcow_mp.jobs.report import Report, reporting

_REMEDY = "change that, or keep the file"


def drop(path: str, *, options: RunOptions = DEFAULTS, shared: Shared = ALONE) -> Report:
    """Remove the ``.add-cow`` file at ``path``; the image file stays, cut to the virtual size.

    Raises :class:`AddcowError`; refusals come before the first change.
    """
    with reporting("drop", path) as report, open_chain(path, DISCARD, options.access) as overlay:
        refuse_partial(overlay)
        refuse_removal(overlay, options.access, shared.nearby, remedy=_REMEDY)
        remove(overlay, report, "every cluster is allocated")
    return report
