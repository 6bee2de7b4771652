"""Manifests follow: what a job does to the manifests of the layers that it changes.

Before the first change the manifests are removed, and their directory is synced. A job that knows
what its layers hold afterwards makes new manifests after its last publication. It takes over the
digests of the moved data from the old manifests (:mod:`addcow_mp.engine.known_leaves`). So it reads
no backing file again, except leaves of which only a part changes. A job that does not know this
only removes manifests. The report names both, the new manifests and the removed ones.

An old manifest is used only if it describes its layer at the beginning of the job. Otherwise no new
manifest is made, because it could describe damaged data as good data. For the same reason digests
are taken over and not computed: a later verification still finds damage from before the job.

A new manifest is written like any other: draft, sync, rename, sync of the directory. The files that
it describes are synced first, with their times. The job is done by then, so an error here is only a
warning, and the layer has no manifest. An interrupted job leaves no manifest either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from addcow_mp.device.files import File
from addcow_mp.device.layer import Layer
from addcow_mp.device.manifest_draft import errors_naming
from addcow_mp.device.manifest_file import (
    is_manifest,
    manifest_of,
    manifests_of,
    remove_manifests,
)
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.allocation import data_stretches
from addcow_mp.engine.known_digest import ChangeFinder, unlike_manifest
from addcow_mp.engine.known_leaves import (
    ChangedLeaves,
    Cut,
    KnownLayer,
    KnownLeaves,
    KnownView,
)
from addcow_mp.engine.layer_digest import file_of, is_fully_allocated
from addcow_mp.engine.scan import ScanHooks, scan
from addcow_mp.engine.tasks import cut
from addcow_mp.engine.worker import Failed
from addcow_mp.errors import AddcowError, ImageError, StoppedError
from addcow_mp.format.bitmap import SparseBits
from addcow_mp.format.bits import Run
from addcow_mp.format.geometry import Geometry
from addcow_mp.format.leaves import FAN, GROUP, LEAF, digest
from addcow_mp.format.manifest import Manifest, read_head
from addcow_mp.jobs.manifest import Making, head_of, load_matching
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.report import Report

# What manifests say before a job


def known_chain(layer: Layer) -> KnownView:
    """Return the layers that the guest of ``layer`` sees, with their manifests.

    Raises :class:`ManifestError` for a manifest that does not describe its layer.
    """
    layers = [layer]
    while isinstance(layer, Overlay) and not layer.all_allocated and layer.backing is not None:
        layer = layer.backing
        layers.append(layer)
    known: list[KnownLayer] = []
    for one in reversed(layers):
        known.insert(0, KnownLayer(one.size, _manifest(one, known)))
    return KnownView(tuple(known))


def _manifest(layer: Layer, below: list[KnownLayer]) -> Manifest | None:
    """The manifest of ``layer``; None if it has none. ``below``: the layers below, from the top."""
    path = manifest_of(layer.path)
    if not is_manifest(path):
        return None
    manifests = [one.manifest for one in below if one.manifest is not None]
    if len(manifests) == len(below):
        return load_matching(layer, head_of(layer, manifests))
    # The layers below may have changed since the manifest was made, so mixed leaves will be read.
    with errors_naming(path, "read it"):
        found = read_head(path)
    head = replace(
        head_of(layer, []), backing_digest=found.backing_digest, backing_size=found.backing_size
    )
    return load_matching(layer, head)


# What every job does


class Follower:
    """Removes the manifests of the layers that a job changes. Subclasses also make new ones.

    A job calls :meth:`remove` before its first change and :meth:`renew` after its last publication.
    """

    def __init__(self, report: Report, options: RunOptions, hooks: Hooks) -> None:
        self._report = report
        self._options = options
        self._hooks = replace(hooks, progress=lambda *_: None)
        self._knows = False

    def remove(self, layers: Sequence[Layer], *, durable: bool) -> None:
        """Load what new manifests need, and remove the manifests of ``layers``.

        ``durable``: the directories are synced.
        """
        found = {layer.path: list(manifests_of(layer)) for layer in layers}
        own = {path for path, each in found.items() if each and manifest_of(path) in each}
        if own and self._options.manifests:
            with self._warning():
                self._learn(own)
                self._knows = True
        for each in found.values():
            self._report.manifests_removed += remove_manifests(each, durable=durable)

    def renew(self) -> None:
        """Make the new manifests."""
        if self._knows:
            with self._warning():
                self._renew()

    def _learn(self, own: set[str]) -> None:
        """Load the old manifests. ``own``: the paths of the changed layers that have one."""

    def _renew(self) -> None:
        """Make each new manifest with :meth:`_make`."""

    def _make(self, layer: Layer, below: list[Manifest], known: KnownLeaves) -> Manifest:
        for file in _files_of(layer):
            file.sync(attributes=True)
        manifest = Making(layer, below, self._options, self._hooks, known=known).manifest()
        self._report.manifests_made.append(manifest.path)
        return manifest

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Turn an error into a warning: it must not fail the job."""
        try:
            yield
        except AddcowError as error:
            if isinstance(error, StoppedError) and not self._knows:
                raise  # nothing is changed yet
            self._knows = False
            reason = "it was asked to stop" if isinstance(error, StoppedError) else error
            warning = f"{self._report.filename}: no new manifest is made: {reason}"
            self._report.warnings.append(warning)


