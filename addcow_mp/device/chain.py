"""Opening a chain: every file once, then the layers.

All files of a chain are different files by device and inode, which catches an image that is
its own backing under any spelling, and cycles. Every file is locked as it is opened, in the
way that the operation will use it. What can be refused is refused here, before anything has
been changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.files import BACKING, COW, IMAGE, File, identity_at, is_device
from addcow_mp.device.headers import (
    MAX_DEPTH,
    Names,
    errors_naming,
    load_header,
    load_names,
    open_claimed,
    refuse_image_format,
)
from addcow_mp.device.layer import Layer
from addcow_mp.device.locks import READING, RESIZING, WRITING, Claim
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.permissions import Readers, readers_of
from addcow_mp.device.raw import RawLayer
from addcow_mp.errors import ImageError, UnsupportedError
from addcow_mp.format.header import ADD_COW, RAW, Header


class Use(NamedTuple):
    """How one layer's files are used: ``cow``, also a raw layer's only file, and ``image``."""

    cow: Claim
    image: Claim


Uses = Mapping[int, Use]
"""How the layers of a chain are used, by depth; layers not in it are read."""

READ: Uses = {}
#: The overlay itself is written (write, flatten).
WRITE: Uses = {0: Use(WRITING, WRITING)}
#: The same, and in the end the image file, cut to the virtual size, is all that is left.
DISCARD: Uses = {0: Use(WRITING, RESIZING)}
#: Overlay and backing are written, and the backing may grow.
COMMIT: Uses = {0: Use(RESIZING, WRITING), 1: Use(RESIZING, RESIZING)}
#: Nothing is written yet: a look at what a commit will do, also where ALL_ALLOCATED is set.
ESTIMATING: Uses = {1: Use(READING, READING)}
#: Only the backing is written.
COMMIT_KEEPING: Uses = {1: Use(RESIZING, RESIZING)}


def open_chain(path: str, uses: Uses = READ, access: Access | None = None) -> Overlay:
    """Open and lock the add-cow overlay at ``path`` and all files below it.

    Raises :class:`AddcowError` with nothing left open.
    """
    overlay = open_layer(path, ADD_COW, uses, access)
    assert isinstance(overlay, Overlay)  # noqa: S101 - what that format is opened as
    return overlay


def open_layer(path: str, format_: str, uses: Uses = READ, access: Access | None = None) -> Layer:
    """Open ``path`` as ``raw`` or ``add-cow``; any other format is refused by name."""
    return _Opening(uses, access or Access()).layer(path, format_, 0)


class _Opening:
    """The state of one opening: how files are used, and what is open already."""

    def __init__(self, uses: Uses, access: Access) -> None:
        self.uses = uses
        self.access = access
        self.seen: dict[tuple[int, int], str] = {}
        self.opened: list[File] = []
        self.has_device = False

    def layer(self, path: str, format_: str, depth: int) -> Layer:
        try:
            return self._layer(path, format_, depth)
        except BaseException:
            for file in self.opened:
                file.close()
            raise

    def _layer(self, path: str, format_: str, depth: int) -> Layer:
        if format_ == ADD_COW:
            return self.overlay(path, depth)
        if format_ != RAW:
            raise UnsupportedError(
                path=path,
                problem=f"format '{format_}' is not opened here; convert it to raw first",
            )
        return RawLayer(self._open(path, self._use(depth).cow, BACKING))

    def overlay(self, path: str, depth: int) -> Overlay:
        if depth >= MAX_DEPTH:
            raise ImageError(path=path, problem=f"the chain is deeper than {MAX_DEPTH} overlays")
        cow = self._open(path, self._use(depth).cow, COW)
        header = load_header(cow)
        names = load_names(cow, header)
        refuse_image_format(path, names)
        with errors_naming(cow, names.image, "image file") as target:
            image = self._open(target, self._use(depth).image, IMAGE if depth == 0 else BACKING)
        return Overlay(cow, image, self._backing(cow, header, names, depth))

    def _backing(self, cow: File, header: Header, names: Names, depth: int) -> Layer | None:
        if names.backing is None or names.backing_format is None:
            return None
        # With ALL_ALLOCATED the backing may be gone: only a job that writes it needs it.
        if header.all_allocated and depth + 1 not in self.uses:
            return None
        with errors_naming(cow, names.backing, "backing file") as target:
            return self._layer(target, names.backing_format, depth + 1)

    def _use(self, depth: int) -> Use:
        return self.uses.get(depth, Use(READING, READING))

    def _open(self, path: str, claim: Claim, role: str) -> File:
        named = not self.opened
        if self.has_device:
            # A device that is held already cannot be opened once more, which tells less.
            self._refuse_met(path, identity_at(path))
        file = open_claimed(self.access, path, claim, role, named=named, accept=self._accept)
        self.opened.append(file)
        if named:
            self.access = self.access.beside(file.base)
        return file

    def _refuse_met(self, path: str, identity: tuple[int, int] | None) -> None:
        """Raise when the file is in the chain already."""
        other = None if identity is None else self.seen.get(identity)
        if other is not None:
            raise ImageError(
                path=path,
                problem=f"it is in the chain already, as '{other}'; overlay, image file and "
                "backing file must be different files",
            )

    def _accept(self, file: File) -> None:
        self._refuse_met(file.path, file.identity)
        self.seen[file.identity] = file.path
        self.has_device = self.has_device or is_device(file.identity)
        if self.has_device:
            from addcow_mp.device.holders import refuse_same_storage

            refuse_same_storage(file, self.opened)


def depth_of(layer: Layer | None) -> int:
    """How many overlays lie above the raw file at the end of the chain."""
    depth = 0
    while isinstance(layer, Overlay):
        depth, layer = depth + 1, layer.backing
    return depth


def files_of_chain(layer: Layer | None) -> Iterator[File]:
    """Every open file of the chain: raw files and ``.add-cow`` files, from the top down."""
    while layer is not None:
        yield next(layer.files())
        if not isinstance(layer, Overlay):
            return
        yield layer.cow
        layer = layer.backing


def readers_of_chain(layer: Layer | None) -> Readers:
    """Who may read what ``layer`` shows: whoever may read every file of the chain."""
    return readers_of(file.fd for file in files_of_chain(layer))
