"""Farm verify: every layer of a farm held against its manifest, each once.

A base that a thousand overlays share is read once, as is every overlay; what stands above a layer
that differs is known from the graph. Files with a manifest that nobody names any more count too:
they may be overlays whose header was damaged beyond recognition.

The processes are started once it is known how many manifests there are, and while the headers of
a large farm are being read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity, Named, Unexamined
from addcow_mp.device.manifest_file import SUFFIX, described_by, manifest_of
from addcow_mp.errors import ManifestError
from addcow_mp.farm.places import Found, files_of, overlays_of
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.format.manifest import read_head
from addcow_mp.jobs.layer_report import Grade, LayerReport
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.jobs.verify import chain_of, verifiers, was_met
from addcow_mp.jobs.verify_task import LayerRef


@dataclass(frozen=True)
class FarmLayerReports:
    """What was found: ``images`` are the overlays in the places, ``files`` all other layers.

    Also among ``files`` is what could not be looked at. ``places``: where they were looked for.
    """

    images: list[LayerReport]
    files: list[LayerReport]
    places: Found

    @property
    def all(self) -> list[LayerReport]:
        """Both."""
        return [*self.images, *self.files]


def farm_verify(
    places: Iterable[str], options: RunOptions = DEFAULTS, hooks: Hooks = NO_HOOKS
) -> FarmLayerReports:
    """Verify every layer in ``places``. Raises :class:`ImageError` when none of them is there.

    Raises :class:`RestartsError` when ``hooks`` stops it.
    """
    with hooks.looking():
        files = FarmFiles(places, options.access)
    options = replace(options, access=files.access)
    with verifiers(options, hooks, len(files.manifests)) as crew:
        with hooks.looking():
            images, others = files.layers()
        layer_reports = crew.verify([*images, *others])
    others_found = layer_reports[len(images) :] + files.unexamined()
    return FarmLayerReports(layer_reports[: len(images)], others_found, files.found)


class FarmFiles:
    """The files in ``places`` by their names, and how what they name may be opened.

    Raises :class:`ImageError` when none of the places is there.
    """

    def __init__(self, places: Iterable[str], access: Access) -> None:
        self.found = files_of(places, access)
        self._named = set(self.found.named)
        paths, access = self.found.files, self.found.access
        # A manifest that was named stands for its layer.
        files = (access.files or frozenset()).union(filter(None, map(described_by, self._named)))
        self.access = access._replace(files=files)
        #: As many layers as have one can be verified.
        self.manifests = [path for path in paths if path.endswith(SUFFIX)]
        self._paths = [path for path in paths if not path.endswith(SUFFIX)]

    def layers(self) -> tuple[list[LayerRef], list[LayerRef]]:
        """The overlays among the files, and all other layers.

        A file that is a place itself is a layer, whatever it is: it was asked for.
        """
        # A file has one verdict; of several names it goes by one that has a manifest.
        described = {path.removesuffix(SUFFIX) for path in self.manifests}
        paths = sorted(self._paths, key=lambda path: path not in described)
        overlays = sorted(self._overlays_of(paths), key=lambda one: one.path)
        seen: set[Identity | str] = {one.identity for one in overlays}
        others = list(_others(overlays, self.manifests, self.access, seen))
        others += [one for path in sorted(self._named) for one in _alone(path, seen)]
        return [LayerRef(one.path) for one in overlays], others

    def _overlays_of(self, paths: list[str]) -> list[Named]:
        hidden: list[Unexamined] = []
        overlays = overlays_of(paths, hidden)
        # What is named is a layer, and is told of as one.
        self.found.unexamined += [one for one in hidden if one.path not in self._named]
        return overlays

    def unexamined(self) -> list[LayerReport]:
        """What could not be looked at, once the layers are known."""
        return [_unexamined(one) for one in self.found.unexamined]


def _unexamined(one: Unexamined) -> LayerReport:
    layer_report = LayerReport(one.path)
    layer_report.remark("not-examined", Grade.UNVERIFIED, one.path, one.reason)
    return layer_report


def _others(
    overlays: list[Named], manifests: list[str], access: Access, seen: set[Identity | str]
) -> Iterator[LayerRef]:
    """What overlays stand on and no overlay of the farm is, and what has a manifest besides."""
    for one in overlays:
        # What was met has brought with it all that it stands on.
        if one.backing not in seen:
            for target in list(chain_of(one.path, ADD_COW, access.beside(one.base or one.path)))[
                1:
            ]:
                yield from _new(target, seen)
    for path in manifests:
        for target in _new(LayerRef(path.removesuffix(SUFFIX)), seen):
            yield replace(target, format=_kind(path))


def _alone(path: str, seen: set[Identity | str]) -> Iterator[LayerRef]:
    """A file that was named and is no overlay: raw, but for the manifest that was one of those."""
    if described_by(path) is None:
        sidecar = manifest_of(path)
        kind = _kind(sidecar) if os.path.lexists(sidecar) else RAW
        yield from _new(LayerRef(path, kind), seen)


def _kind(path: str) -> str:
    """What layer the manifest at ``path`` is about."""
    try:
        return read_head(path).kind
    except (OSError, ManifestError):
        return ADD_COW


def _new(target: LayerRef, seen: set[Identity | str]) -> Iterator[LayerRef]:
    """``target``, unless the same file was met before, or the same name of none."""
    if not was_met(target.path, seen):
        yield target
