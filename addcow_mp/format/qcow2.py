"""The qcow2 file that describes an overlay to QEMU: metadata only, bytes in and bytes out.

QEMU opens no add-cow file. It opens a qcow2 file with an *external data file*, which keeps guest
data at its own offset, as the image file of an overlay does. So the same overlay can be written as
a small qcow2 file, its *twin*: the data file is the image file, the backing file is the backing
file, and each allocated cluster has one entry in a table.

This is no general qcow2 library. It writes one layout, and reads what QEMU can make of that:
version 3, an external data file, no snapshots, no encryption, no compressed clusters. Anything else
is an error (:class:`Qcow2Error`). A file may come from anywhere: what it claims is checked against
its length before memory is taken for it, and tables that overlap are refused.

Layout of a new file, in clusters: header, refcount table, refcount blocks, L1 table, L2 tables.
Only clusters with metadata have a refcount. An L2 table exists where one of its clusters is
allocated, and only the part with entries is written: the rest of the table is a hole.

Two kinds of twin differ in their entries:

- *plain*: the clusters of the overlay. One entry of 8 bytes for each.
- *sector*: clusters of 16 KiB with extended entries of 16 bytes, which have a bit for each sector.

All integers of the format are big-endian. This module has the header. Entries of tables are in
:mod:`addcow_mp.format.qcow2_entries`, :mod:`addcow_mp.format.qcow2_write` makes a file, and
:mod:`addcow_mp.format.qcow2_read` reads one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple

from addcow_mp.format.qcow2_entries import MAX_L1_BYTES, Qcow2Error, Tables
from addcow_mp.units import SECTOR, round_up

MAGIC = b"QFI\xfb"
VERSION = 3

#: Bits of the incompatible features. The last one is our own: while it is set, QEMU refuses the
#: file, because it refuses bits that it does not know.
DIRTY, CORRUPT, DATA_FILE, EXTENDED_L2, DISABLED = 1 << 0, 1 << 1, 1 << 2, 1 << 4, 1 << 63
_KNOWN = DIRTY | CORRUPT | DATA_FILE | EXTENDED_L2 | DISABLED

#: Bits of the compatible features, which QEMU keeps: a layer was lent for an overlay in another
#: directory, and for overlays in several. Bits 8 to 61 are then a number of the first directory;
#: the lower bits are QEMU's.
USED_ELSEWHERE, USED_IN_SEVERAL = 1 << 63, 1 << 62
DIRECTORY_MASK = USED_IN_SEVERAL - (1 << 8)

#: A bit of the autoclear features.
DATA_FILE_RAW = 1 << 1

#: Types of header extensions. QEMU keeps an extension that it does not know, such as ours.
END, BACKING_FORMAT, FEATURE_NAMES = 0, 0xE2792ACA, 0x6803F857
BITMAP_DIRECTORY, DATA_FILE_NAME, TWIN = 0x23852875, 0x44415441, 0x41434F57

#: Cluster sizes that QEMU opens, as powers of two; extended entries need at least 16 KiB.
MIN_CLUSTER_BITS, MIN_EXTENDED_BITS, MAX_CLUSTER_BITS = 9, 14, 21

#: Cluster size of a sector twin: a subcluster is a sector.
SECTOR_CLUSTER_BITS = 14

#: The most bytes of a backing file's name that QEMU reads.
MAX_NAME = 1023

#: Refcounts of 16 bits, as QEMU makes them.
REFCOUNT_ORDER = 4

Read = Callable[[int, int], bytes]
"""``read(offset, count)`` gives up to ``count`` bytes of the file."""


class Field(NamedTuple):
    """One field of the header: its attribute and its ``struct`` code."""

    name: str
    code: str


FIELDS = (
    Field("magic", "4s"),
    Field("version", "I"),
    Field("backing_offset", "Q"),
    Field("backing_size", "I"),
    Field("cluster_bits", "I"),
    Field("size", "Q"),
    Field("encryption", "I"),
    Field("l1_entries", "I"),
    Field("l1_offset", "Q"),
    Field("refcount_offset", "Q"),
    Field("refcount_clusters", "I"),
    Field("snapshots", "I"),
    Field("snapshots_offset", "Q"),
    Field("incompatible", "Q"),
    Field("compatible", "Q"),
    Field("autoclear", "Q"),
    Field("refcount_order", "I"),
    Field("header_length", "I"),
    Field("compression", "B7x"),
)
_LAYOUT = struct.Struct(">" + "".join(field.code for field in FIELDS))
HEADER_LENGTH = _LAYOUT.size
#: Headers of version 3 may end before the field ``compression``, which then is 0.
_SHORT_LENGTH = HEADER_LENGTH - 8
_EXTENSION = struct.Struct(">II")

#: Where the incompatible features lie: one write of 8 bytes changes who may open the file.
FEATURES_OFFSET, COMPATIBLE_OFFSET = 72, 80


class Fixed(NamedTuple):
    """The fixed fields of a header, as in :data:`FIELDS`. Offsets and sizes are in bytes."""

    magic: bytes = MAGIC
    version: int = VERSION
    backing_offset: int = 0
    backing_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    encryption: int = 0
    l1_entries: int = 0
    l1_offset: int = 0
    refcount_offset: int = 0
    refcount_clusters: int = 0
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = DATA_FILE
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = REFCOUNT_ORDER
    header_length: int = HEADER_LENGTH
    compression: int = 0


class Kind(IntEnum):
    """How a twin describes clusters."""

    PLAIN = 1
    SECTOR = 2


class Mark(NamedTuple):
    """The private extension of a twin: which overlay it belongs to.

    ``lent_id`` is the random number in the overlay's header. Inode and birth time (nanoseconds)
    identify three files: a copy of one has others. ``kind``: how clusters are described.
    """

    kind: Kind
    lent_id: int
    cow_inode: int
    cow_birth: int
    image_inode: int
    image_birth: int
    twin_inode: int
    twin_birth: int

    @classmethod
    def unpack(cls, raw: bytes) -> Mark:
        """Read the extension. Raises :class:`Qcow2Error`."""
        if len(raw) != _MARK.size:
            raise Qcow2Error("the extension of addcow has another length")
        version, kind, *numbers = _MARK.unpack(raw)
        if version != _MARK_VERSION or kind not in list(Kind):
            raise Qcow2Error("the extension of addcow has a version that is not known here")
        return cls(Kind(kind), *numbers)

    def pack(self) -> bytes:
        """The bytes of the extension."""
        return _MARK.pack(_MARK_VERSION, *self)


_MARK = struct.Struct(">II7Q")
_MARK_VERSION = 1


class Header(NamedTuple):
    """All that the first cluster holds. Names are bytes, as they stand in the file."""

    fixed: Fixed
    mark: Mark | None = None
    backing: bytes | None = None
    backing_format: bytes | None = None
    data_file: bytes = b""
    has_bitmaps: bool = False
    feature_names: bytes = b""

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.fixed.cluster_bits

    @property
    def extended(self) -> bool:
        """Whether entries have a bit for each subcluster."""
        return bool(self.fixed.incompatible & EXTENDED_L2)

    @property
    def disabled(self) -> bool:
        """Whether QEMU refuses the file."""
        return bool(self.fixed.incompatible & DISABLED)

    @property
    def used_elsewhere(self) -> bool:
        """Whether a layer was lent for an overlay in another directory."""
        return bool(self.fixed.compatible & USED_ELSEWHERE)

    def used_only_in(self, directory: int) -> bool:
        """Whether the directory with this number is the only other one."""
        known = self.fixed.compatible & (USED_IN_SEVERAL | DIRECTORY_MASK)
        return known == directory & DIRECTORY_MASK

    def with_disabled(self, value: bool) -> Header:
        """The same header with that bit set or cleared."""
        kept = self.fixed.incompatible & ~DISABLED
        return self._replace(fixed=self.fixed._replace(incompatible=kept | (DISABLED * value)))

    def pack(self) -> bytes:
        """The bytes of the first cluster, up to the end of the backing file's name."""
        extensions = self._extensions()
        offset = HEADER_LENGTH + len(extensions)
        name = self.backing or b""
        if len(name) > MAX_NAME:
            raise Qcow2Error(f"the backing file's name is longer than {MAX_NAME} bytes")
        if offset + len(name) + FEATURE_NAMES_ROOM > self.cluster_size:
            raise Qcow2Error("the names are too long for one cluster")
        fixed = self.fixed._replace(
            backing_offset=offset if name else 0,
            backing_size=len(name),
            header_length=HEADER_LENGTH,
        )
        return _LAYOUT.pack(*fixed) + extensions + name

    def _extensions(self) -> bytes:
        """All extensions. Ours is the first, and lies in the first sector."""
        parts = [_packed(TWIN, self.mark.pack())] if self.mark is not None else []
        parts.append(_packed(FEATURE_NAMES, OWN_FEATURE_NAMES))
        if self.backing_format is not None:
            parts.append(_packed(BACKING_FORMAT, self.backing_format))
        return b"".join((*parts, _packed(DATA_FILE_NAME, self.data_file), _packed(END, b"")))

    def disabling(self) -> tuple[int, bytes]:
        """The offset and the bytes of the one write, within a sector, that disables the file.

        Where QEMU has replaced the table of feature names, the write also puts ours back, so that
        QEMU's refusal says what to do. The backing file's name stays where it is.
        """
        fixed = self.with_disabled(True).fixed
        sector = _LAYOUT.pack(*fixed._replace(header_length=HEADER_LENGTH)) + self._extensions()
        intact = self.feature_names == OWN_FEATURE_NAMES
        if intact or len(sector) > min(SECTOR, fixed.backing_offset or SECTOR):
            return FEATURES_OFFSET, struct.pack(">Q", fixed.incompatible)
        return 0, sector

    def marking_used_in(self, directory: int) -> tuple[int, bytes]:
        """The offset and the bytes of the one write that notes another directory."""
        bits = USED_IN_SEVERAL if self.used_elsewhere else directory & DIRECTORY_MASK
        marked = self.fixed.compatible | USED_ELSEWHERE | bits
        return COMPATIBLE_OFFSET, struct.pack(">Q", marked)

    def enabling(self) -> tuple[int, bytes]:
        """The offset and the bytes of the one write that enables the file."""
        return FEATURES_OFFSET, struct.pack(">Q", self.with_disabled(False).fixed.incompatible)


