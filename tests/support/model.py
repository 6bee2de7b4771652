"""A plain second opinion on add-cow chains, for the tests to hold the package against.

A chain is described by a few words (`Raw`, `Overlay`), built as real files by packing the
header here, and its guest's view is a bytearray made by slice assignment.  The second half
reads files back: header, bits and view, parsed from the bytes on disk.  Nothing is shared
with the package, so a misunderstanding there does not repeat itself here.

Contents are pictures, one character for one cell of `grain` bytes: `-` is a hole, `0` are
written zeros, a letter is data.  Data carries its letter and its sector number, so a byte at
the wrong place is as visible as a wrong byte.  With `overlay("A-b0.", raw("XYZ"))` a picture
also says what is allocated: capitals, `0` and `.` (a allocated hole) are; `-` and small letters
(garbage, which no guest may see) are not.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

KiB = 1024
MiB = 1024 * KiB
SECTOR = 512

FIXED = struct.Struct("<4sIIIIIQQI16s16s")
ALL_ALLOCATED = 1
# Any time long past: a later write cannot fall into the same tick of the file's clock.
LONG_AGO = 1_000_000_000


# --- Contents -----------------------------------------------------------------------------


def sector_floor(length: int) -> int:
    """Return the virtual size of an overlay whose image file has `length` bytes."""
    return length - length % SECTOR


def sector_ceil(length: int) -> int:
    """Return the virtual size of a raw file of `length` bytes: all of them, then zeros."""
    return ceil_div(length, SECTOR) * SECTOR


def ceil_div(value: int, unit: int) -> int:
    """Return how many units it takes to hold `value`."""
    return -(-value // unit)


def paint(letter: str, start: int, length: int) -> bytes:
    """Return data that tells its letter and its place; `start` is a multiple of 512."""
    fill = letter.encode()
    sectors = range(start // SECTOR, ceil_div(start + length, SECTOR))
    stamped = b"".join(f"{letter}{number:07x}".encode().ljust(SECTOR, fill) for number in sectors)
    return stamped[:length]


def picture(data: bytes, grain: int = 4 * KiB) -> str:
    """Return the picture of `data`: `0` for zeros, the letter of whole data, `?` for the rest."""
    return "".join(_cell(data[at : at + grain], at) for at in range(0, len(data), grain))


def _cell(data: bytes, start: int) -> str:
    if data.count(0) == len(data):
        return "0"
    letter = chr(data[0])
    return letter if data == paint(letter, start, len(data)) else "?"


@dataclass(frozen=True)
class Content:
    """The bytes of one raw file: a picture, less `cut` bytes of its last cell."""

    cells: str
    grain: int = 4 * KiB
    cut: int = 0

    @property
    def length(self) -> int:
        return max(0, len(self.cells) * self.grain - self.cut)

    @cached_property
    def data(self) -> bytes:
        return b"".join(self._cell(index) for index in range(len(self.cells)))[: self.length]

    def _cell(self, index: int) -> bytes:
        cell = self.cells[index]
        return bytes(self.grain) if cell in "-0" else paint(cell, index * self.grain, self.grain)

    def write(self, path: str) -> None:
        """Write the file, leaving holes where the picture has them."""
        with open(path, "wb") as file:
            for index, cell in enumerate(self.cells):
                if cell != "-":
                    file.seek(index * self.grain)
                    file.write(self._cell(index))
            file.truncate(self.length)


# --- Chains -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """A raw file as the end of a chain."""

    content: Content

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return sector_ceil(self.content.length)


@dataclass(frozen=True)
class Overlay:
    """An add-cow file with its image file: `bits` are those of the bitmap, stale or not."""

    content: Content
    bits: frozenset[int] = frozenset()
    backing: Raw | Overlay | None = None
    cluster_size: int = 4 * KiB
    all_allocated: bool = False
    stray: bool = False  # set some bits past the last cluster
    image_first: bool = False  # the image's name before the backing's
    gap: int = 0  # unused bytes before each name
    unknown: int = 0  # more compatible feature bits

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return sector_floor(self.content.length)

    @property
    def clusters(self) -> int:
        """The number of clusters, a partial last one counted."""
        return ceil_div(self.size, self.cluster_size)

    @property
    def local(self) -> frozenset[int]:
        """The clusters that a guest reads from the image file."""
        return frozenset(range(self.clusters)) if self.all_allocated else self.bits


Layer = Raw | Overlay


def raw(cells: str, grain: int = 4 * KiB, cut: int = 0) -> Raw:
    """Return a raw file from its picture."""
    return Raw(Content(cells, grain, cut))


def overlay(
    cells: str,
    backing: Layer | None = None,
    *,
    cluster_size: int = 4 * KiB,
    cut: int = 0,
    all_allocated: bool = False,
) -> Overlay:
    """Return an overlay from a picture of its clusters, which also says what is allocated."""
    local = frozenset(index for index, cell in enumerate(cells) if cell in "0." or cell.isupper())
    content = Content(cells.replace(".", "-"), cluster_size, cut)
    return Overlay(content, local, backing, cluster_size, all_allocated)


def view(layer: Layer) -> bytearray:
    """Return what a guest reads from the whole of `layer`."""
    if isinstance(layer, Raw) or layer.all_allocated:
        return bytearray(layer.content.data[: layer.size].ljust(layer.size, b"\0"))
    seen = bytearray(layer.size)
    if layer.backing is not None:
        below = view(layer.backing)[: layer.size]
        seen[: len(below)] = below
    for cluster in layer.bits:
        start, stop = span(cluster, layer.cluster_size, layer.size)
        seen[start:stop] = layer.content.data[start:stop]
    return seen


def owners(layer: Layer) -> list[int | None]:
    """Return for each sector the depth of the layer that holds it; None is no layer at all."""
    if isinstance(layer, Raw):
        return [0] * (layer.size // SECTOR)
    below = owners(layer.backing) if layer.backing else []
    held = [None if depth is None else depth + 1 for depth in below]
    held = (held + [None] * (layer.size // SECTOR))[: layer.size // SECTOR]
    for cluster in layer.local:
        start, stop = span(cluster, layer.cluster_size, layer.size)
        held[start // SECTOR : stop // SECTOR] = [0] * ((stop - start) // SECTOR)
    return held


def span(cluster: int, cluster_size: int, size: int) -> tuple[int, int]:
    """Return the bytes of `cluster`, ended by the virtual size."""
    return cluster * cluster_size, min((cluster + 1) * cluster_size, size)


def touched(start: int, stop: int, cluster_size: int) -> set[int]:
    """Return the clusters with a byte in [start, stop)."""
    return (
        set(range(start // cluster_size, ceil_div(stop, cluster_size))) if stop > start else set()
    )


# --- Files from a description -------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Where a layer was built: `path` is opened by name, `image` holds the bytes.

    `link`: a link that leads to `path`, by which commands name it.
    """

    path: str
    image: str
    backing: Files | None = None
    link: str = ""

    @property
    def own(self) -> list[str]:
        """The files of this layer alone."""
        return [self.path] if self.path == self.image else [self.path, self.image]

    @property
    def below(self) -> list[str]:
        """The files of every layer beneath this one."""
        return self.backing.everything if self.backing else []

    @property
    def everything(self) -> list[str]:
        """The files of the whole chain."""
        return self.own + self.below


