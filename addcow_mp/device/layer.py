"""What a layer of a chain is: anything with a size that can be read and mapped.

A chain is a list of layers, each reading what it does not hold from the next.
Every raw file of it holds guest data at the data's own offset, so an extent needs
no offset of its own: it says *which* file, by depth, and whether there is data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple, Protocol

from addcow_mp.device.files import File


class Kind(IntEnum):
    """What an extent is made of."""

    DATA = 0
    """Bytes in the file at its depth."""
    ZERO = 1
    """A hole in the file at its depth: present, and reads as zeros."""
    ABSENT = 2
    """No layer holds it: reads as zeros."""


class Piece(NamedTuple):
    """The bytes ``[start, stop)`` of the guest's view, all of one kind at one depth."""

    start: int
    stop: int
    depth: int
    kind: Kind


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

    def pieces(self, start: int, stop: int, depth: int = 0) -> Iterator[Piece]:
        """What ``[start, stop)``, within the size, is made of; ``depth`` is this layer's own."""

    def files(self) -> Iterator[File]:
        """The raw file of each depth, from this layer down."""

    def warnings(self) -> list[str]:
        """What a reader of this chain should be told: one line each."""

    def close(self) -> None:
        """Close this layer and all below."""

    def abandon(self) -> None:
        """The same, whatever has not been flushed."""


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join pieces that touch and are alike."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and piece[2:] == last[2:] and piece.start == last.stop:
            last = last._replace(stop=piece.stop)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