def _packed(kind: int, data: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(data)) + data.ljust(round_up(len(data), 8), b"\0")


def _feature_name(kind: int, bit: int, name: str) -> bytes:
    return bytes((kind, bit)) + name.encode("ascii").ljust(46, b"\0")


#: QEMU prints the name of a feature that it refuses: so the name says what to do.
OWN_FEATURE_NAMES = _feature_name(0, 63, "not QEMU's now; run 'addcow qemu import'")

#: QEMU replaces this table by its own when it writes a header, which takes so many bytes.
FEATURE_NAMES_ROOM = 384


def read_header(read: Read, length: int) -> Header:
    """Read and check the header of a qcow2 file of ``length`` bytes.

    ``read(offset, count)`` returns up to ``count`` bytes. Raises :class:`Qcow2Error`.
    """
    raw = read(0, min(length, HEADER_LENGTH)).ljust(HEADER_LENGTH, b"\0")
    fixed = Fixed(*_LAYOUT.unpack(raw))
    if fixed.header_length == _SHORT_LENGTH:
        fixed = fixed._replace(compression=0)
    for problem in _problems(fixed, length):
        raise Qcow2Error(problem)
    head = read(0, 1 << fixed.cluster_bits)
    return _with_extensions(fixed, head)


def damaged_mark(raw: bytes) -> Mark | None:
    """The mark in the first bytes of a twin whose header cannot be read; None when it has none."""
    with suppress(Qcow2Error, struct.error):
        fixed = Fixed(*_LAYOUT.unpack_from(raw))
        for kind, data in _extensions(fixed._replace(backing_offset=0), raw):
            if kind == TWIN:
                return Mark.unpack(data)
    return None


