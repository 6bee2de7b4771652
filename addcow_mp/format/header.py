"""The 76 fixed bytes at the start of an ``.add-cow`` file.

:meth:`Header.unpack` accepts any 76 bytes; :func:`violations` lists the rules of the format that
they break, each under the name that ``check`` reports. All integers are little-endian. Formats are
ASCII, terminated with NUL within 16 bytes and padded with zeros.

The header region is ``header_size`` bytes long: the fixed bytes, then the names at any place, zeros
everywhere else. The bitmap follows it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from addcow_mp.format.bits import between, merged
from addcow_mp.units import KiB

MAGIC = b"ACOW"
ALL_ALLOCATED = 1 << 0

#: Bits of ``features`` of an overlay that is lent to QEMU. The lower bits are a random id. Readers
#: that do not know these bits refuse the overlay.
LENT, LENT_FOR_READING = 1 << 63, 1 << 62
_ID_MASK = LENT_FOR_READING - 1

MIN_CLUSTER_BITS, DEFAULT_CLUSTER_BITS, MAX_CLUSTER_BITS = 12, 16, 21

#: The header region has at least one page, so that the bitmap can be mapped.
MIN_HEADER_SIZE = 4 * KiB

#: Sizes of the reference implementation's buffers, which also hold the terminating NUL.
BACKING_NAME_LIMIT, IMAGE_NAME_LIMIT = 1024, 4096

RAW, ADD_COW = "raw", "add-cow"

#: Formats that a header may name. Only the first two are opened natively.
KNOWN_FORMATS = (
    *(RAW, ADD_COW),
    *("bochs", "cloop", "cow", "dmg", "luks", "parallels", "qcow", "qcow2", "qed"),
    *("vdi", "vhdx", "vmdk", "vpc"),
)


#: The fields of :class:`Header`, in order: 4s and 16s are bytes, I 32 bits, Q 64 bits.
_LAYOUT = struct.Struct("<4sIIIIIQQI16s16s")
FIXED_SIZE = _LAYOUT.size


_FEATURES = slice(24, 32)


def without_reading_mark(region: bytearray | memoryview) -> None:
    """Clear the field ``features`` in a header region if it says *lent for reading*.

    So the region's digest stays the same while the overlay is lent for reading.
    """
    features = int.from_bytes(region[_FEATURES], "little")
    if features & LENT_FOR_READING and not features & LENT:
        region[_FEATURES] = bytes(8)


def header_size(cluster_size: int) -> int:
    """The only length of the header region that the reference implementation accepts."""
    return max(MIN_HEADER_SIZE, cluster_size)


class Header(NamedTuple):
    """The fixed header; offsets and sizes are in bytes."""

    magic: bytes = MAGIC
    backing_offset: int = 0  # of the backing file's name; 0 = no backing file
    backing_size: int = 0  # of that name
    image_offset: int = FIXED_SIZE  # of the image file's name
    image_size: int = 0  # of that name
    cluster_bits: int = DEFAULT_CLUSTER_BITS  # the cluster size is 2 to this power
    features: int = 0  # bits that a reader must know: lent, lent for reading, and an id
    compatible_features: int = 0  # bits that a reader may ignore; bit 0 = ALL_ALLOCATED
    header_size: int = 64 * KiB  # of the header region; the bitmap follows
    backing_format: bytes = b""
    image_format: bytes = RAW.encode()

    @classmethod
    def unpack(cls, raw: bytes) -> Header:
        """Read :data:`FIXED_SIZE` bytes, valid or not."""
        return cls(*_LAYOUT.unpack(raw))

    def pack(self) -> bytes:
        """The :data:`FIXED_SIZE` bytes of the file."""
        return _LAYOUT.pack(*self)

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def has_backing(self) -> bool:
        """Whether the header names a backing file."""
        return self.backing_offset != 0

    @property
    def all_allocated(self) -> bool:
        """Whether ALL_ALLOCATED is set: readers ignore the bitmap and the backing file."""
        return bool(self.compatible_features & ALL_ALLOCATED)

    @property
    def lent(self) -> bool:
        """Whether QEMU may write the overlay; its bitmap and image file may then be outdated."""
        return bool(self.features & LENT)

    @property
    def lent_for_reading(self) -> bool:
        """Whether QEMU may read the overlay as a backing file; it must not be changed."""
        return not self.lent and bool(self.features & LENT_FOR_READING)

    @property
    def lent_id(self) -> int | None:
        """The id of the lending, of up to 62 bits; None when the overlay is not lent."""
        return self.features & _ID_MASK if self.features & (LENT | LENT_FOR_READING) else None

    def with_lent(self, bit: int, lent_id: int) -> Header:
        """The same header, lent by ``bit`` with an id; 0 and 0 for one that is not lent."""
        return self._replace(features=bit | lent_id)

    def with_all_allocated(self, value: bool) -> Header:
        """This header with ALL_ALLOCATED set or cleared; other bits stay."""
        others = self.compatible_features & ~ALL_ALLOCATED
        return self._replace(compatible_features=others | (ALL_ALLOCATED * value))

    def with_backing(self, offset: int, size: int, format_: str) -> Header:
        """This header with another backing file, whose name lies at ``offset``."""
        return self._replace(
            backing_offset=offset, backing_size=size, backing_format=format_.encode()
        )

    def name_ranges(self) -> list[tuple[int, int]]:
        """The bytes ``[start, stop)`` of each name."""
        ranges = [(self.image_offset, self.image_offset + self.image_size)]
        if self.has_backing:
            ranges.append((self.backing_offset, self.backing_offset + self.backing_size))
        return sorted(ranges)

    def unused_ranges(self) -> list[tuple[int, int]]:
        """The bytes ``[start, stop)`` of the header region that hold no field and no name."""
        used = merged([(0, FIXED_SIZE), *self.name_ranges()])
        return list(between(used, 0, self.header_size))


def format_name(raw: bytes) -> str:
    """The format name in 16 bytes, up to the first NUL; bytes that are not ASCII are escaped."""
    return raw.split(b"\0", 1)[0].decode("ascii", "backslashreplace")


class Violation(NamedTuple):
    """A broken rule: the name of its check, and the problem."""

    rule: str
    problem: str


def violations(header: Header) -> Iterator[Violation]:
    """Every rule of the format that ``header`` breaks, in the order of the fields."""
    for rule, check in (("header", _numbers), ("names", _names), ("formats", _formats)):
        for problem in check(header):
            yield Violation(rule, problem)


def _numbers(header: Header) -> Iterator[str]:
    bits = header.cluster_bits
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        yield f"cluster_bits is {bits}, must be {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
    elif header.header_size != header_size(header.cluster_size):
        yield f"header_size is {header.header_size}, must be {header_size(header.cluster_size)}"
    if header.features and header.lent_id is None:
        yield f"unknown feature bits {header.features:#x} are set, the image needs a newer reader"


def _names(header: Header) -> Iterator[str]:
    if (header.backing_offset == 0) != (header.backing_size == 0):
        yield (
            f"backing name offset {header.backing_offset} and size {header.backing_size}: "
            "one is 0, the other is not"
        )
    elif header.has_backing:
        yield from _name("backing", header.backing_offset, header.backing_size, header)
    yield from _name("image", header.image_offset, header.image_size, header)


def _name(which: str, offset: int, size: int, header: Header) -> Iterator[str]:
    limit = {"backing": BACKING_NAME_LIMIT, "image": IMAGE_NAME_LIMIT}[which]
    if not 1 <= size < limit:
        yield f"{which} name size is {size}, must be 1 to {limit - 1}"
    elif offset < FIXED_SIZE:
        yield f"{which} name offset is {offset}, must be at least {FIXED_SIZE}"
    elif offset + size > header.header_size:
        yield f"{which} name ends at {offset + size}, behind header_size {header.header_size}"


def _formats(header: Header) -> Iterator[str]:
    if header.has_backing:
        yield from _format("backing", header.backing_format)
    elif header.backing_format.strip(b"\0"):
        yield "backing format is set without a backing file"
    yield from _format("image", header.image_format)


def _format(which: str, raw: bytes) -> Iterator[str]:
    name, terminator, padding = raw.partition(b"\0")
    if not name:
        yield f"{which} format is empty, and formats are never guessed"
    elif not terminator or padding.strip(b"\0"):
        yield f"{which} format is not NUL-terminated and zero-padded: {raw!r}"
    elif format_name(raw) not in KNOWN_FORMATS:
        yield f"{which} format '{format_name(raw)}' is unknown, and formats are never guessed"
