"""Info: what the header says, and what the files that it names are.

Only the ``.add-cow`` file and its image file are needed. A backing file that is missing, or has a
format that is not opened here, is described by its name and format.
"""

from __future__ import annotations

from contextlib import closing
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.files import BACKING, COW, IMAGE, File, identity_at
from addcow_mp.device.hardlinks import link_warnings
from addcow_mp.device.headers import (
    MAX_DEPTH,
    Names,
    errors_naming,
    load_header,
    load_names,
    open_claimed,
    refuse_mismatch,
    refuse_protocol,
    short_bitmap_warning,
)
from addcow_mp.device.locks import READING, SHARING
from addcow_mp.errors import ImageError, LentError
from addcow_mp.format.bitmap import CowBitmap
from addcow_mp.format.geometry import Geometry, raw_size, virtual_size
from addcow_mp.format.header import ADD_COW, RAW, Header
from addcow_mp.format.names import path_combine


class RawInfo(NamedTuple):
    """A file at the end of a chain. Sizes are in bytes; ``actual_size``: what it uses of the disk.

    ``virtual_size`` is None for formats that are not read here.
    """

    filename: str
    format: str
    virtual_size: int | None
    actual_size: int
    identity: tuple[int, int]

    @property
    def allocated_size(self) -> int:
        """Bytes of the disk that it uses."""
        return self.actual_size


class Info(NamedTuple):
    """An add-cow overlay. Sizes are in bytes; ``virtual_size`` is None if the image is not raw.

    ``base``: the path that its names are relative to. ``lent_to``: its holder, if it
    is lent.
    """

    filename: str
    virtual_size: int | None
    actual_size: int
    identity: tuple[int, int]
    header: Header
    names: Names
    total_clusters: int | None
    allocated_clusters: int | None
    warnings: list[str]
    base: str
    lent_to: str | None = None

    @property
    def allocated_size(self) -> int | None:
        """Bytes in allocated clusters; a partial last cluster counts as a whole one."""
        if self.allocated_clusters is None:
            return None
        return self.allocated_clusters * self.header.cluster_size

    @property
    def full_image(self) -> str:
        """The image file's path as seen from here."""
        return path_combine(self.base, self.names.image)

    @property
    def full_backing(self) -> str | None:
        """The backing file's path as seen from here."""
        name = self.names.backing
        return None if name is None else path_combine(self.base, name)


def info(path: str, access: Access | None = None, *, named: bool = True) -> Info:
    """Describe the overlay at ``path``, which may lie anywhere if the user ``named`` it.

    Raises :class:`AddcowError`.
    """
    access = access or Access()
    with closing(open_claimed(access, path, READING, COW, named=named)) as cow:
        access = access.beside(cow.base) if named else access
        header = load_header(cow)
        names = load_names(cow, header)
        lent_to = None if header.lent_id is None else _holder(cow, header)
        with errors_naming(cow, names.image, "image file") as target:
            # A guest may be writing the image file of an overlay that is lent.
            claim = SHARING if header.lent else READING
            image = open_claimed(access, target, claim, IMAGE, named=False)
        with closing(image):
            if names.backing is not None:
                _refuse_same(cow, image, names.image, names.backing)
            with errors_naming(cow, names.image, "image file"):
                refuse_mismatch(image, names.image_format)
            return _info(cow, image, header, names)._replace(lent_to=lent_to)


def _holder(cow: File, header: Header) -> str:
    """The holder of an overlay that is lent. Raises :class:`LentError` when its twin is missing."""
    from addcow_mp.device.twin import holder_name, twin_of

    twin = twin_of(cow.base, header)
    holder = holder_name(header, twin)
    if header.lent and twin is None:
        raise LentError(path=cow.path, holder=holder)
    return holder


