"""Sidecars: the manifest beside a layer, and how it ceases to be valid.

A manifest says what a layer held. Whoever is about to change the layer takes it away first, and
makes that durable: better none than one that accuses sound data. Those who change a file without
asking leave other times behind, which the manifest knows too.
"""

from __future__ import annotations

import os

from addcow_mp.device.files import sync_directory
from addcow_mp.errors import FileError

SUFFIX = ".manifest"

#: What is not finished, or was left by a crash, has this behind its name besides.
DRAFT = ".part"


def manifest_of(path: str) -> str:
    """The path of the manifest of the layer at ``path``."""
    return path + SUFFIX


def draft_of(path: str) -> str:
    """The path under which the manifest of the layer at ``path`` is written."""
    return path + SUFFIX + DRAFT


def described_by(path: str) -> str | None:
    """The layer that ``path`` is the manifest of, or the draft of one; None = by its name, none."""
    name = path.removesuffix(DRAFT)
    return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else None


def invalidate(path: str, *, durable: bool = True) -> None:
    """Remove the manifest of the layer at ``path``, if there is one; call it before any write."""
    sidecar = manifest_of(path)
    try:
        os.unlink(sidecar)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError.of(sidecar, "remove it, as what it describes will change", error) from error
    if durable:
        sync_directory(sidecar)
