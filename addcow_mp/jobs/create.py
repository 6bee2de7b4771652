"""Create: a new overlay over an image file and, usually, a backing file.

:mod:`addcow_mp.jobs.naming` resolves the names that are given. A raw file that begins as another
format does is refused, as backing file and as image file, unless forced: the check of the new
overlay would fail.

No existing data is overwritten. The ``.add-cow`` file must be new; an image file that exists keeps
its bytes and is never cut; a missing one is made, sparse. They become durable in this order: image
file, ``.add-cow`` file, directory. On failure all that was made is removed.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.chain import READ, depth_of, open_chain, open_layer, readers_of_chain
from addcow_mp.device.discovery import overlays_near
from addcow_mp.device.files import (
    COW,
    IMAGE,
    File,
    identity_at,
    it_exists,
    kind_of,
    sync_directory,
)
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.headers import MAX_DEPTH, open_claimed
from addcow_mp.device.locks import RESIZING
from addcow_mp.device.magic import refuse_as_raw
from addcow_mp.device.manifest_file import invalidate, is_manifest, manifest_of
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.permissions import EVERYBODY, Readers
from addcow_mp.errors import AddcowError, FileError, ImageError, UnsupportedError, UsageError
from addcow_mp.format.geometry import Geometry, raw_size
from addcow_mp.format.header import (
    ADD_COW,
    ALL_ALLOCATED,
    BACKING_NAME_LIMIT,
    FIXED_SIZE,
    IMAGE_NAME_LIMIT,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    RAW,
    Header,
    header_size,
)
from addcow_mp.jobs.backing import refuse_disguised, refuse_image_as_backing, roots_needed
from addcow_mp.jobs.dependants import refuse_shared_image, refuse_unexamined
from addcow_mp.jobs.naming import Located, beside, home_of, locate, plain
from addcow_mp.units import MAX_SIZE, SECTOR, KiB, round_up

DEFAULT_CLUSTER_SIZE = 64 * KiB


@dataclass(frozen=True)
class Created:
    """A new overlay: its virtual ``size`` in bytes, and warnings for the user.

    ``cluster_size``: in bytes. ``image`` and ``backing``: the names that it stores. ``manifest``:
    the path of its manifest, if it got one.
    """

    size: int
    warnings: list[str]
    cluster_size: int
    image: str
    backing: str | None
    manifest: str | None = None


def create_raw(path: str, size: int) -> int:
    """Create a new sparse raw file; the size is rounded up to whole sectors and returned."""
    refuse_existing(path)
    size = _whole_sectors(size)
    with _Making(Access()) as making:
        file = making.new(path)
        file.grow(size)
        file.sync()
        sync_directory(path)
    return size


def create(
    path: str,
    *,
    size: int | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    image: str | None = None,
    image_format: str = RAW,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    access: Access | None = None,
) -> Created:
    """Create the overlay ``path``. Sizes are in bytes.

    ``size`` defaults to the image file's length, else to the backing file's virtual size. ``image``
    defaults to ``path`` with the suffix ``.raw``. Without a backing file ALL_ALLOCATED is set.
    Raises :class:`AddcowError`, with nothing left behind.
    """
    refuse_existing(path)
    _check_options(path, cluster_size, image_format, backing, backing_format)
    image_file = beside(path, default_image(path)) if image is None else locate(path, image)
    backing_file = None if backing is None else locate(path, backing)
    files = _Files(path, image_file, backing_file, backing_format)
    return _create(files, size, cluster_size, access or Access())


def snapshot(
    path: str,
    new: str,
    *,
    backing_format: str = ADD_COW,
    access: Access | None = None,
    manifest: bool = True,
) -> Created:
    """Create the overlay ``new`` and its image file over the disk at ``path``.

    The disk stays as it is. ``new`` has its virtual size and, if it is an overlay, its cluster
    size. It gets a ``manifest`` if the disk has one. Raises :class:`AddcowError`, with nothing left
    behind.
    """
    refuse_existing(new)
    access = access or Access()
    _refuse_data(default_image(new), access)
    _check_options(new, DEFAULT_CLUSTER_SIZE, RAW, path, backing_format)
    below = Located(path, path) if path.startswith("/") else beside(new, path)
    files = _Files(new, beside(new, default_image(new)), below, backing_format)
    created = _create(files, None, None, access)
    if manifest and is_manifest(manifest_of(path)):
        return _with_manifest(created, path, new, access)
    return created


def _with_manifest(created: Created, path: str, new: str, access: Access) -> Created:
    """Make the manifest of a new overlay over the disk at ``path``; an error is a warning."""
    from addcow_mp.jobs.following import EmptyFollower
    from addcow_mp.jobs.options import NO_HOOKS, RunOptions
    from addcow_mp.jobs.report import Report

    options = RunOptions(access=access._replace(roots=(*access.roots, home_of(path))))
    report = Report("snapshot", new)
    try:
        with open_chain(new, READ, options.access) as overlay:
            follower = EmptyFollower(overlay, report, options, NO_HOOKS)
            follower.learn()
            follower.renew()
    except AddcowError as error:
        report.warnings.append(f"{new}: no manifest is made: {error}")
    warnings = [*created.warnings, *report.warnings]
    made = next(iter(report.manifests_made), None)
    return replace(created, warnings=warnings, manifest=made)


def _refuse_data(image: str, access: Access) -> None:
    """Raise when the image file exists and holds data; one without may be left by a crash."""
    if os.path.lexists(image):
        with contextlib.closing(access.open_named(image)) as file:
            if file.next_data(0) is not None:
                raise it_exists(image)


class _Files(NamedTuple):
    """The files of a new overlay: its own path, its image file, and its backing file."""

    path: str
    image: Located
    backing: Located | None
    backing_format: str | None


def _create(files: _Files, size: int | None, cluster_size: int | None, access: Access) -> Created:
    """Create an overlay; ``cluster_size`` None: it has the backing file's sizes."""
    path, image, backing, backing_format = files
    image_path, backing_path = image.path, backing and backing.path
    _refuse_same(path, image_path, backing_path)
    if backing_path is not None and backing_format == RAW and not access.force:
        refuse_image_as_backing(backing_path)
    below = _backing(backing_path, backing_format, image_path, access)
    _refuse_used_image(path, image_path, access)
    if cluster_size is None:
        size, cluster_size = below.size, below.cluster_size
    size = _chosen_size(path, size, image_path, below.size)
    head = _head(path, cluster_size, image, backing, backing_format)
    with _Making(access, below.readers) as making:
        warnings = _make_image(image_path, size, making, hidden=backing_path is not None)
        _make_cow(path, head, Geometry(size, cluster_size), making)
        sync_directory(path)
    removed = "it was removed, as it no longer applies"
    warnings += [f"{manifest}: {removed}" for manifest in making.manifests_removed]
    warnings += roots_needed(path, image_path, backing_path)
    return Created(size, warnings, cluster_size, image.name, backing and backing.name)


