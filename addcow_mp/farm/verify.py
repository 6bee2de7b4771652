"""Farm verify: compare every layer of a farm with its manifest, each once.

A base that many overlays share is read once. Files with a manifest that no overlay names count
too: they may be overlays with a damaged header.

The processes start when the number of manifests is known, while the headers are being read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity, Named, Unexamined
from addcow_mp.device.manifest_file import SUFFIX, described_by, manifest_of
from addcow_mp.engine.verify_task import LayerRef
from addcow_mp.errors import ManifestError
from addcow_mp.farm.places import Found, files_of, overlays_of
from addcow_mp.findings import LayerReport, Severity, worst
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.format.manifest import read_head
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.jobs.verify import chain_of, is_new, verifiers


@dataclass(frozen=True)
class FarmLayerReports:
    """The reports on ``images``, the overlays in the places, and ``files``, all other layers.

    ``files`` also has what could not be examined. ``places``: where overlays were looked for.
    """

    exit_statuses: ClassVar = LayerReport.exit_statuses

    images: list[LayerReport]
    files: list[LayerReport]
    places: Found

    @property
    def all(self) -> list[LayerReport]:
        """Images and files."""
        return [*self.images, *self.files]

    @property
    def exit_code(self) -> int:
        """The status of the worst layer."""
        return worst(one.exit_code for one in self.all)


def farm_verify(
    places: Iterable[str], options: RunOptions = DEFAULTS, hooks: Hooks = NO_HOOKS
) -> FarmLayerReports:
    """Verify every layer in ``places``. Raises :class:`ImageError` when none of them is there.

    Raises :class:`RestartsError` when ``hooks`` stops it.
    """
    with hooks.looking():
        files = FarmFiles(places, options.access)
    options = replace(options, access=files.access)
    with verifiers(options, hooks, len(files.manifests)) as running:
        with hooks.looking():
            images, others = files.layers()
        reports = running.verify([*images, *others])
    others_found = reports[len(images) :] + files.unexamined()
    return FarmLayerReports(reports[: len(images)], others_found, files.found)


class FarmFiles:
    """The files in ``places``; ``access`` says how the files that they name may be opened.

    Raises :class:`ImageError` when none of the places is there.
    """

    def __init__(self, places: Iterable[str], access: Access) -> None:
        self.found = files_of(places, access)
        self._named = set(self.found.named)
        paths, access = self.found.files, self.found.access
        # A manifest that is given by name stands for its layer.
        files = (access.files or frozenset()).union(filter(None, map(described_by, self._named)))
        self.access = access._replace(files=files)
        self.manifests = [path for path in paths if path.endswith(SUFFIX)]
        self._paths = [path for path in paths if not path.endswith(SUFFIX)]

    def layers(self) -> tuple[list[LayerRef], list[LayerRef]]:
        """The overlays among the files, and all other layers.

        A file that was given by name is a layer, whatever it is.
        """
        # A file has one report; of several names it has the one with a manifest.
        described = {path.removesuffix(SUFFIX) for path in self.manifests}
        paths = sorted(self._paths, key=lambda path: path not in described)
        hidden: list[Unexamined] = []
        overlays = sorted(overlays_of(paths, hidden), key=lambda one: one.path)
        self.found.unexamined += [one for one in hidden if one.path not in self._named]
        seen: set[Identity | str] = {one.identity for one in overlays}
        others = list(self._others(overlays, seen))
        return [LayerRef(one.path) for one in overlays], others

    def _others(self, overlays: list[Named], seen: set[Identity | str]) -> Iterator[LayerRef]:
        """Layers below the overlays, files with a manifest, and files that were given by name."""
        for one in overlays:
            # A layer that was seen has come with all layers below it.
            if one.backing not in seen:
                access = self.access.beside(one.base or one.path)
                below = list(chain_of(one.path, ADD_COW, access))[1:]
                yield from (layer for layer in below if is_new(layer.path, seen))
        for path in self.manifests:
            if is_new(path.removesuffix(SUFFIX), seen):
                yield LayerRef(path.removesuffix(SUFFIX), _kind(path))
        for path in sorted(self._named):
            if described_by(path) is None and is_new(path, seen):
                manifest = manifest_of(path)
                yield LayerRef(path, _kind(manifest) if os.path.lexists(manifest) else RAW)

    def unexamined(self) -> list[LayerReport]:
        """Reports on what could not be examined, once the layers are known."""
        reports = []
        for one in self.found.unexamined:
            report = LayerReport(one.path)
            report.add("not-examined", Severity.UNVERIFIED, one.path, one.reason)
            reports.append(report)
        return reports


def _kind(path: str) -> str:
    """The format of the layer that the manifest at ``path`` describes."""
    try:
        return read_head(path).kind
    except (OSError, ManifestError):
        return ADD_COW