def build(layer: Layer, directory: str, name: str = "top") -> Files:
    """Write `layer` and all beneath it as files in `directory`."""
    image = os.path.join(directory, f"{name}.raw")
    layer.content.write(image)
    os.utime(image, (LONG_AGO, LONG_AGO))
    if isinstance(layer, Raw):
        return Files(image, image)
    backing = build(layer.backing, directory, f"{name}-base") if layer.backing else None
    path = os.path.join(directory, f"{name}.add-cow")
    with open(path, "wb") as file:
        file.write(_header(layer, image, backing))
        file.write(_bitmap(layer))
    os.utime(path, (LONG_AGO, LONG_AGO))
    return Files(path, image, backing)


def _header(layer: Overlay, image: str, backing: Files | None) -> bytes:
    backing_format = (
        "" if backing is None else "raw" if backing.path == backing.image else "add-cow"
    )
    return pack_header(
        os.path.basename(image),
        os.path.basename(backing.path) if backing else "",
        backing_format,
        cluster_size=layer.cluster_size,
        compatible=layer.all_allocated * ALL_ALLOCATED | layer.unknown,
        image_first=layer.image_first,
        gap=layer.gap,
    )


def pack_header(
    image: str,
    backing: str = "",
    backing_format: str = "",
    *,
    cluster_size: int = 64 * KiB,
    compatible: int = 0,
    image_first: bool = False,
    gap: int = 0,
) -> bytes:
    """Return a whole header; the names lie in the order and with the gaps asked for."""
    body = bytearray()
    places: dict[str, tuple[int, int]] = {"": (0, 0)}
    for name in (image, backing) if image_first else (backing, image):
        if name:
            places[name] = (FIXED.size + len(body) + gap, len(os.fsencode(name)))
            body += bytes(gap) + os.fsencode(name)
    header_size = max(4 * KiB, cluster_size)
    fixed = FIXED.pack(
        b"ACOW",
        *places[backing],
        *places[image],
        cluster_size.bit_length() - 1,
        0,
        compatible,
        header_size,
        backing_format.encode(),
        b"raw",
    )
    return (fixed + bytes(body)).ljust(header_size, b"\0")


