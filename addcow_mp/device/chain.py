"""Opening a chain: each file is opened once, then the layers are built.

All files of a chain must differ by device and inode. That catches cycles, and an image that is its
own backing file under any path. Each file is locked when it is opened, for the use that the
operation makes of it. Everything that can be refused is refused here, before any change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.files import (
    BACKING,
    COW,
    IMAGE,
    File,
    identity_at,
    is_device,
    sync_directory,
)
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
from addcow_mp.device.locks import READING, RESIZING, WRITING, Claim, Permission
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.permissions import Readers, readers_of
from addcow_mp.device.raw import RawLayer
from addcow_mp.errors import ImageError, UnsupportedError
from addcow_mp.format.header import ADD_COW, RAW, Header


class Use(NamedTuple):
    """The use of one layer's files: ``cow`` (also a raw layer's only file) and ``image``."""

    cow: Claim
    image: Claim


Uses = Mapping[int, Use]
"""The use of each layer of a chain, by depth; other layers are read."""

READ: Uses = {}
#: The overlay is written (write, flatten).
WRITE: Uses = {0: Use(WRITING, WRITING)}
#: The overlay is written; in the end only the image file stays, cut to the virtual size.
DISCARD: Uses = {0: Use(WRITING, RESIZING)}
#: Overlay and backing file are written, and the backing file may grow.
COMMIT: Uses = {0: Use(RESIZING, WRITING), 1: Use(RESIZING, RESIZING)}
#: Nothing is written: a commit or reset is estimated. The backing file is read even with
#: ALL_ALLOCATED.
ESTIMATING: Uses = {1: Use(READING, READING)}
#: Only the backing file is written.
COMMIT_KEEPING: Uses = {1: Use(RESIZING, RESIZING)}
#: The overlay goes back to its backing file, which must be there even with ALL_ALLOCATED.
RESET: Uses = {0: Use(RESIZING, WRITING), 1: Use(READING, READING)}
#: The overlay is lent to QEMU, or taken back.
LENDING: Uses = {0: Use(RESIZING, RESIZING)}
#: The overlay gets another virtual size.
RESIZE: Uses = LENDING
#: The overlay is written, and gets another backing file.
REBASE: Uses = {0: Use(RESIZING, WRITING)}


def open_chain(
    path: str,
    uses: Uses = READ,
    access: Access | None = None,
    *,
    lent: bool = False,
    alone: bool = False,
) -> Overlay:
    """Open and lock the overlay at ``path`` and all files below it. Raises :class:`AddcowError`.

    ``lent``: overlays that are lent to QEMU are accepted. ``alone``: nothing below is opened.
    """
    overlay = _open(path, ADD_COW, _Opening(uses, access or Access(), lent=lent, alone=alone))
    assert isinstance(overlay, Overlay)  # noqa: S101 - the class of that format
    return overlay


def open_layer(path: str, format_: str, uses: Uses = READ, access: Access | None = None) -> Layer:
    """Open ``path`` as ``raw`` or ``add-cow``, and all files below it.

    Raises :class:`AddcowError`, with nothing left open.
    """
    return _open(path, format_, _Opening(uses, access or Access()))


def open_below(overlay: Overlay, path: str, format_: str, access: Access) -> Layer:
    """Open ``path``, to be the backing file of ``overlay``, and all files below it, for reading.

    Raises :class:`AddcowError`, also where the overlay would be in its own chain.
    """
    opening = _Opening(READ, access)
    for file in (overlay.cow, overlay.image.file):
        opening.note(file)
    return _open(path, format_, opening, depth=1)


def _open(path: str, format_: str, opening: _Opening, depth: int = 0) -> Layer:
    try:
        return opening.layer(path, format_, depth)
    except BaseException:
        for file in opening.opened:
            file.close()
        raise


class _Opening:
    """The state while a chain is opened: the use of its files, and the files that are open."""

    def __init__(
        self, uses: Uses, access: Access, *, lent: bool = False, alone: bool = False
    ) -> None:
        self._uses = uses
        self._lent = lent
        self._alone = alone
        self._access = access
        self._seen: dict[tuple[int, int], str] = {}
        self._has_device = False
        self.opened: list[File] = []

    def layer(self, path: str, format_: str, depth: int) -> Layer:
        """Open one layer and those below."""
        if format_ == ADD_COW:
            return self._overlay(path, depth)
        if format_ != RAW:
            problem = f"format '{format_}' is not opened here; convert it to raw first"
            raise UnsupportedError(path=path, problem=problem)
        return RawLayer(self._open(path, self._use(depth).cow, BACKING))

    def _overlay(self, path: str, depth: int) -> Overlay:
        if depth >= MAX_DEPTH:
            raise ImageError(path=path, problem=f"the chain is deeper than {MAX_DEPTH} overlays")
        cow = self._open(path, self._use(depth).cow, COW)
        header = load_header(cow)
        if not self._lent:
            changes = cow.writable or Permission.WRITE in self._use(depth).image.used
            refuse_lent(cow, header, changes=changes)
        names = load_names(cow, header)
        refuse_image_format(path, names)
        with errors_naming(cow, names.image, "image file") as target:
            image = self._open(target, self._use(depth).image, IMAGE if depth == 0 else BACKING)
        return Overlay(cow, image, self._backing(cow, header, names, depth), header)

    def _backing(self, cow: File, header: Header, names: Names, depth: int) -> Layer | None:
        if names.backing is None or names.backing_format is None:
            return None
        # With ALL_ALLOCATED the backing file may be missing: only a job that uses it needs it.
        if self._alone or (header.all_allocated and depth + 1 not in self._uses):
            return None
        with errors_naming(cow, names.backing, "backing file") as target:
            return self.layer(target, names.backing_format, depth + 1)

    def _use(self, depth: int) -> Use:
        return self._uses.get(depth, Use(READING, READING))

    def _open(self, path: str, claim: Claim, role: str) -> File:
        named = not self.opened
        if self._has_device:
            # Opening a claimed device again would fail with a less helpful error.
            self._refuse_seen(path, identity_at(path))
        file = open_claimed(self._access, path, claim, role, named=named, check=self._check)
        self.opened.append(file)
        if named:
            self._access = self._access.beside(file.base)
        return file

    def _refuse_seen(self, path: str, identity: tuple[int, int] | None) -> None:
        other = None if identity is None else self._seen.get(identity)
        if other is not None:
            raise ImageError(
                path=path,
                problem=f"it is in the chain already, as '{other}'; overlay, image file and "
                "backing file must be different files",
            )

    def note(self, file: File) -> None:
        """Enter an open file of the chain."""
        self._seen[file.identity] = file.path

    def _check(self, file: File) -> None:
        self._refuse_seen(file.path, file.identity)
        self.note(file)
        self._has_device = self._has_device or is_device(file.identity)
        if self._has_device:
            from addcow_mp.device.holders import refuse_same_storage

            refuse_same_storage(file, self.opened)


def refuse_lent(cow: File, header: Header, *, changes: bool) -> None:
    """Raise when QEMU may write the overlay, or may read it and the caller ``changes`` it."""
    if header.lent or (changes and header.lent_for_reading):
        from addcow_mp.device.twin import lent_error, twin_of

        raise lent_error(cow.path, header, twin_of(cow.base, header))


def depth_of(layer: Layer | None) -> int:
    """The number of overlays in the chain."""
    depth = 0
    while isinstance(layer, Overlay):
        depth, layer = depth + 1, layer.backing
    return depth


def readers_of_chain(layer: Layer | None) -> Readers:
    """The users who may read every file of the chain."""
    return readers_of(file.fd for file in _files_of_chain(layer))


def sync_chain(layer: Layer) -> None:
    """Make every file of the chain and its name durable. Raises :class:`SyncError`."""
    files = list(_files_of_chain(layer))
    for file in files:
        file.sync(attributes=True)
    for path in {os.path.dirname(file.real): file.real for file in files if file.durable}.values():
        sync_directory(path)


def _files_of_chain(layer: Layer | None) -> Iterator[File]:
    while layer is not None:
        yield next(layer.files())
        if not isinstance(layer, Overlay):
            return
        yield layer.cow
        layer = layer.backing
