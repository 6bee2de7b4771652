"""Cluster arithmetic, all of it, in one place.

A virtual disk of ``size`` bytes is cut into clusters of ``cluster_size`` bytes;
the last one may be partial. Every rounding and every conversion between bytes,
clusters and bitmap bytes is here, so that no other module repeats one. Python's
integers do not overflow, which is all that 64-bit arithmetic asks of us.
"""

from __future__ import annotations

from typing import NamedTuple

from addcow_mp.format.bits import BITS_PER_BYTE
from addcow_mp.units import SECTOR, round_down, round_up


def virtual_size(length: int) -> int:
    """The virtual size of an overlay whose image file has ``length`` bytes: its whole sectors.

    Bytes behind them are not part of the view.
    """
    return round_down(length, SECTOR)


def raw_size(length: int) -> int:
    """The virtual size of a raw disk of ``length`` bytes: all of them, then zeros to a sector."""
    return round_up(length, SECTOR)


class Geometry(NamedTuple):
    """The clusters of one virtual disk: ``size`` and ``cluster_size`` in bytes."""

    size: int
    cluster_size: int

    @property
    def clusters(self) -> int:
        """How many clusters there are, a partial last one included."""
        return -(-self.size // self.cluster_size)

    @property
    def bitmap_used(self) -> int:
        """Bytes of bitmap that hold a bit of some cluster."""
        return -(-self.clusters // BITS_PER_BYTE)

    @property
    def bitmap_length(self) -> int:
        """Bytes of bitmap in the file: rounded up to a whole cluster."""
        return round_up(self.bitmap_used, self.cluster_size)

    def cluster_of(self, offset: int) -> int:
        """The cluster that holds the byte at ``offset``."""
        return offset // self.cluster_size

    def touched(self, start: int, stop: int) -> tuple[int, int]:
        """The clusters ``[first, stop)`` that the bytes ``[start, stop)`` touch."""
        return start // self.cluster_size, -(-stop // self.cluster_size)

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """The bytes ``[start, stop)`` of the clusters ``[first, stop)``, cut at the end."""
        return min(first * self.cluster_size, self.size), min(stop * self.cluster_size, self.size)