def named_backing(read: Read) -> str | None:
    """The backing file's name in any qcow2 file, as it stands there; None when it has none."""
    raw = read(0, HEADER_LENGTH).ljust(HEADER_LENGTH, b"\0")
    fixed = Fixed(*_LAYOUT.unpack(raw))
    if fixed.magic != MAGIC or not fixed.backing_offset or fixed.backing_size > MAX_NAME:
        return None
    return os.fsdecode(read(fixed.backing_offset, fixed.backing_size))


def _problems(fixed: Fixed, length: int) -> Iterator[str]:
    """What is wrong with the fixed fields, or not known here."""
    if fixed.magic != MAGIC or length < _SHORT_LENGTH:
        yield "it is not a qcow2 file"
    if fixed.version != VERSION:
        yield f"version {fixed.version} of qcow2 is not known here"
    if not MIN_CLUSTER_BITS <= fixed.cluster_bits <= MAX_CLUSTER_BITS:
        yield f"cluster_bits is {fixed.cluster_bits}"
    yield from _unknown_features(fixed)
    yield from _bad_places(fixed, length)


def _unknown_features(fixed: Fixed) -> Iterator[str]:
    if fixed.incompatible & CORRUPT:
        yield "QEMU has marked it as corrupt; 'qemu-img check' says why"
    if fixed.incompatible & ~_KNOWN:
        yield f"unknown incompatible features {fixed.incompatible & ~_KNOWN:#x}"
    if not fixed.incompatible & DATA_FILE:
        yield "it has no external data file"
    if fixed.autoclear & DATA_FILE_RAW:
        yield "its data file is marked as raw, which excludes a backing file"
    if fixed.encryption:
        yield "it is encrypted"
    if fixed.snapshots:
        yield f"it has {fixed.snapshots} internal snapshots; delete them with 'qemu-img snapshot'"
    if fixed.compression:
        yield f"compression type {fixed.compression} is not known here"
    if fixed.refcount_order != REFCOUNT_ORDER:
        yield f"refcounts of order {fixed.refcount_order} are not known here"


