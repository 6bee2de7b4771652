"""Repair: what a check found and can be mended without guessing.

*Leaks* are freed: data in clusters that are not local. With *everything*, bits past the last
cluster are cleared, a bitmap that the file ends inside is extended with zeros, and bytes of the
header that no name uses are zeroed, after header and bitmap have been copied to a new file
beside the image. Nothing that says where data is gets invented: a wrong name, format or size
stays a finding. Data in clusters whose bits were missing is not freed in the same run, since
it is perhaps all that is left of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from addcow_mp.device.access import Access
from addcow_mp.device.chain import WRITE, open_chain, readers_of_chain
from addcow_mp.device.files import File, sync_directory
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.manifest_file import invalidate_all
from addcow_mp.device.overlay import Overlay
from addcow_mp.format.bits import merged
from addcow_mp.format.header import FIXED_SIZE
from addcow_mp.jobs.check import check, leaked_clusters
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.findings import CheckReport
from addcow_mp.units import MiB

#: Bytes copied at a time into the backup: the bitmap of a huge image is not held in memory.
_PIECE = 1 * MiB


def repair(path: str, access: Access | None = None, *, everything: bool) -> CheckReport:
    """Check ``path``, mend what can be mended, and check again: the second report is returned.

    Raises :class:`AddcowError` when the image cannot be opened for writing.
    """
    before = check(path, access)
    if before.exit_code == 0 or not _is_mendable(before, everything=everything):
        return before
    with open_chain(path, WRITE, access) as overlay:
        access = access or Access()
        mend = "commit or flatten them first, or use --force"
        refuse_dependants(overlay, [overlay.image.file], access, mend)
        refuse_linked([overlay.cow, overlay.image.file], force=access.force)
        invalidate_all(overlay)
        mended = _mend(overlay, before, everything=everything)
    after = check(path, access)
    after.repairs, after.backup = mended.repairs, mended.backup
    after.leaks_fixed, after.corruptions_fixed = mended.leaks_fixed, mended.corruptions_fixed
    return after


_MENDABLE = ("stray-bits", "bitmap-length", "reserved-bytes")


def _is_mendable(report: CheckReport, *, everything: bool) -> bool:
    """Whether something can be mended, and nothing else forbids to open the image."""
    names = {finding.name for finding in report.findings}
    wanted = {"leaks", *_MENDABLE} if everything else {"leaks"}
    barred = {finding.name for finding in report.findings if finding.bars}
    return bool(names & wanted) and barred <= {"leaks", *_MENDABLE}


def _mend(overlay: Overlay, before: CheckReport, *, everything: bool) -> CheckReport:
    mended = CheckReport(overlay.path)
    broken = [one.name for one in before.findings if one.name in _MENDABLE] if everything else []
    if broken:
        mended.backup = _back_up(overlay)
        mended.repairs.append(f"header and bitmap were copied to {mended.backup} first")
    # Before the bitmap is extended: what lies behind its old end is not judged by it.
    _free_leaks(overlay, mended)
    for name in broken:
        mended.repairs.append(f"{name}: {_MENDERS[name](overlay)}")
        mended.corruptions_fixed += 1
    overlay.image.file.sync()
    overlay.cow.sync()
    return mended


def _back_up(overlay: Overlay) -> str:
    """Copy the ``.add-cow`` file, holes apart, to a new file where it really lies."""
    path = next(name for name in _backup_names(overlay.cow.base) if not os.path.lexists(name))
    backup = File.create(path, readers_of_chain(overlay))
    try:
        for start in range(0, overlay.cow.length, _PIECE):
            view = memoryview(bytearray(min(_PIECE, overlay.cow.length - start)))
            overlay.cow.read_into(view, start)
            if any(view):
                backup.write(view, start)
        backup.grow(overlay.cow.length)
        backup.sync()
        sync_directory(path)
    finally:
        backup.close()
    return path


def _backup_names(path: str) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"{path}.backup-{number}"


def _free_leaks(overlay: Overlay, mended: CheckReport) -> None:
    leaked = list(merged((cluster, cluster + 1) for cluster in leaked_clusters(overlay)))
    for first, stop in leaked:
        overlay.image.file.make_zero(*overlay.geometry.span(first, stop))
    mended.leaks_fixed = sum(stop - first for first, stop in leaked)
    if leaked:
        mended.repairs.append(f"leaks: {mended.leaks_fixed} clusters were freed in the image file")


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
    used = [(0, FIXED_SIZE), *overlay.header.name_ranges()]
    position = 0
    for start, stop in merged(sorted(used)):
        overlay.cow.write(bytes(max(0, start - position)), position)
        position = stop
    overlay.cow.write(bytes(overlay.header.header_size - position), position)
    return "header bytes that no name uses were zeroed"


_MENDERS = {
    "stray-bits": _clear_stray,
    "bitmap-length": _extend_bitmap,
    "reserved-bytes": _zero_reserved,
}
