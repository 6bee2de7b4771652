"""Entries of qcow2 tables that describe an overlay: their shape, and what allocated ones look like.

Guest data lies in the data file at its own offset, so the entry of an allocated cluster is known
from the cluster's offset. Entries are made as long integers: a part of a table is a fixed pattern
plus the part's offset in every entry, which is one addition.

There are two kinds:

- *plain* entries of 8 bytes: one for each cluster.
- *extended* entries of 16 bytes: the same and a word of bits. The lower 32 bits say which
  subclusters are allocated, the upper 32 bits which read as zeros.
"""

from __future__ import annotations

from array import array
from functools import cached_property

from addcow_mp.units import KiB, MiB

SUBCLUSTERS = 32
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1

#: The most bytes of L1 table that QEMU reads.
MAX_L1_BYTES = 32 * MiB

#: Bits of an entry. COPIED is needed: without it QEMU takes the cluster at offset 0 for empty.
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1 << 0

#: Bytes of entries that one addition makes: long enough to pay, short enough to compare early.
_STEP = 4 * KiB

#: Up to so many entries are made one by one, which then costs no more.
FEW = 16


class Qcow2Error(ValueError):
    """A qcow2 file is damaged, or has a feature that no twin has. The text says what is wrong."""


class Tables:
    """The entries of L2 tables: how many bytes they cover, and what all allocated ones look like.

    ``cluster_size`` is in bytes; ``extended`` entries have a bit for each of 32 subclusters.
    """

    def __init__(self, cluster_size: int, *, extended: bool) -> None:
        self.cluster_size = cluster_size
        self.extended = extended
        self.entry_size = 16 if extended else 8
        self.entries = cluster_size // self.entry_size
        #: Bytes of the guest's view that one table covers.
        self.coverage = self.entries * cluster_size
        #: Bytes that can be allocated by themselves.
        self.unit = cluster_size // SUBCLUSTERS if extended else cluster_size

    @cached_property
    def _pattern(self) -> tuple[int, int]:
        """:data:`_STEP` bytes of allocated entries at offset 0 as one number, and a 1 in each."""
        step, count = self.entry_size // 8, _STEP // self.entry_size
        pattern, ones = (array("Q", bytes(_STEP)) for _ in range(2))
        pattern[::step] = array("Q", range(COPIED, COPIED + self.step, self.cluster_size))
        ones[::step] = array("Q", [1]) * count
        if self.extended:
            pattern[1::2] = array("Q", [ALL_SUBCLUSTERS]) * count
        return _as_number(pattern), _as_number(ones)

    @property
    def step(self) -> int:
        """Bytes of the guest's view that :data:`_STEP` bytes of entries describe."""
        return _STEP // self.entry_size * self.cluster_size

    def allocated(self, start: int, count: int) -> bytes:
        """``count`` entries of allocated clusters, the first of them at ``start``."""
        if count <= FEW:
            return b"".join(self.entry(start + n * self.cluster_size) for n in range(count))
        pattern, ones = self._pattern
        length = count * self.entry_size
        starts = range(start, start + count * self.cluster_size, self.step)
        return b"".join((pattern + one * ones).to_bytes(_STEP, "big") for one in starts)[:length]

    def entry(self, start: int, bits: int | None = None) -> bytes:
        """The entry of the cluster at ``start``, allocated as a whole or where ``bits`` are set."""
        if not self.extended:
            return (COPIED | start).to_bytes(8, "big")
        allocated = ALL_SUBCLUSTERS if bits is None else bits
        return (COPIED | start).to_bytes(8, "big") + allocated.to_bytes(8, "big")


def _as_number(values: array[int]) -> int:
    values.byteswap()
    return int.from_bytes(values.tobytes(), "big")