def _bad_places(fixed: Fixed, length: int) -> Iterator[str]:
    cluster = 1 << fixed.cluster_bits
    if fixed.header_length not in (_SHORT_LENGTH, HEADER_LENGTH):
        yield f"header_length is {fixed.header_length}"
    if fixed.l1_entries * 8 > MAX_L1_BYTES:
        yield f"an L1 table of {fixed.l1_entries} entries is too large"
    if fixed.l1_offset % cluster or fixed.l1_offset < cluster:
        yield f"the L1 table lies at {fixed.l1_offset}"
    if fixed.l1_offset + fixed.l1_entries * 8 > length:
        yield "the file ends inside its L1 table"
    extended = bool(fixed.incompatible & EXTENDED_L2)
    if extended and fixed.cluster_bits < MIN_EXTENDED_BITS:
        yield f"extended entries with clusters of {cluster} bytes"
    needed = -(-fixed.size // Tables(cluster, extended=extended).coverage)
    if fixed.l1_entries < needed:
        yield f"its L1 table has {fixed.l1_entries} entries, its size needs {needed}"
    if fixed.size % SECTOR:
        yield f"its size {fixed.size} is no whole number of sectors"


def _with_extensions(fixed: Fixed, head: bytes) -> Header:
    header = Header(fixed, backing=_backing_name(fixed, head))
    for kind, data in _extensions(fixed, head):
        if kind == BACKING_FORMAT:
            header = header._replace(backing_format=data)
        elif kind == DATA_FILE_NAME:
            header = header._replace(data_file=data)
        elif kind == TWIN:
            header = header._replace(mark=Mark.unpack(data))
        elif kind == BITMAP_DIRECTORY:
            header = header._replace(has_bitmaps=True)
        elif kind == FEATURE_NAMES:
            header = header._replace(feature_names=data)
        else:
            raise Qcow2Error(f"unknown header extension {kind:#x}")
    return header


def _backing_name(fixed: Fixed, head: bytes) -> bytes | None:
    if not fixed.backing_offset:
        return None
    stop = fixed.backing_offset + fixed.backing_size
    if not 0 < fixed.backing_size <= MAX_NAME or stop > len(head):
        raise Qcow2Error("the backing file's name does not lie in the first cluster")
    return head[fixed.backing_offset : stop]


def _extensions(fixed: Fixed, head: bytes) -> Iterator[tuple[int, bytes]]:
    place, end = fixed.header_length, fixed.backing_offset or len(head)
    while place + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(head, place)
        if kind == END:
            return
        place += _EXTENSION.size
        if length > end - place:
            raise Qcow2Error("a header extension does not lie in the first cluster")
        yield kind, head[place : place + length]
        place += round_up(length, 8)