def _bitmap(layer: Overlay) -> bytes:
    bitmap = bytearray(bitmap_length(layer.size, layer.cluster_size))
    # Eleven: the rest of the last byte and something in a byte of its own.
    stray = range(layer.clusters, layer.clusters + 11) if layer.stray and bitmap else ()
    for bit in {*layer.bits, *stray}:
        bitmap[bit // 8] |= 1 << bit % 8
    return bytes(bitmap)


def bitmap_length(size: int, cluster_size: int) -> int:
    """Return the bytes of the bitmap for a virtual size: whole clusters."""
    bits = ceil_div(size, cluster_size)
    return ceil_div(ceil_div(bits, 8), cluster_size) * cluster_size


# --- Files read back ----------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """The fields of a header as they stand in the file, names resolved to paths."""

    image: str
    backing: str
    backing_format: str
    cluster_size: int
    compatible: int
    header_size: int

    @property
    def all_allocated(self) -> bool:
        return bool(self.compatible & ALL_ALLOCATED)


def read_header(path: str) -> Header:
    """Parse the header of an add-cow file."""
    with open(path, "rb") as file:
        start = file.read(2 * MiB)  # no header is longer
    fields = FIXED.unpack(start[: FIXED.size])
    if fields[0] != b"ACOW":
        raise ValueError(f"{path}: no add-cow file")
    backing_at, backing_size, image_at, image_size, bits = fields[1:6]
    return Header(
        image=_resolve(path, start[image_at : image_at + image_size]),
        backing=_resolve(path, start[backing_at : backing_at + backing_size]),
        backing_format=fields[9].rstrip(b"\0").decode(),
        cluster_size=1 << bits,
        compatible=fields[7],
        header_size=fields[8],
    )


def _resolve(path: str, name: bytes) -> str:
    return os.path.join(os.path.dirname(os.path.realpath(path)), os.fsdecode(name)) if name else ""


def read_file(path: str) -> bytes:
    """Return the bytes of a whole file."""
    with open(path, "rb") as file:
        return file.read()


def file_picture(path: str, grain: int) -> str:
    """Return the picture of a whole file, read cell by cell: any size, little memory."""
    with open(path, "rb") as file:
        return "".join(_cell(file.read(grain), at) for at in range(0, os.path.getsize(path), grain))


def all_bits(path: str) -> frozenset[int]:
    """Return every bit that is set in the bitmap's bytes, also past the last cluster."""
    bitmap = read_file(path)[read_header(path).header_size :]
    numbered = ((at, byte) for at, byte in enumerate(bitmap) if byte)
    return frozenset(at * 8 + bit for at, byte in numbered for bit in range(8) if byte >> bit & 1)


def read_bits(path: str) -> frozenset[int]:
    """Return the clusters whose bit is set in the file."""
    clusters = cluster_count(path)
    return frozenset(bit for bit in all_bits(path) if bit < clusters)


def stray_bits(path: str) -> frozenset[int]:
    """Return the bits set past the last cluster."""
    return all_bits(path) - read_bits(path)


def cluster_count(path: str) -> int:
    """Return the number of clusters of the add-cow file, from the length of its image."""
    header = read_header(path)
    return ceil_div(sector_floor(os.path.getsize(header.image)), header.cluster_size)


def read_view(path: str, file_format: str = "add-cow") -> bytes:
    """Return what a guest reads, parsed from the files as they lie on disk."""
    if file_format == "raw":
        data = read_file(path)
        return data.ljust(sector_ceil(len(data)), b"\0")
    header = read_header(path)
    image = read_file(header.image)
    image = image[: sector_floor(len(image))]
    if header.all_allocated:
        return image
    below = read_view(header.backing, header.backing_format) if header.backing else b""
    seen = bytearray(below[: len(image)].ljust(len(image), b"\0"))
    for cluster in read_bits(path):
        start, stop = span(cluster, header.cluster_size, len(image))
        seen[start:stop] = image[start:stop]
    return bytes(seen)


def contents(paths: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of each file."""
    return {path: read_file(path) for path in paths}


def snapshot(paths: Iterable[str]) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the time of change of each file: equal means never written."""
    return {path: (read_file(path), os.stat(path).st_mtime_ns) for path in paths}


def disk_usage(*paths: str) -> int:
    """Return the bytes that the files take on disk together."""
    return sum(os.stat(path).st_blocks * SECTOR for path in paths)
