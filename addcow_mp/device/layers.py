"""Finds the layers below an overlay: by their headers alone, or by depth in an open chain.

Depth 0 is the overlay itself, 1 its backing file, and so on. A job that changes a layer further
down must find that layer before it opens the chain, because a file is locked for its use when it is
opened. So the headers are read first, without locks. When the chain is open and locked, the job
compares its layers with those that were found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.files import COW, File, identity_at
from addcow_mp.device.headers import MAX_DEPTH, errors_naming, load_header, load_names
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.format.header import ADD_COW


class Below(NamedTuple):
    """A layer below an overlay.

    ``name``: as the header of the layer above stores it. ``identity``: device and inode of its
    file; None if the file does not exist.
    """

    depth: int
    name: str
    path: str
    identity: tuple[int, int] | None


def layers_below(path: str, access: Access) -> Iterator[Below]:
    """The layers below the overlay at ``path``, from the top down, of any format.

    The layers below an overlay with ALL_ALLOCATED are included. Raises :class:`AddcowError`.
    """
    with closing(access.open_named(path)) as cow:
        yield from _below(cow, access.beside(cow.base), 0)


def _below(cow: File, access: Access, depth: int) -> Iterator[Below]:
    cow.role = COW
    names = load_names(cow, load_header(cow))
    if names.backing is None:
        return
    depth += 1
    with errors_naming(cow, names.backing, "backing file") as path:
        yield Below(depth, names.backing, path, identity_at(path))
        if names.backing_format == ADD_COW and depth < MAX_DEPTH:
            with closing(access.open_beneath(path)) as below:
                yield from _below(below, access, depth)


def overlays_above(top: Overlay, depth: int) -> list[Overlay]:
    """The overlays of an open chain above the layer at ``depth``, from the top down."""
    layers = (layer_at(top, number) for number in range(depth))
    return [layer for layer in layers if isinstance(layer, Overlay)]


def layer_at(top: Overlay, depth: int) -> Layer | None:
    """The layer at ``depth`` of an open chain; None if the chain is shorter."""
    layer: Layer | None = top
    for _ in range(depth):
        layer = layer.backing if isinstance(layer, Overlay) else None
    return layer


def own_files(layer: Layer) -> list[File]:
    """The files of this layer alone: for an overlay its ``.add-cow`` file, then its image file."""
    image = next(layer.files())
    return [layer.cow, image] if isinstance(layer, Overlay) else [image]
