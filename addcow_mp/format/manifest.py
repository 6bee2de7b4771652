"""Manifests: digests of what a layer holds, leaf by leaf, and of what its guest sees.

The format is told to the byte in docs/manifest.md. Here are its words: leaves of 64 KiB of the
guest's offsets, groups of 256 leaves, the tree over them, and the file. Nothing is read from an
image, and nothing is known of clusters: a :class:`Group` says of its leaves which are covered,
which are mixed, and what their digests are, as arrays of bits and of 32 bytes.

Zeros cost nothing: a leaf of zeros has no digest in a file, a group of zeros no record, and every
level of the tree one constant.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from bitarray import bitarray
from blake3 import blake3

from addcow_mp.errors import FileError, ManifestError
from addcow_mp.format.bits import runs
from addcow_mp.format.geometry import raw_size, virtual_size
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.units import KiB

#: Not that of an overlay: those are known by their first four bytes.
MAGIC, VERSION = b"ADDCOWMF", 1

#: What begins with this is not finished.
DRAFT_MAGIC = b"ADDCOWMP"

#: Bytes of the guest's offsets in one leaf: fixed by the format, so that digests of images with
#: different clusters are the same.
LEAF = 64 * KiB

#: Leaves in a group, which is a node's children and a record in the file.
FAN = 256
GROUP = FAN * LEAF

DIGEST = 32

_CONTEXT = b"add-cow guest 1\0"
#: The head's place in the file: what it says is short, whatever the image.
HEAD = 4 * KiB

#: Manifests up to this length are read at once, longer ones mapped: half a GiB of data takes it.
SMALL = 256 * KiB

_HEAD = struct.Struct("<8sII")
_RECORD = struct.Struct("<Q32s32s32s32s")


def digest(data: Any) -> bytes:
    """The BLAKE3 of some bytes."""
    return blake3(data).digest()


#: The digest of a leaf of zeros.
ZERO_LEAF = digest(bytes(LEAF))


@cache
def zero_node(level: int) -> bytes:
    """The node of ``level`` over nothing but zeros; leaves are level 0."""
    return digest(zero_node(level - 1) * FAN) if level else ZERO_LEAF


ZERO_BLOCK = ZERO_LEAF * FAN


def leaves_of(size: int) -> int:
    """How many leaves a guest's view of ``size`` bytes has."""
    return -(-size // LEAF)


def guest_digest(size: int, blocks: Iterable[tuple[int, bytes]]) -> str:
    """The digest of a view of ``size`` bytes, in hexadecimal.

    ``blocks``: for each group that is not all zeros its number and the 256 digests of its leaves,
    one after the other.
    """
    return view_digest(size, {number: digest(block) for number, block in blocks})


def view_digest(size: int, nodes: dict[int, bytes]) -> str:
    """The digest of a view of ``size`` bytes from the ``nodes`` over its groups, by number.

    A group that has none is all zeros.
    """
    width, level = -(-leaves_of(size) // FAN), 1
    while width > 1:
        nodes = dict(_parents(nodes, level))
        width, level = -(-width // FAN), level + 1
    top = nodes.get(0, zero_node(level))
    return digest(_CONTEXT + struct.pack("<Q", size) + top).hex()


def _parents(nodes: dict[int, bytes], level: int) -> Iterator[tuple[int, bytes]]:
    families: dict[int, bytearray] = {}
    for number, node in nodes.items():
        parent, place = divmod(number, FAN)
        family = families.setdefault(parent, bytearray(zero_node(level) * FAN))
        family[place * DIGEST : (place + 1) * DIGEST] = node
    return ((parent, digest(family)) for parent, family in families.items())


def _no_leaves() -> bitarray:
    return bitarray(FAN, endian="little")


@dataclass
class Group:
    """What a layer says of 256 leaves; ``held`` and ``seen`` are 256 digests each."""

    covered: bitarray = field(default_factory=_no_leaves)
    mixed: bitarray = field(default_factory=_no_leaves)
    held: bytes = ZERO_BLOCK
    seen: bytes = ZERO_BLOCK

    def pack(self, number: int) -> bytes:
        """The record in the file, empty when there is nothing to record."""
        stored = [_nonzero(self.held), _nonzero(self.seen) & self.mixed]
        maps = [self.covered, self.mixed, *stored]
        if not any(one.any() for one in maps):
            return b""
        packed = _RECORD.pack(number, *(one.tobytes() for one in maps))
        return packed + _chosen(self.held, stored[0]) + _chosen(self.seen, stored[1])

    def guest_block(self, below: bytes) -> bytes:
        """The 256 digests of what the guest sees, ``below`` being those of the backing file."""
        block = _replaced(below, self.held, self.covered & ~self.mixed)
        return _replaced(block, self.seen, self.mixed)


def _places(bits: bitarray) -> Iterator[tuple[int, int]]:
    """The runs of ones, as bytes of a block of digests."""
    return ((first * DIGEST, stop * DIGEST) for first, stop in runs(bits, 1, 0, FAN))


def _nonzero(block: bytes) -> bitarray:
    if block == ZERO_BLOCK:
        return _no_leaves()
    each = (block[at : at + DIGEST] != ZERO_LEAF for at in range(0, len(block), DIGEST))
    return bitarray(each, endian="little")


def _chosen(block: bytes, bits: bitarray) -> bytes:
    return b"".join(block[start:stop] for start, stop in _places(bits))


def _replaced(block: bytes, other: bytes, bits: bitarray) -> bytes:
    """``block`` with the digests of ``other`` where ``bits`` are 1."""
    if not bits.any():
        return block
    mended = bytearray(block)
    for start, stop in _places(bits):
        mended[start:stop] = other[start:stop]
    return bytes(mended)


def _spread(digests: bytes, bits: bitarray) -> bytes:
    """A whole block: ``digests`` where ``bits`` are 1, leaves of zeros elsewhere."""
    block, at = bytearray(ZERO_BLOCK), 0
    for start, stop in _places(bits):
        block[start:stop] = digests[at : at + stop - start]
        at += stop - start
    return bytes(block)


# The file


class FileState(NamedTuple):
    """By what a file is known to be the same and unchanged: bytes, inode, nanoseconds."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """That of a file of this ``status``."""
        return cls(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


_STATE_KEYS = ("size", "inode", "mtime-ns", "ctime-ns")


def is_rounded_down(size: int, length: int) -> bool:
    """Whether ``size`` is that of a raw file of ``length`` bytes without its last, partial sector.

    Earlier versions took that for its virtual size, and made manifests of it.
    """
    return size == virtual_size(length) != raw_size(length)


@dataclass(frozen=True)
class Head:
    """What a manifest says of its layer as a whole. Digests are hexadecimal; None = has none."""

    kind: str
    virtual_size: int
    all_local: bool
    files: dict[str, FileState]
    header_size: int | None = None
    header_digest: str | None = None
    bitmap_digest: str | None = None
    backing_digest: str | None = None
    backing_size: int | None = None
    guest_digest: str = ""
    groups: int = 0

    def pack(self) -> bytes:
        """The first 4096 bytes of the file."""
        told: dict[str, object] = {
            "kind": self.kind,
            "virtual-size": self.virtual_size,
            "all-local": self.all_local,
            "guest-digest": self.guest_digest,
            "groups": self.groups,
            "files": {
                name: dict(zip(_STATE_KEYS, state, strict=True))
                for name, state in self.files.items()
            },
        }
        if self.header_digest is not None:
            told |= {
                "header-size": self.header_size,
                "header-digest": self.header_digest,
                "bitmap-digest": self.bitmap_digest,
            }
        if self.backing_digest is not None:
            below = {"guest-digest": self.backing_digest, "virtual-size": self.backing_size}
            told["backing"] = below
        text = json.dumps(told).encode()
        return (_HEAD.pack(MAGIC, VERSION, len(text)) + text).ljust(HEAD, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> Head:
        """Read what :meth:`pack` wrote. Raises :class:`ValueError` for anything else."""
        magic, version, length = _HEAD.unpack_from(raw)
        if magic != MAGIC or version != VERSION or length > HEAD - _HEAD.size:
            raise ValueError
        try:
            return cls._of(json.loads(raw[_HEAD.size : _HEAD.size + length]))
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError from error

    @classmethod
    def _of(cls, told: dict[str, Any]) -> Head:
        is_overlay, below = "header-digest" in told, told.get("backing")
        return cls(
            kind=_kind(told["kind"]),
            virtual_size=_number(told["virtual-size"]),
            all_local=told["all-local"] is True,
            files={
                name: FileState(*(_number(state[key]) for key in _STATE_KEYS))
                for name, state in told["files"].items()
            },
            header_size=_number(told["header-size"]) if is_overlay else None,
            header_digest=_hex(told["header-digest"]) if is_overlay else None,
            bitmap_digest=_hex(told["bitmap-digest"]) if is_overlay else None,
            backing_digest=_hex(below["guest-digest"]) if below else None,
            backing_size=_number(below["virtual-size"]) if below else None,
            guest_digest=_hex(told["guest-digest"]),
            groups=_number(told["groups"]),
        )


def _kind(value: object) -> str:
    """The format of a layer. Raises :class:`ValueError` for one that has no manifests."""
    if value not in (RAW, ADD_COW):
        raise ValueError
    return str(value)


def _number(value: object) -> int:
    """A number of a head. Raises :class:`ValueError` for anything else."""
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError
    return value


def _hex(value: object) -> str:
    """A digest of a head. Raises :class:`ValueError` for anything else."""
    if not isinstance(value, str) or len(bytes.fromhex(value)) != DIGEST:
        raise ValueError
    return value


def read_head(path: str) -> Head:
    """The head of a manifest, of which nothing else is looked at.

    Raises :class:`ManifestError` for a file that begins otherwise, :class:`OSError`.
    """
    fd, _ = _opened(path)
    try:
        raw = os.pread(fd, HEAD, 0)
    finally:
        os.close(fd)
    try:
        return Head.unpack(raw)
    except (ValueError, struct.error) as error:
        raise ManifestError(path=path, problem="it is not a whole manifest") from error


def weight_of(path: str, head: Head) -> int:
    """About how many bytes of its layer a manifest has digests of, told by its length alone.

    Raises :class:`OSError`.
    """
    return weight_of_length(os.stat(path).st_size - head.groups * _RECORD.size)


def weight_of_length(length: int) -> int:
    """How many bytes a manifest of ``length`` bytes can have digests of at most."""
    return max(0, length - HEAD - DIGEST) // DIGEST * LEAF


class FileBytes:
    """The first ``length`` bytes of a file, read when they are asked for: nothing is mapped."""

    def __init__(self, fd: int, length: int, path: str) -> None:
        self._fd = os.dup(fd)
        self._length = length
        self._path = path

    def __del__(self) -> None:
        os.close(self._fd)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._length)
        try:
            return os.pread(self._fd, max(0, stop - start), start)
        except OSError as error:
            raise FileError.of(self._path, "read it", error) from error


Content = mmap.mmap | bytes | FileBytes
"""What stands in a manifest."""


class Manifest:
    """A manifest with this ``content``; :meth:`load` opens one that is finished."""

    def __init__(self, path: str, content: Content, head: Head, end: int) -> None:
        self.path = path
        self.head = head
        self._content = content
        #: Where each record begins, by the number of its group, in order.
        self.records = dict(_records(self._content, end, head))

    @classmethod
    def load(cls, path: str) -> Manifest:
        """Open a manifest. Raises :class:`ManifestError` for a file that is not a whole one.

        Raises :class:`OSError` when it cannot be read.
        """
        content, found = _content(path)
        end = len(content) - DIGEST
        if found != content[end:]:
            raise ManifestError(path=path, problem="its own digest says that it was changed")
        try:
            manifest = cls(path, content, Head.unpack(content[:HEAD]), end)
        except (ValueError, struct.error) as error:
            raise ManifestError(path=path, problem="what stands in it makes no sense") from error
        if len(manifest.records) != manifest.head.groups:
            raise ManifestError(path=path, problem="it has not the records that it says")
        return manifest

    def group(self, number: int) -> Group:
        """What is said of the leaves of a group."""
        place = self.records.get(number)
        group = Group() if place is None else _unpacked(self._content, place)
        if self.head.all_local:
            group.covered = covered_by(self.head.virtual_size, number)
        return group


def covered_by(size: int, number: int) -> bitarray:
    """The leaves of a group that a view of ``size`` bytes has."""
    bits = _no_leaves()
    bits[: max(0, min(FAN, leaves_of(size) - number * FAN))] = 1
    return bits


def _records(content: Content, end: int, head: Head) -> Iterator[tuple[int, int]]:
    """Number and place of each record, which lie before ``end``.

    Raises :class:`ValueError` for records that cannot be of a layer with this ``head``.
    """
    place, least, groups = HEAD, 0, -(-head.virtual_size // GROUP)
    while place < end:
        number, *maps = _RECORD.unpack(content[place : place + _RECORD.size])
        covered, mixed, held, seen = (int.from_bytes(bits, "little") for bits in maps)
        if not least <= number < groups or mixed & ~covered or seen & ~mixed:
            raise ValueError
        yield number, place
        place += _RECORD.size + DIGEST * (held.bit_count() + seen.bit_count())
        least = number + 1
    if place != end:
        raise ValueError


def _unpacked(content: Content, place: int) -> Group:
    """The group whose record begins at ``place``."""
    _, *maps = _RECORD.unpack(content[place : place + _RECORD.size])
    covered, mixed, held, seen = (bitarray(bytes(one), endian="little") for one in maps)
    first = place + _RECORD.size
    middle = first + DIGEST * held.count()
    held_block = _spread(content[first:middle], held)
    end = middle + DIGEST * seen.count()
    return Group(covered, mixed, held_block, _spread(content[middle:end], seen))


def _content(path: str) -> tuple[Content, bytes]:
    """What stands in the file, mapped if it is much, and the digest of all but its end.

    The digest is of what was read: a place that the disk does not give is an error there, and
    a SIGBUS under a mapping.
    """
    fd, size = _opened(path)
    try:
        if size < HEAD + DIGEST or os.pread(fd, len(MAGIC), 0) != MAGIC:
            raise ManifestError(path=path, problem="it is not a whole manifest")
        if size <= SMALL:
            content = os.pread(fd, size, 0)
            return content, digest(content[:-DIGEST])
        found = digest_of_file(fd, size - DIGEST)
        return content_of(fd, size, path), found
    finally:
        os.close(fd)


def content_of(fd: int, length: int, path: str) -> Content:
    """The first ``length`` bytes of a file; what cannot be mapped is read when it is asked for."""
    try:
        return mmap.mmap(fd, length, prot=mmap.PROT_READ)
    except OSError:
        return FileBytes(fd, length, path)


def digest_of_file(fd: int, length: int) -> bytes:
    """The digest of the first ``length`` bytes of a file, or of as many as it has."""
    hasher = blake3()
    for start in range(0, length, SMALL):
        hasher.update(os.pread(fd, min(SMALL, length - start), start))
    return hasher.digest()


def _opened(path: str) -> tuple[int, int]:
    """A descriptor of the file, and its length; what is none is refused without waiting for it."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise ManifestError(path=path, problem="it is no regular file")
    return fd, status.st_size


def guest_blocks(chain: list[Manifest], size: int) -> Iterator[tuple[int, bytes]]:
    """What a view of ``size`` bytes over ``chain``, from the top down, says of its leaves."""
    groups = -(-leaves_of(size) // FAN)
    numbers = sorted({number for one in chain for number in one.records if number < groups})
    for number in numbers:
        block = ZERO_BLOCK
        for manifest in reversed(chain):
            within = covered_by(manifest.head.virtual_size, number)
            block = _replaced(ZERO_BLOCK, manifest.group(number).guest_block(block), within)
        if block != ZERO_BLOCK:
            yield number, block