def _files_of(layer: Layer) -> list[File]:
    return [file_of(layer), *([layer.cow] if isinstance(layer, Overlay) else [])]


# Each job


class FlattenFollower(Follower):
    """A flatten: the overlay then holds what its guest saw.

    ``discard``: the overlay is removed, and the raw file gets the manifest.
    """

    def __init__(
        self, overlay: Overlay, report: Report, options: RunOptions, hooks: Hooks, *, discard: bool
    ) -> None:
        super().__init__(report, options, hooks)
        self._overlay = overlay
        self._discard = discard
        self._view = KnownView(())

    def _learn(self, own: set[str]) -> None:
        if self._overlay.path in own:
            self._view = known_chain(self._overlay)

    def _renew(self) -> None:
        if self._view.layers:
            file = self._overlay.image.file
            layer: Layer = RawLayer(file) if self._discard else self._overlay
            self._make(layer, [], KnownLeaves(self._view))


class EmptyFollower(Follower):
    """A job after which ``overlay`` shows its backing file: a reset, or a new snapshot."""

    def __init__(self, overlay: Overlay, report: Report, options: RunOptions, hooks: Hooks) -> None:
        super().__init__(report, options, hooks)
        self._overlay = overlay
        self._below = KnownView(())

    def learn(self) -> None:
        """Load the manifests of the layers below a new overlay, which has none to remove."""
        with self._warning():
            self._learn({self._overlay.path})
            self._knows = True

    def _learn(self, own: set[str]) -> None:
        backing = self._overlay.backing
        if self._overlay.path in own and backing is not None:
            self._below = known_chain(backing)

    def _renew(self) -> None:
        if self._below.layers and self._below.is_complete:
            view = KnownView((KnownLayer(self._overlay.size, None),))
            known = KnownLeaves(view, below=self._below)
            self._make(self._overlay, self._below.manifests, known)