def refuse_existing(path: str) -> None:
    """Raise when a file exists at ``path``; this check comes before all others."""
    if os.path.lexists(path):
        raise it_exists(path)


def default_image(path: str) -> str:
    """Return the path of the image file when none is given: ``path`` with the suffix ``.raw``."""
    return os.path.join(home_of(path), os.path.splitext(os.path.basename(path))[0] + ".raw")


# Options


def _check_options(
    path: str, cluster_size: int, image_format: str, backing: str | None, backing_format: str | None
) -> None:
    smallest, largest = 1 << MIN_CLUSTER_BITS, 1 << MAX_CLUSTER_BITS
    if not smallest <= cluster_size <= largest or cluster_size & (cluster_size - 1):
        limits = f"give a power of two from {smallest // KiB}k to {largest // KiB}k"
        raise UsageError(message=f"invalid cluster_size {cluster_size}: {limits}")
    if image_format != RAW:
        problem = f"image_fmt '{image_format}' is not supported, the image file is raw"
        raise UnsupportedError(path=path, problem=problem)
    if backing is None and backing_format is not None:
        raise UsageError(message=f"a backing format ('{backing_format}') needs a backing file: -b")
    if backing is not None and backing_format is None:
        needs = f"backing file '{backing}' needs its format, which is never guessed"
        raise UsageError(message=f"{needs}: -F raw or -F add-cow")
    if backing_format not in (None, RAW, ADD_COW):
        problem = f"backing format '{backing_format}' is not supported; convert it to raw first"
        raise UnsupportedError(path=path, problem=problem)


def _whole_sectors(size: int) -> int:
    if not 0 <= size <= MAX_SIZE:
        raise UsageError(message=f"invalid size {size}: give 0 to 8 EiB")
    return round_up(size, SECTOR)


def _refuse_same(path: str, image: str, backing: str | None) -> None:
    files = [("overlay", plain(path)), ("image file", plain(image))]
    if backing is not None:
        files.append(("backing file", plain(backing)))
    for (other_what, other), (what, one) in combinations(files, 2):
        identity = identity_at(one)
        if one == other or (identity is not None and identity == identity_at(other)):
            same = f"{what} and {other_what} are the same file ('{one}')"
            raise ImageError(path=path, problem=f"{same}; they must be different files")


# Sizes


class _Below(NamedTuple):
    """What a new overlay takes over from its backing file, if it has one.

    ``readers``: who may read it, as its data goes into the image file.
    """

    size: int | None = None
    readers: Readers = EVERYBODY
    cluster_size: int = DEFAULT_CLUSTER_SIZE


def _backing(backing: str | None, format_: str | None, image: str, access: Access) -> _Below:
    """Open the backing file, and return what the new overlay takes over."""
    if backing is None or format_ is None:
        return _Below()
    layer = open_layer(backing, format_, access=access)
    try:
        if depth_of(layer) >= MAX_DEPTH:
            problem = f"the chain would be deeper than {MAX_DEPTH} overlays"
            raise ImageError(path=backing, problem=problem)
        if identity_at(image) in [file.identity for file in layer.files()]:
            problem = "the backing chain uses this file; name another image"
            raise ImageError(path=image, problem=problem)
        if not access.force:
            refuse_disguised(layer)
        clusters = layer.cluster_size if isinstance(layer, Overlay) else DEFAULT_CLUSTER_SIZE
        return _Below(layer.size, readers_of_chain(layer), clusters)
    finally:
        layer.close()


