"""Compares a layer with the head of its manifest: everything but the leaves.

The files must be the same ones, of the same size. A changed time alone is only a note: if the
content has changed too, a leaf differs. The backing file must have the content that it had when
the manifest was made. Header and bitmap have a digest each.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from addcow_mp.device.access import Access
from addcow_mp.device.files import File
from addcow_mp.device.headers import Names, resolve
from addcow_mp.device.layer import Layer
from addcow_mp.device.manifest_file import manifest_of
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.layer_digest import cow_digests, file_of
from addcow_mp.errors import AddcowError, ManifestError
from addcow_mp.findings import LayerReport, Range, Severity
from addcow_mp.format.header import ADD_COW, RAW, without_reading_mark
from addcow_mp.format.leaves import digest
from addcow_mp.format.manifest import FileState, Head, Manifest, is_rounded_down

_REMAKE = "make it again with 'addcow manifest create --replace'"


class ManifestCache:
    """Keeps the last manifest, which each part of a layer needs, and the heads of backing files."""

    def __init__(self) -> None:
        self._last: tuple[str, FileState, Manifest] | None = None
        self._heads: dict[str, tuple[FileState, Head]] = {}
        self._reachable: dict[tuple[str, tuple[str, ...]], bool] = {}

    def manifest(self, path: str) -> Manifest:
        """The manifest of the layer at ``path``. Raises like :meth:`Manifest.load`."""
        name = manifest_of(path)
        state = FileState.of(os.stat(name))
        if self._last is None or self._last[:2] != (name, state):
            self._last = name, state, Manifest.load(name)
        return self._last[2]

    def head(self, path: str, access: Access) -> Head | None:
        """The head of the manifest of a backing file.

        None without a manifest, and where ``access`` does not allow the backing file.
        """
        key = (path, access.roots)
        if key not in self._reachable:
            self._reachable[key] = can_reach(path, access)
        if not self._reachable[key]:
            return None
        name = manifest_of(path)
        try:
            state = FileState.of(os.stat(name))
            if self._heads.get(name, (None,))[0] != state:
                self._heads[name] = state, Manifest.load(name).head
        except (OSError, ManifestError):
            return None  # the report on that layer says why
        return self._heads[name][1]


def can_reach(path: str, access: Access) -> bool:
    """Whether a name in an image may lead to ``path``, and the file can be opened."""
    try:
        access.open_beneath(path).close()
    except AddcowError:
        return False
    return True


def find_manifest(
    path: str, format_: str, load: Callable[[str], Manifest], report: LayerReport
) -> Manifest | None:
    """The manifest of the layer at ``path``, or None and a finding that says why."""
    try:
        return load(path)
    except FileNotFoundError:
        form = "" if format_ == ADD_COW else " -f raw"
        message = f"it has no manifest; make one with 'addcow manifest create{form}'"
        report.add("no-manifest", Severity.UNVERIFIED, path, message)
    except ManifestError as error:
        report.add("manifest", Severity.DAMAGE, manifest_of(path), error.fields["problem"])
    except OSError as error:
        reason = error.strerror or str(error)
        report.add("manifest", Severity.UNVERIFIED, manifest_of(path), reason)
    return None


def has_same_files(layer: Layer, manifest: Manifest, report: LayerReport) -> bool:
    """Whether the files of ``layer`` are those that the manifest describes."""
    files = {"image": file_of(layer)}
    if isinstance(layer, Overlay):
        files["cow"] = layer.cow
    expected = manifest.head.files
    results = [_is_same_file(file, expected.get(key), report) for key, file in files.items()]
    same = all(results)
    kind = ADD_COW if isinstance(layer, Overlay) else RAW
    if not same or (manifest.head.kind, manifest.head.virtual_size) == (kind, layer.size):
        return same
    if isinstance(layer, RawLayer) and is_rounded_down(manifest.head.virtual_size, layer.held):
        what = "the file, which is part of the disk"
        report.add("stale", Severity.UNVERIFIED, manifest.path, _without_last_sector(what))
    else:
        message = "it describes a layer of another format or size"
        report.add("manifest", Severity.DAMAGE, manifest.path, message)
    return False


def _is_same_file(file: File, expected: FileState | None, report: LayerReport) -> bool:
    found = FileState.of(file.status)
    if expected is None or expected[:2] != found[:2]:
        message = "it was replaced: its manifest describes another file, or another size"
        report.add("replaced", Severity.DAMAGE, file.path, message)
        return False
    if expected != found:
        message = "it was written or touched after its manifest was made"
        report.add("changed", Severity.NOTE, file.path, message)
    return True


def _without_last_sector(what: str) -> str:
    return f"it was made without the last, partial sector of {what}; {_REMAKE}"


def compare_backing(
    layer: Layer,
    names: Names | None,
    manifest: Manifest,
    head_at: Callable[[str], Head | None],
    report: LayerReport,
) -> None:
    """Report a backing file whose manifest has other content than when this one was made."""
    expected = manifest.head.backing_digest
    if not isinstance(layer, Overlay) or names is None or names.backing is None or expected is None:
        return
    path = resolve(layer.cow, names.backing)
    found = head_at(path)
    if found is None or found.guest_digest == expected:
        return
    old_size = manifest.head.backing_size or 0
    if found.kind == RAW and is_rounded_down(old_size, found.files["image"].size):
        what = f"{path}, which is part of that disk"
        report.add("stale", Severity.UNVERIFIED, manifest.path, _without_last_sector(what))
        return
    message = f"the backing file {path} has other content than when the manifest was made"
    report.add("backing-replaced", Severity.DAMAGE, layer.path, message)


def has_same_bitmap(layer: Layer, head: Head, buffer: memoryview, report: LayerReport) -> bool:
    """Whether the bitmap is unchanged; reports header and bitmap that differ."""
    if not isinstance(layer, Overlay):
        return True
    header, bitmap = cow_digests(layer, buffer)
    size = layer.header.header_size
    length = min(layer.cow.length - size, layer.geometry.bitmap_length)
    for name, same, start, extent in (
        ("header", header == head.header_digest, 0, size),
        ("bitmap", bitmap == head.bitmap_digest, size, length),
    ):
        if not same:
            report.ranges.append(Range(layer.path, start, extent))
            report.add(name, Severity.DAMAGE, layer.path, f"its {name} differs from the manifest")
    return bitmap == head.bitmap_digest


def report_damaged_header(cow: File, head: Head, report: LayerReport) -> bool:
    """Whether the header of an overlay that cannot be opened differs from its manifest."""
    found = bytearray(min(head.header_size or 0, cow.length))
    cow.read_into(memoryview(found), 0)
    without_reading_mark(found)
    if head.header_digest is None or digest(found).hex() == head.header_digest:
        return False
    if found:
        report.ranges.append(Range(report.path, 0, len(found)))
    message = "its header differs from the manifest, and nothing else of it could be verified"
    report.add("header", Severity.DAMAGE, report.path, message)
    return True
