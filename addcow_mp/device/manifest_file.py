"""Sidecars: the manifest beside a layer, and how it ceases to be valid.

A manifest says what a layer held. It lies beside the file itself, not beside a symbolic link to
it, so that a layer with several names has one. An image file may have its own, as a raw disk: it
changes with its overlay. Whoever is about to change the layer takes it away first, and
makes that durable: better none than one that accuses sound data. Those who change a file without
asking leave other times behind, which the manifest knows too.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from addcow_mp.device.files import identity_at, sync_directory
from addcow_mp.errors import FileError

if TYPE_CHECKING:
    from addcow_mp.device.layer import Layer

SUFFIX = ".manifest"

#: The kernel follows no more links, one after the other.
MAX_LINKS = 40

#: Answers that mean that no file can be read under such a name.
_THERE_IS_NONE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
    errno.EISDIR,
)

#: What is not finished, or was left by a crash, has this behind its name besides.
DRAFT = ".part"


def manifest_of(path: str) -> str:
    """The path of the manifest of the layer at ``path``."""
    return _itself(path) + SUFFIX


def draft_of(path: str) -> str:
    """The path under which the manifest of the layer at ``path`` is written."""
    return manifest_of(path) + DRAFT


def _itself(path: str) -> str:
    """The file that ``path`` leads to if it is a link; the directories on the way do not matter."""
    if os.path.basename(path) in ("", "."):
        return os.path.realpath(path)
    with suppress(OSError, ValueError):  # it is no link, or nothing at all
        for _ in range(MAX_LINKS):
            path = os.path.join(os.path.dirname(path), os.readlink(path))
    return path


def described_by(path: str) -> str | None:
    """The layer that ``path`` is the manifest of, or the draft of one; None = by its name, none."""
    name = path.removesuffix(DRAFT)
    return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else None


def invalidate_all(layer: Layer, *, durable: bool = True) -> None:
    """Remove the manifests of a layer and of its image file; call it before any write to them."""
    for name in _described(layer):
        invalidate(name, durable=durable)


def refuse_unremovable_manifests(layer: Layer) -> None:
    """Raise when a manifest of the layer is there that :func:`invalidate_all` could not remove."""
    from addcow_mp.device.changeable import why_not_removable

    for sidecar in map(manifest_of, _described(layer)):
        reason = why_not_removable(sidecar) if is_manifest(sidecar) else None
        if reason is not None:
            action = "remove it, as what it describes will change"
            raise FileError(path=sidecar, action=action, reason=reason)


def _described(layer: Layer) -> Iterator[str]:
    """The names of a layer and of its image file, beside which manifests of them can lie."""
    files = list(layer.files())
    for path in dict.fromkeys((layer.path, files[0].path)):
        for name in _names(path):
            # A disk of the chain may have such a name, and what its guest has written at its start.
            if identity_at(manifest_of(name)) not in {file.identity for file in files}:
                yield name


def _names(path: str) -> list[str]:
    """The names of the file at ``path``: hard links are looked for in its directory alone."""
    itself = _itself(path)
    try:
        status = os.stat(itself)
        if status.st_nlink == 1:
            return [itself]
        directory = os.path.dirname(itself)
        with os.scandir(directory or ".") as entries:
            names = [entry.name for entry in entries if entry.inode() == status.st_ino]
    except OSError:
        return [itself]
    return [os.path.join(directory, name) for name in names]


def invalidate(path: str, *, durable: bool = True) -> None:
    """Remove the manifest of the file at ``path``, if there is one.

    A file of that name that is none is somebody else's, and stays.
    """
    sidecar = manifest_of(path)
    if not is_manifest(sidecar):
        return
    try:
        os.unlink(sidecar)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError.of(sidecar, "remove it, as what it describes will change", error) from error
    if durable:
        sync_directory(sidecar)


def is_manifest(path: str) -> bool:
    """Whether the file at ``path`` begins like one.

    Raises :class:`FileError` for one that may not be read: that could be.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _THERE_IS_NONE:
            return False
        raise FileError.of(path, "see whether it is a manifest", error) from error
    try:
        from addcow_mp.format.manifest import MAGIC

        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        # One that was cut short is one as well.
        head = os.pread(fd, len(MAGIC), 0) if is_file else b""
        return bool(head) and MAGIC.startswith(head)
    finally:
        os.close(fd)
