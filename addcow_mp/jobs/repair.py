"""Repair: fix what a check has found and what can be fixed without guessing.

*Leaks* are freed: data in clusters that are not allocated, and header bytes that no name uses. With
*everything*, bits past the last cluster are cleared, and a file that ends inside its bitmap is
extended with zeros. Header and bitmap are first copied to a new file beside the image.
A wrong name, format or size remains a finding. Data in clusters whose bits were missing is not
freed in the same run: it may be the only copy.
"""

from __future__ import annotations

import os
from itertools import count

from addcow_mp.device.access import Access
from addcow_mp.device.chain import WRITE, open_chain, readers_of_chain
from addcow_mp.device.files import File, sync_directory
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.manifest_file import invalidate_all
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.renaming import clear_unused
from addcow_mp.findings import CheckReport
from addcow_mp.format.bits import merged
from addcow_mp.jobs.check import check, leaked_clusters
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.units import MiB

#: Bytes copied at a time into the backup: the bitmap of a huge image is not held in memory.
_STEP = 1 * MiB


def repair(path: str, access: Access | None = None, *, everything: bool) -> CheckReport:
    """Check ``path``, repair what can be repaired, and check again; returns the last report.

    Raises :class:`AddcowError` when the image cannot be opened for writing.
    """
    access = access or Access()
    before = check(path, access)
    # Opening a lent overlay for writing raises the error that names the program that it is lent to.
    if not before.is_lent and (
        before.exit_code == 0 or not _is_repairable(before, everything=everything)
    ):
        return before
    with open_chain(path, WRITE, access) as overlay:
        remedy = "commit or flatten them first, or use --force"
        refuse_dependants(overlay, [overlay.image.file], access, remedy)
        refuse_linked([overlay.cow, overlay.image.file], force=access.force)
        removed = invalidate_all(overlay)
        done = _repair(overlay, before, everything=everything)
    after = check(path, access)
    after.manifests_removed = removed
    after.repairs, after.backup = done.repairs, done.backup
    after.leaks_fixed, after.corruptions_fixed = done.leaks_fixed, done.corruptions_fixed
    return after


def _is_repairable(report: CheckReport, *, everything: bool) -> bool:
    """Whether something can be repaired, and no other finding forbids opening the image."""
    names = {finding.name for finding in report.findings}
    wanted = {"leaks", *_REPAIRS} if everything else _LEAKS
    barred = {finding.name for finding in report.findings if finding.bars}
    return bool(names & wanted) and barred <= {"leaks", *_REPAIRS}


def _repair(overlay: Overlay, before: CheckReport, *, everything: bool) -> CheckReport:
    done = CheckReport(overlay.path)
    found = [one.name for one in before.findings if one.name in _REPAIRS]
    broken = [name for name in found if everything or name in _LEAKS]
    if broken:
        done.backup = _back_up(overlay)
        done.repairs.append(f"header and bitmap were copied to {done.backup} first")
    # Before the bitmap is extended: data behind its old end is no leak.
    _free_leaks(overlay, done)
    for name in broken:
        done.repairs.append(f"{name}: {_REPAIRS[name](overlay)}")
        done.corruptions_fixed += name not in _LEAKS
    overlay.image.file.sync()
    overlay.cow.sync()
    return done


def _back_up(overlay: Overlay) -> str:
    """Copy the ``.add-cow`` file, without its holes, to a new file where it really lies."""
    names = (f"{overlay.cow.base}.backup-{number}" for number in count(1))
    path = next(name for name in names if not os.path.lexists(name))
    backup = File.create(path, readers_of_chain(overlay))
    try:
        for start in range(0, overlay.cow.length, _STEP):
            view = memoryview(bytearray(min(_STEP, overlay.cow.length - start)))
            overlay.cow.read_into(view, start)
            if any(view):
                backup.write(view, start)
        backup.grow(overlay.cow.length)
        backup.sync()
        sync_directory(path)
    finally:
        backup.close()
    return path


def _free_leaks(overlay: Overlay, done: CheckReport) -> None:
    leaked = list(merged((cluster, cluster + 1) for cluster in leaked_clusters(overlay)))
    for first, stop in leaked:
        overlay.image.file.make_zero(*overlay.geometry.span(first, stop))
    done.leaks_fixed = sum(stop - first for first, stop in leaked)
    if leaked:
        done.repairs.append(f"leaks: {done.leaks_fixed} clusters were freed in the image file")


def _clear_stray(overlay: Overlay) -> str:
    stray = overlay.bitmap.stray()
    with overlay.cow.doing("clear bits past its last cluster"):
        overlay.bitmap.clear_stray()
    return f"{stray} bits past the last cluster were cleared"


def _extend_bitmap(overlay: Overlay) -> str:
    length = overlay.header.header_size + overlay.geometry.bitmap_length
    old = overlay.cow.length
    overlay.cow.grow(length)
    return f"the file was extended with zeros from {old} to {length} bytes"


def _zero_reserved(overlay: Overlay) -> str:
    clear_unused(overlay)
    return "header bytes that no name uses were zeroed"


#: What repairs a finding, by the name of the finding.
_REPAIRS = {
    "stray-bits": _clear_stray,
    "bitmap-length": _extend_bitmap,
    "reserved-bytes": _zero_reserved,
}

#: The findings that are repaired without *everything*: no reader looks at what is lost.
_LEAKS = {"leaks", "reserved-bytes"}
