"""Manifest files: where the manifest of a layer lies, and how it is removed.

A manifest lies beside the file itself, not beside a symbolic link to it, so a layer with several
names has one. An image file may also have a manifest of its own, as a raw disk. A job removes the
manifests of a layer, durably, before it changes the layer: a missing manifest is better than one
that reports sound data as damaged. Other programs leave a changed time, which the manifest shows.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from addcow_mp.device import faults
from addcow_mp.device.files import identity_at, sync_directory
from addcow_mp.errors import FileError

if TYPE_CHECKING:
    from addcow_mp.device.layer import Layer

SUFFIX = ".manifest"

#: The suffix after that of a manifest that is being written, or was left by a crash.
DRAFT = ".part"

#: The kernel follows no more links, one after the other.
MAX_LINKS = 40

#: Errors which say that no file can be read under a name.
_NO_FILE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
    errno.EISDIR,
)

_REMOVE = "remove it, as what it describes will change"


def manifest_of(path: str) -> str:
    """The path of the manifest of the layer at ``path``."""
    return _target(path) + SUFFIX


def draft_of(path: str) -> str:
    """The path under which the manifest of the layer at ``path`` is written."""
    return manifest_of(path) + DRAFT


def _target(path: str) -> str:
    """The file that ``path`` leads to if it is a link; links in its directory stay."""
    if os.path.basename(path) in ("", "."):
        return os.path.realpath(path)
    with suppress(OSError, ValueError):  # it is no link, or does not exist
        for _ in range(MAX_LINKS):
            path = os.path.join(os.path.dirname(path), os.readlink(path))
    return path


def described_by(path: str) -> str | None:
    """The layer that ``path`` is the manifest or the draft of, by its name; None for others."""
    name = path.removesuffix(DRAFT)
    return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else None


def invalidate_all(layer: Layer, *, durable: bool = True) -> list[str]:
    """Remove the manifests of a layer and of its image file; call it before any write to them.

    Returns their paths.
    """
    return remove_manifests(manifests_of(layer), durable=durable)


def remove_manifests(manifests: Iterable[str], *, durable: bool = True) -> list[str]:
    """Remove these manifests; returns the paths of those that were there."""
    return [one for one in manifests if _remove(one, durable=durable)]


def refuse_unremovable_manifests(layer: Layer) -> None:
    """Raise when :func:`invalidate_all` could not remove a manifest of the layer."""
    from addcow_mp.device.changeable import why_not_removable

    for manifest in manifests_of(layer):
        reason = why_not_removable(manifest)
        if reason is not None:
            raise FileError(path=manifest, action=_REMOVE, reason=reason)


def manifests_of(layer: Layer) -> Iterator[str]:
    """The manifests of a layer and of its image file that exist."""
    files = list(layer.files())
    for path in dict.fromkeys((layer.path, files[0].path)):
        for name in _names(path):
            manifest = name + SUFFIX
            # A disk of the chain may have the name of a manifest, and a guest may have written
            # the magic to its start.
            if is_manifest(manifest) and identity_at(manifest) not in {
                file.identity for file in files
            }:
                yield manifest


def _names(path: str) -> list[str]:
    """The names of the file that ``path`` leads to, including hard links in its directory."""
    target = path
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            target = _target(path)
            status = os.stat(target)
        if status.st_nlink == 1:
            return [target]
        directory = os.path.dirname(target)
        with os.scandir(directory or ".") as entries:
            names = [entry.name for entry in entries if entry.inode() == status.st_ino]
    except OSError:
        return [target]
    return [os.path.join(directory, name) for name in names]


def invalidate(path: str, *, durable: bool = True) -> list[str]:
    """Remove the manifest of the file at ``path``, if there is one; returns its path in a list.

    Another file with the name of a manifest stays.
    """
    manifest = manifest_of(path)
    return remove_manifests([manifest] if is_manifest(manifest) else [], durable=durable)


def _remove(manifest: str, *, durable: bool) -> bool:
    try:
        if faults.armed:
            faults.hit("manifest_remove")
        os.unlink(manifest)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise FileError.of(manifest, _REMOVE, error) from error
    if durable:
        sync_directory(manifest)
    return True


def is_manifest(path: str) -> bool:
    """Whether the file at ``path`` begins like a manifest.

    Raises :class:`FileError` for a file that cannot be read: it may be one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FILE:
            return False
        raise FileError.of(path, "see whether it is a manifest", error) from error
    try:
        from addcow_mp.format.manifest import MAGIC

        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        # A manifest that was cut short counts.
        head = os.pread(fd, len(MAGIC), 0) if is_file else b""
        return bool(head) and MAGIC.startswith(head)
    finally:
        os.close(fd)
