"""Sidecars: the manifest beside a layer, and how it ceases to be valid.

A manifest says what a layer held. It lies beside the file itself, not beside a symbolic link to
it, so that a layer with several names has one. An image file may have its own, as a raw disk: it
changes with its overlay. Whoever is about to change the layer takes it away first, and
makes that durable: better none than one that accuses sound data. Those who change a file without
asking leave other times behind, which the manifest knows too.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from addcow_mp.device.files import sync_directory
from addcow_mp.errors import FileError

if TYPE_CHECKING:
    from addcow_mp.device.layer import Layer

SUFFIX = ".manifest"

#: The kernel follows no more links, one after the other.
MAX_LINKS = 40

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
    for path in dict.fromkeys((layer.path, next(layer.files()).path)):
        invalidate(path, durable=durable)


def invalidate(path: str, *, durable: bool = True) -> None:
    """Remove the manifest of the file at ``path``, if there is one."""
    sidecar = manifest_of(path)
    try:
        os.unlink(sidecar)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError.of(sidecar, "remove it, as what it describes will change", error) from error
    if durable:
        sync_directory(sidecar)
