"""Manifest: record what each layer of a chain holds, so that it can be verified later.

From the bottom up, each layer without a manifest gets one. What the guest of an overlay sees is
computed from the overlay's digests and those of the layers below, which are not read again. An
existing manifest is used if it describes the files as they are now; it is replaced only on request.
A layer that changes while it is read gets no manifest. Overlays that share a base can be done side
by side: one process writes the manifest of the base, the others wait and use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from addcow_mp.device import faults
from addcow_mp.device.chain import open_layer, readers_of_chain
from addcow_mp.device.files import identity_at
from addcow_mp.device.layer import Layer
from addcow_mp.device.magic import refuse_as_raw
from addcow_mp.device.manifest_draft import ManifestDraft, errors_naming
from addcow_mp.device.manifest_file import draft_of, is_manifest, manifest_of
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.allocation import data_stretches
from addcow_mp.engine.known_digest import KnownLeafHasher
from addcow_mp.engine.known_leaves import KnownLeaves
from addcow_mp.engine.layer_digest import LeafHasher, cow_digests, file_of, is_fully_allocated
from addcow_mp.engine.scan import ScanHooks, scan
from addcow_mp.engine.tasks import TASK_BYTES, Stretch, cut
from addcow_mp.engine.worker import Failed
from addcow_mp.errors import FileError, ImageError, ManifestError
from addcow_mp.format.geometry import Geometry
from addcow_mp.format.header import ADD_COW
from addcow_mp.format.leaves import DIGEST, GROUP, view_digest
from addcow_mp.format.manifest import (
    DRAFT_MAGIC,
    HEAD,
    FileBytes,
    FileState,
    Head,
    Manifest,
    digest_of_file,
    guest_nodes,
    is_rounded_down,
)
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions

#: What a group with known digests weighs: its record takes 8 KiB of memory until it is written, and
#: a task has at most 4096 of them.
KNOWN_GROUP = TASK_BYTES // 4096


@dataclass(frozen=True)
class Made:
    """The manifest of one layer; ``written`` unless it existed already."""

    path: str
    guest_digest: str
    written: bool


def create(
    path: str,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    *,
    format_: str = ADD_COW,
    replaces: bool = False,
) -> list[Made]:
    """Write a manifest for each layer of ``path`` that has none, the deepest first.

    Raises :class:`ManifestError` for an existing one that does not describe these files, unless it
    ``replaces`` those.
    """
    top = open_layer(path, format_, access=options.access)
    try:
        if isinstance(top, RawLayer) and not options.access.force:
            refuse_as_raw(top.file)
        layers = _layers(top)
        _refuse_own(layers)
        made: list[Made] = []
        below: list[Manifest] = []
        layers.reverse()
        steps = hooks.in_steps([file_of(layer).allocated for layer in layers])
        for layer, step in zip(layers, steps, strict=True):
            one = Making(layer, below, options, step, replaces=replaces)
            manifest = one.manifest()
            below.insert(0, manifest)
            made.append(Made(manifest.path, manifest.head.guest_digest, one.written))
        return made
    finally:
        top.close()


def existing(top: Layer, options: RunOptions) -> list[Manifest]:
    """The manifests of all layers of a chain, from the top down.

    Raises :class:`ManifestError` for a layer without one that describes it as it is now.
    """
    layers = _layers(top)
    below: list[Manifest] = []
    for layer in reversed(layers):
        manifest = Making(layer, below, options, NO_HOOKS).existing()
        if manifest is None:
            kind = " -f raw" if isinstance(layer, RawLayer) else ""
            problem = f"it has no manifest; make one with 'addcow manifest create{kind}'"
            raise ImageError(path=layer.path, problem=problem)
        below.insert(0, manifest)
    return below


def _layers(top: Layer) -> list[Layer]:
    layers = [top]
    while isinstance(layers[-1], Overlay) and layers[-1].backing is not None:
        layers.append(layers[-1].backing)
    return layers


def _refuse_own(layers: list[Layer]) -> None:
    """Raise where a file of the chain has the name of one of its manifests."""
    used = {file_of(one).identity for one in layers}
    used |= {one.cow.identity for one in layers if isinstance(one, Overlay)}
    for one in layers:
        for path in (manifest_of(one.path), draft_of(one.path)):
            if identity_at(path) in used:
                problem = "it is a disk of this chain, and lies where the manifest would; rename it"
                raise ImageError(path=path, problem=problem)


def head_of(layer: Layer, below: list[Manifest]) -> Head:
    """The head of a manifest of ``layer`` as it is now, before any leaf is read."""
    files = {"image": FileState.of(file_of(layer).status)}
    if not isinstance(layer, Overlay):
        return Head("raw", layer.size, all_local=True, files=files)
    header, bitmap = cow_digests(layer)
    size = layer.header.header_size
    head = Head(ADD_COW, layer.size, layer.all_allocated, files, size, header, bitmap)
    files["cow"] = FileState.of(layer.cow.status)
    if below:
        known = below[0].head
        head = replace(head, backing_digest=known.guest_digest, backing_size=known.virtual_size)
    return head


def _lasting(head: Head) -> Head:
    """What a manifest must agree in with the layer.

    The times of an ``.add-cow`` file do not count: header and bitmap have digests, and a layer that
    was lent for reading is the same layer afterwards.
    """
    files = dict(head.files)
    if "cow" in files:
        files["cow"] = files["cow"]._replace(mtime_ns=0, ctime_ns=0)
    return replace(head, guest_digest="", groups=0, files=files)


def load_matching(layer: Layer, head: Head) -> Manifest:
    """The manifest of ``layer``. Raises :class:`ManifestError` unless it agrees with ``head``."""
    path = manifest_of(layer.path)
    with errors_naming(path, "read it"):
        if os.path.getsize(path) and not is_manifest(path):
            problem = "it exists and is no manifest; move it away"
            raise ImageError(path=path, problem=problem)
        manifest = Manifest.load(path)
    if _lasting(manifest.head) != _lasting(head):
        size = manifest.head.virtual_size
        is_stale = isinstance(layer, RawLayer) and is_rounded_down(size, layer.held)
        stale = f"it was made without the last, partial sector of {layer.path}"
        other = f"it describes another state of {layer.path} or of its backing file"
        raise ManifestError(path=path, problem=stale if is_stale else other)
    return manifest


class Making:
    """Makes the manifest of one ``layer``; ``below`` are those of the layers below it.

    ``known``: digests that are taken over; None = all that the layer holds is read.
    """

    def __init__(
        self,
        layer: Layer,
        below: list[Manifest],
        options: RunOptions,
        hooks: Hooks,
        *,
        replaces: bool = False,
        known: KnownLeaves | None = None,
    ) -> None:
        self._layer = layer
        self._below = below
        self._options = options
        self._hooks = hooks
        self._replaces = replaces
        self._known = known
        self._path = manifest_of(layer.path)
        self._head = head_of(layer, below)
        #: Whether the manifest had to be written.
        self.written = False

    def manifest(self) -> Manifest:
        """The manifest: the existing one, or a new one."""
        existing = self.existing()
        if existing is not None:
            return existing
        draft = ManifestDraft(
            self._layer.path,
            readers_of_chain(self._layer),
            access=self._options.access,
            stopping=self._hooks.stopping,
            note=self._hooks.note,
        )
        with draft.opened() as fd:
            # Another process may have written it meanwhile: overlays share their base.
            existing = self.existing()
            if existing is not None:
                return existing
            self._write(fd)
            if head_of(self._layer, self._below) != self._head:
                problem = "it was changed meanwhile; try again"
                raise ImageError(path=self._layer.path, problem=problem)
            draft.publish(fd)
        self.written = True
        return Manifest.load(self._path)

    def existing(self) -> Manifest | None:
        """The existing manifest, unless it does not match and may be replaced."""
        try:
            is_there = os.path.exists(self._path)
            return load_matching(self._layer, self._head) if is_there else None
        except ManifestError:
            if not self._replaces:
                raise
            return None

    def _write(self, fd: int) -> None:
        layer = self._layer
        with errors_naming(self._path, "write it"), os.fdopen(os.dup(fd), "r+b") as file:
            file.write(DRAFT_MAGIC.ljust(HEAD, b"\0"))
            for records in self._records():
                if faults.armed:
                    faults.hit("manifest_write")
                file.write(records)
            file.flush()
            end = file.tell()
            draft = Manifest(layer.path, FileBytes(fd, end, layer.path), self._head, end)
            guest_digest = self._guest_digest(draft)
            groups = len(draft.records)
            file.seek(0)
            file.write(replace(self._head, guest_digest=guest_digest, groups=groups).pack())
            file.flush()
            file.seek(end)
            file.write(digest_of_file(fd, end))
            file.flush()
        assert os.fstat(fd).st_size == end + DIGEST  # noqa: S101 - nothing else was written

    def _guest_digest(self, draft: Manifest) -> str:
        layer, below = self._layer, self._below
        if is_fully_allocated(layer):
            below = []
        elif below and not draft.records and below[0].head.virtual_size == layer.size:
            return below[0].head.guest_digest  # the layer shows its backing file, and no more
        return view_digest(layer.size, dict(guest_nodes([draft, *below], layer.size)))

    def _records(self) -> Iterator[bytes]:
        """The records of all groups, in order."""
        layer, hooks = self._layer, self._hooks

        def failed(result: Failed) -> bytes:
            if self._known is not None:
                raise result.error
            start, stop = (at * GROUP for at in (result.task.first, result.task.stop))
            action = f"hash the bytes from {start} to {min(stop, layer.size)}"
            raise FileError(path=layer.path, action=action, reason=str(result.error))

        scan_hooks = ScanHooks(layer.path, failed, hooks.stopping, progress=hooks.progress)
        geometry, options = Geometry(layer.size, GROUP), self._options.scan_options
        tasks = cut(self._stretches(geometry), geometry.clusters)
        waiting: dict[int, bytes] = {}
        due = 0
        for task, records in scan(self._hasher, tasks, options, scan_hooks):
            waiting[task.number] = records
            while due in waiting:
                yield waiting.pop(due)
                due += 1

    @property
    def _hasher(self) -> LeafHasher:
        layer, known = self._layer, self._known
        return LeafHasher(layer) if known is None else KnownLeafHasher(layer, known)

    def _stretches(self, geometry: Geometry) -> Iterable[Stretch]:
        """All groups with anything to do, weighed by the data that there is to read."""
        known = self._known
        if known is None or not known.is_complete:
            return data_stretches([file_of(self._layer)], geometry, 1)
        numbers = known.groups(0, geometry.clusters)
        return (Stretch(number, number + 1, KNOWN_GROUP) for number in numbers)
