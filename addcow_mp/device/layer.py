"""What a layer of a chain is: anything with a size that can be read and mapped.

A chain is a list of layers, each reading what it does not hold from the next.
Every raw file of it holds guest data at the data's own offset, so an extent needs
no offset of its own: it says *which* file, by depth, and whether there is data.
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
        """The file that a person would name to mean this layer."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the guest's bytes from ``offset`` on, within the size."""

    def walk(self, start: int, stop: int, depth: int = 0) -> Iterator[Extent]:
        """What ``[start, stop)``, within the size, is made of; ``depth`` is this layer's own."""

    def files(self) -> Iterator[File]:
        """The raw file of each depth, from this layer down."""

    def warnings(self) -> list[str]:
        """What a reader of this chain should be told: one line each."""

    def close(self) -> None:
        """Close this layer and all below."""

    def abandon(self) -> None:
        """The same, whatever has not been flushed."""