class CommitFollower(Follower):
    """A commit of ``overlay`` into ``backing``; with ``keep`` the overlay stays as it is."""

    def __init__(
        self,
        overlay: Overlay,
        backing: Layer,
        report: Report,
        options: RunOptions,
        hooks: Hooks,
        *,
        keep: bool,
    ) -> None:
        super().__init__(report, options, hooks)
        self._overlay = overlay
        self._backing = backing
        self._keep = keep
        #: What the backing file shows before and after, if it gets a manifest.
        self._below: KnownView | None = None
        self._changed = ChangedLeaves()
        #: What the overlay shows, if it gets a manifest.
        self._view: KnownView | None = None

    def _learn(self, own: set[str]) -> None:
        """Load the manifests of both layers; no new one is made if the backing file has none."""
        if self._backing.path not in own:
            return
        below = known_chain(self._backing)
        if not below.is_complete:
            return
        own_manifest = self._own_manifest(below) if self._overlay.path in own else None
        if own_manifest is not None:
            top = KnownLayer(self._overlay.size, own_manifest)
            layers = () if self._overlay.all_allocated else below.layers
            self._view = KnownView((top, *layers))
        self._changed = self._changes(below, own_manifest)
        self._below = below

    def _own_manifest(self, below: KnownView) -> Manifest:
        overlay = self._overlay
        return load_matching(
            overlay, head_of(overlay, [] if overlay.all_allocated else below.manifests)
        )

    def _changes(self, below: KnownView, own: Manifest | None) -> ChangedLeaves:
        cut_leaf = self._cut(below)
        if own is not None:
            return ChangedLeaves(manifest=own, view=self._view, cut=cut_leaf)
        return ChangedLeaves(leaves=self._touched(below), cut=cut_leaf)

    def _touched(self, below: KnownView) -> SparseBits:
        """The leaves that the overlay changes, by its bits: it has no manifest."""
        overlay, touched = self._overlay, SparseBits()
        if overlay.all_allocated:
            touched.set(0, -(-overlay.size // LEAF))
            return touched

        def failed(result: Failed) -> None:
            raise result.error

        geometry = Geometry(overlay.size, GROUP)
        tasks = cut(data_stretches([overlay.image.file], geometry, 1), geometry.clusters)
        hooks = ScanHooks(overlay.path, failed, self._hooks.stopping)
        work = ChangeFinder(overlay, below)
        for _, found in scan(work, tasks, self._options.scan_options, hooks):
            for run in found:
                touched.set(*run)
        return touched

    def _cut(self, below: KnownView) -> Cut | None:
        """The last leaf of the overlay, if it ends within it and the backing file is longer."""
        overlay, backing = self._overlay, self._backing
        leaf, rest = divmod(overlay.size, LEAF)
        if not rest or backing.size <= overlay.size:
            return None
        start = leaf * LEAF
        first, stop = overlay.geometry.touched(start, overlay.size)
        if next(overlay.runs_by_allocation(1, first, stop), None) is None:
            return Cut(leaf, None)
        upper = _leaf_of(overlay, leaf, self._view)
        lower = _leaf_of(backing, leaf, below)
        return Cut(leaf, digest(upper[:rest] + lower[rest:]))

    def _renew(self) -> None:
        below, view, backing = self._below, self._view, self._backing
        if below is None:
            return
        deeper = KnownView(below.layers[1:])
        held = below.layers[0].manifest if isinstance(backing, Overlay) else None
        known = KnownLeaves(below, held, self._changed, deeper)
        made = self._make(backing, deeper.manifests, known)
        if view is not None:
            overlay = self._overlay
            held = view.layers[0].manifest if self._keep else None
            # A fully allocated overlay that is kept shows nothing of its backing file.
            chain = [] if is_fully_allocated(overlay) else [made, *deeper.manifests]
            self._make(overlay, chain, KnownLeaves(view, held))


def _leaf_of(layer: Layer, leaf: int, known: KnownView | None) -> bytes:
    """The bytes of a leaf of ``layer``, padded with zeros.

    Raises :class:`ImageError` if they differ from a certain digest in ``known``.
    """
    start, content = leaf * LEAF, bytearray(LEAF)
    length = min(LEAF, layer.size - start)
    layer.read_into(memoryview(content)[:length], start)
    wanted = None if known is None else known.leaf(leaf)
    if wanted not in (None, digest(content)):
        raise unlike_manifest(layer, start, length)
    return bytes(content)


class RebaseFollower(Follower):
    """A rebase of ``overlay`` to the backing file ``new``; None = no backing file.

    The guest sees what it saw. ``unsafe``: only the name changes, and the old manifest is used only
    if the new backing file has the content of the old one.
    """

    def __init__(
        self,
        overlay: Overlay,
        new: Layer | None,
        report: Report,
        options: RunOptions,
        hooks: Hooks,
        *,
        unsafe: bool,
    ) -> None:
        super().__init__(report, options, hooks)
        self._overlay = overlay
        self._new = new
        self._unsafe = unsafe
        self._view = KnownView(())
        self._below = KnownView(())
        #: The allocated clusters in leaves that mix layers.
        self._clusters = SparseBits()

    def _learn(self, own: set[str]) -> None:
        overlay = self._overlay
        if overlay.path not in own:
            return
        below = KnownView(()) if self._new is None else known_chain(self._new)
        if self._new is not None and not (below.is_complete or overlay.all_allocated):
            problem = "it, or a layer below it, has no manifest; make it with 'manifest create'"
            raise ImageError(path=self._new.path, problem=problem)
        self._view = self._over(below) if self._unsafe else known_chain(overlay)
        self._below = below
        for run in self._mixed_runs():
            self._clusters.set(*run)

    def _over(self, below: KnownView) -> KnownView:
        """The view of the overlay over its new backing file.

        Raises :class:`ManifestError` if the new backing file has not the content of the old one.
        """
        overlay = self._overlay
        layers = () if overlay.all_allocated else below.layers
        manifests = [] if overlay.all_allocated else below.manifests
        own = load_matching(overlay, head_of(overlay, manifests))
        return KnownView((KnownLayer(overlay.size, own), *layers))

    def _mixed_runs(self) -> Iterator[Run]:
        """The runs of allocated clusters in leaves that mixed layers before."""
        overlay = self._overlay
        for number, leaf in self._mixed():
            start = (number * FAN + leaf) * LEAF
            span = overlay.geometry.touched(start, min(start + LEAF, overlay.size))
            yield from overlay.runs_by_allocation(1, *span)

    def _mixed(self) -> Iterator[Run]:
        """The group and the number of each leaf that mixed layers before."""
        manifest = self._view.layers[0].manifest
        if manifest is not None:
            for number in manifest.records:
                for leaf in manifest.group(number).mixed.search(1):
                    yield number, leaf

    def _changed(self) -> SparseBits:
        """The leaves that mixed layers before, and have more allocated clusters now."""
        changed, geometry = SparseBits(), self._overlay.geometry
        for first, stop in self._mixed_runs():
            for cluster in range(first, stop):
                if not self._clusters.is_set(cluster):
                    leaf = geometry.span(cluster, cluster + 1)[0] // LEAF
                    changed.set(leaf, leaf + 1)
        return changed

    def _renew(self) -> None:
        overlay, view, below = self._overlay, self._view, self._below
        if not view.layers:
            return
        changed = ChangedLeaves(leaves=self._changed(), view=view)
        known = KnownLeaves(view, view.layers[0].manifest, changed, below)
        old, overlay.backing = overlay.backing, self._new
        try:
            chain = [] if is_fully_allocated(overlay) else below.manifests
            self._make(overlay, chain, known)
        finally:
            overlay.backing = old
