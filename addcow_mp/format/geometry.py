"""Cluster arithmetic: every conversion between bytes, clusters and bitmap bytes.

A virtual disk of ``size`` bytes consists of clusters of ``cluster_size`` bytes; the last cluster
may be partial. Python integers do not overflow, so 64-bit sizes need no care.
"""

from __future__ import annotations

from typing import NamedTuple

from addcow_mp.format.bits import BITS_PER_BYTE
from addcow_mp.units import SECTOR, round_down, round_up


def virtual_size(length: int) -> int:
    """The virtual size of an overlay whose image file has ``length`` bytes: its whole sectors."""
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
        """The number of clusters, including a partial last one."""
        return -(-self.size // self.cluster_size)

    @property
    def bitmap_used(self) -> int:
        """Bytes of bitmap that hold the bit of a cluster."""
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
        """The bytes ``[start, stop)`` of the clusters ``[first, stop)``, cut at ``size``."""
        return min(first * self.cluster_size, self.size), min(stop * self.cluster_size, self.size)
