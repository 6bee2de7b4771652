"""Leaves, groups and the digest of a view, as docs/manifest.md defines them.

A leaf is 64 KiB of the guest's view, a group is 256 leaves. Digests are BLAKE3. All leaves of
zeros have the same digest, and so have all nodes over nothing but zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from bitarray import bitarray
from blake3 import blake3

from addcow_mp.format.bits import Run, runs
from addcow_mp.units import KiB

#: Bytes of a leaf: fixed by the format, so that images with different clusters have equal digests.
LEAF = 64 * KiB

#: Leaves in a group, which is a node with so many children and a record in the file.
FAN = 256
GROUP = FAN * LEAF

DIGEST = 32

_CONTEXT = b"add-cow guest 1\0"


def digest(data: Any) -> bytes:
    """The BLAKE3 of some bytes."""
    return blake3(data).digest()


ZERO_LEAF = digest(bytes(LEAF))
ZERO_BLOCK = ZERO_LEAF * FAN


@cache
def zero_node(level: int) -> bytes:
    """The node of ``level`` over nothing but zeros; leaves are level 0."""
    return digest(zero_node(level - 1) * FAN) if level else ZERO_LEAF


def leaves_of(size: int) -> int:
    """The number of leaves of a view of ``size`` bytes."""
    return -(-size // LEAF)


def view_digest(size: int, nodes: dict[int, bytes]) -> str:
    """The digest of a view of ``size`` bytes from the ``nodes`` over its groups, by number.

    A group without a node is all zeros.
    """
    width, level = -(-leaves_of(size) // FAN), 1
    while width > 1:
        nodes = _parents(nodes, level)
        width, level = -(-width // FAN), level + 1
    top = nodes.get(0, zero_node(level))
    return digest(_CONTEXT + struct.pack("<Q", size) + top).hex()


def _parents(nodes: dict[int, bytes], level: int) -> dict[int, bytes]:
    families: dict[int, bytearray] = {}
    for number, node in nodes.items():
        parent, place = divmod(number, FAN)
        family = families.setdefault(parent, bytearray(zero_node(level) * FAN))
        family[place * DIGEST : (place + 1) * DIGEST] = node
    return {parent: digest(family) for parent, family in families.items()}


# Groups


def no_leaves() -> bitarray:
    """A bit for each leaf of a group, all 0."""
    return bitarray(FAN, endian="little")


def covered_by(size: int, number: int) -> bitarray:
    """The leaves of a group that a view of ``size`` bytes has."""
    bits = no_leaves()
    bits[: max(0, min(FAN, leaves_of(size) - number * FAN))] = 1
    return bits


@dataclass
class Group:
    """What a layer holds in 256 leaves; ``held`` and ``seen`` are blocks of 256 digests."""

    covered: bitarray = field(default_factory=no_leaves)
    mixed: bitarray = field(default_factory=no_leaves)
    held: bytes = ZERO_BLOCK
    seen: bytes = ZERO_BLOCK

    def guest_block(self, below: bytes) -> bytes:
        """The digests of what the guest sees over a backing file with the digests ``below``."""
        block = replaced(below, self.held, self.covered & ~self.mixed)
        return replaced(block, self.seen, self.mixed)


def places(bits: bitarray) -> Iterator[Run]:
    """The runs of ones, as bytes of a block of digests."""
    return ((first * DIGEST, stop * DIGEST) for first, stop in runs(bits, 1, 0, FAN))


def replaced(block: bytes, other: bytes, bits: bitarray) -> bytes:
    """``block`` with the digests of ``other`` where ``bits`` are 1."""
    if not bits.any():
        return block
    result = bytearray(block)
    for start, stop in places(bits):
        result[start:stop] = other[start:stop]
    return bytes(result)