def _info(cow: File, image: File, header: Header, names: Names) -> Info:
    size = total = allocated = None
    warnings: list[str] = []
    if names.image_format == RAW:
        geometry = Geometry(virtual_size(image.length), header.cluster_size)
        with cow.doing("map its bitmap"):
            bitmap = CowBitmap(cow.fd, header.header_size, geometry, cow.path)
        size, total = geometry.size, geometry.clusters
        allocated = total if header.all_allocated else bitmap.count()
        warnings = short_bitmap_warning(cow.path) if bitmap.short else []
    warnings += link_warnings([cow, image])
    about = size, cow.allocated, cow.identity, header, names, total, allocated, warnings
    return Info(cow.path, *about, base=cow.base)


def _refuse_same(cow: File, image: File, image_name: str, backing_name: str) -> None:
    if identity_at(path_combine(cow.base, backing_name)) == image.identity:
        raise ImageError(
            path=cow.path,
            problem=f"backing file '{backing_name}' and image file '{image_name}' are the same "
            "file; they must be different files",
        )


def chain_info(path: str, access: Access | None = None) -> list[Info | RawInfo]:
    """Describe the overlay at ``path`` and every file below it, in order."""
    access = access or Access()
    found: list[Info | RawInfo] = []
    seen: set[tuple[int, int]] = set()
    here, format_ = path, ADD_COW
    while format_ == ADD_COW and len(found) < MAX_DEPTH:
        one = info(here, access, named=not found)
        if one.identity in seen:
            raise ImageError(path=here, problem="the chain comes back to this file")
        seen.add(one.identity)
        access = access if found else access.beside(one.base)
        found.append(one)
        if one.full_backing is None or one.names.backing_format is None:
            return found
        refuse_protocol(here, one.names.backing or "")
        here, format_ = one.full_backing, one.names.backing_format
    if format_ == ADD_COW:
        raise ImageError(path=path, problem=f"the chain is deeper than {MAX_DEPTH} overlays")
    with closing(open_claimed(access, here, READING, BACKING, named=False)) as file:
        size = raw_size(file.length) if format_ == RAW else None
        return [*found, RawInfo(here, format_, size, file.allocated, file.identity)]


class ChainLayer(NamedTuple):
    """A layer of a chain: 0 is the ``depth`` of its top.

    ``used_by``: the paths of the overlays that stand on it, without those of the chain.
    """

    depth: int
    about: Info | RawInfo
    used_by: list[str]


class ChainInfo(NamedTuple):
    """The layers of a chain, from the top down, and warnings for the user."""

    layers: list[ChainLayer]
    warnings: list[str]


def chain_with_users(path: str, access: Access | None = None) -> ChainInfo:
    """Describe every layer of the chain of ``path``, and say which overlays stand on it.

    Users are looked for beside the files of the chain and beneath the roots. Raises
    :class:`AddcowError`.
    """
    access = access or Access()
    chain = chain_info(path, access)
    users = users_of_chain(chain, access)
    pairs = zip(chain, users.paths, strict=True)
    layers = [ChainLayer(depth, one, by) for depth, (one, by) in enumerate(pairs)]
    warnings = [line for one in chain if isinstance(one, Info) for line in one.warnings]
    return ChainInfo(layers, warnings + users.warnings)


class Users(NamedTuple):
    """The overlays that stand on each layer of a chain, by depth, beside those of the chain."""

    paths: list[list[str]]
    warnings: list[str]


def users_of_chain(chain: list[Info | RawInfo], access: Access) -> Users:
    """Look for other users of each layer, beside its files and beneath the roots."""
    from addcow_mp.device.discovery import BACKUP, overlays_near

    members = {one.identity for one in chain}
    images = [one.full_image for one in chain if isinstance(one, Info)]
    places = [*(one.filename for one in chain), *images]
    near = overlays_near(places, access, follows_links=False)
    others = [
        one
        for one in near.overlays
        if one.identity not in members and identity_at(BACKUP.sub("", one.path)) not in members
    ]
    paths = []
    for layer in chain:
        own = {layer.identity}
        if isinstance(layer, Info):
            own.add(identity_at(layer.full_image) or layer.identity)
        paths.append(sorted(one.path for one in others if own & {one.backing, one.image}))
    hidden = "it cannot be examined, and may be a user of these files"
    return Users(paths, [f"{one.path}: {hidden} ({one.reason})" for one in near.unread])
