"""A layer of a chain: it has a size and can be read and mapped.

Each layer reads what it does not hold from the layer below. Every raw file of a chain holds guest
data at the guest's own offset, so an extent only says *which* file supplies it, by depth, and
whether there is data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from addcow_mp.device.extent import Extent
from addcow_mp.device.files import File


class Layer(Protocol):
    """One layer of a chain, and through it all layers below."""

    @property
    def size(self) -> int:
        """The virtual size in bytes, a multiple of the sector size."""

    @property
    def path(self) -> str:
        """The path under which a user knows this layer."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the guest's bytes from ``offset`` on, within the size."""

    def walk(self, start: int, stop: int, depth: int = 0) -> Iterator[Extent]:
        """The extents of ``[start, stop)``, within the size; ``depth`` is this layer's own."""

    def files(self) -> Iterator[File]:
        """The raw file of each depth, from this layer down."""

    def warnings(self) -> list[str]:
        """What a user of this chain should know, one line each."""

    def close(self) -> None:
        """Close this layer and all below."""

    def abandon(self) -> None:
        """Close them without a flush."""