def _refuse_used_image(path: str, image: str, access: Access) -> None:
    """Refuse an image file that another overlay has."""
    identity = identity_at(image)
    if identity is None:
        return
    near = overlays_near([path, image], access)
    others = [one for one in near.overlays if one.image == identity]
    if others:
        with contextlib.closing(access.open_named(image)) as file:
            refuse_shared_image(file, others)
    if not access.force:
        refuse_unexamined(near.unread)


def _chosen_size(path: str, size: int | None, image: str, backing_size: int | None) -> int:
    existing = _existing_length(image)
    if size is not None:
        size = _whole_sectors(size)
        if existing is not None and size < existing:
            larger = f"it is larger ({existing} bytes) than the size asked for ({size})"
            remedy = "and is never cut; leave the size out or give a larger one"
            raise ImageError(path=image, problem=f"{larger}, {remedy}")
        return size
    # A create that was cut off early leaves an empty file, whose size means nothing.
    if existing:
        return raw_size(existing)
    if backing_size is not None:
        return backing_size
    nothing = "there is neither an image file with data nor a backing file"
    raise UsageError(message=f"{path}: give a size, for {nothing}")


def _existing_length(image: str) -> int | None:
    try:
        status = os.stat(image)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError.of(image, "look at it", error) from error
    if kind_of(status.st_mode) != "a regular file":
        raise ImageError(path=image, problem=f"it is {kind_of(status.st_mode)}, not a regular file")
    return status.st_size


# Names


def _head(
    path: str,
    cluster_size: int,
    image: Located,
    backing: Located | None,
    backing_format: str | None,
) -> bytes:
    """Return the header of the new file and the names right behind it."""
    image_name = image.stored(path, "image", IMAGE_NAME_LIMIT)
    backing_name = b"" if backing is None else backing.stored(path, "backing", BACKING_NAME_LIMIT)
    size, names = header_size(cluster_size), backing_name + image_name
    if FIXED_SIZE + len(names) > size:
        problem = f"the names of its files do not fit into {size - FIXED_SIZE} bytes"
        raise ImageError(path=path, problem=f"{problem}; use shorter names or larger clusters")
    header = Header(
        backing_offset=FIXED_SIZE if backing_name else 0,
        backing_size=len(backing_name),
        image_offset=FIXED_SIZE + len(backing_name),
        image_size=len(image_name),
        cluster_bits=cluster_size.bit_length() - 1,
        compatible_features=0 if backing_name else ALL_ALLOCATED,
        header_size=size,
        backing_format=(backing_format or "").encode(),
    )
    return header.pack() + names


# Making


class _Making:
    """The files that are made or grown. On failure they are removed or cut to their old length."""

    def __init__(self, access: Access, readers: Readers = EVERYBODY) -> None:
        self.access = access
        self._new: list[File] = []
        self._grown: list[tuple[File, int]] = []
        self._readers = readers
        #: The paths of manifests of earlier files, or of a file that grows.
        self.manifests_removed: list[str] = []

    def __enter__(self) -> _Making:
        return self

    def new(self, path: str, role: str = IMAGE) -> File:
        """Create the file, without a manifest that an earlier file has left."""
        # An .add-cow file holds no data of the backing file: it has the usual mode.
        file = File.create(path, self._readers if role == IMAGE else EVERYBODY)
        self._new.append(file)
        file.role = role
        self.manifests_removed += invalidate(path)
        return file

    def grown(self, path: str) -> File:
        """Open a file that exists and may grow."""
        file = open_claimed(self.access, path, RESIZING, IMAGE, named=True)
        self._grown.append((file, file.length))
        return file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._undo()
        for file in (*self._new, *(file for file, _ in self._grown)):
            file.close()

    def _undo(self) -> None:
        with contextlib.suppress(OSError):
            for file, length in self._grown:
                if file.length != length:
                    os.ftruncate(file.fd, length)
        for file in self._new:
            with contextlib.suppress(OSError):
                os.unlink(file.path)


def _make_image(path: str, size: int, making: _Making, *, hidden: bool) -> list[str]:
    """Make or grow the image file; return a warning when the overlay will hide its data."""
    warnings = []
    if os.path.lexists(path):
        image = making.grown(path)
        refuse_linked([image], force=making.access.force)
        if not making.access.force:
            refuse_as_raw(image)
        if hidden and image.next_data(0) is not None:
            warnings.append(f"{path}: the image file holds data that the new overlay hides")
        if image.length != size:
            making.manifests_removed += invalidate(path)
    else:
        image = making.new(path)
    image.grow(size)
    image.sync()
    sync_directory(path)
    return warnings


def _make_cow(path: str, head: bytes, geometry: Geometry, making: _Making) -> None:
    cow = making.new(path, COW)
    cow.grow(header_size(geometry.cluster_size) + geometry.bitmap_length)
    cow.write(head, 0)
    cow.sync()
