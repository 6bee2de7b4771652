"""The manifest file, as docs/manifest.md defines it: a head, a record for each group, and a digest.

A leaf of zeros has no digest in the file, and a group of zeros has no record. Nothing is read from
an image here, and nothing depends on clusters.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from bitarray import bitarray
from blake3 import blake3

from addcow_mp.errors import FileError, ManifestError
from addcow_mp.format.geometry import raw_size, virtual_size
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.format.leaves import (
    DIGEST,
    FAN,
    GROUP,
    LEAF,
    ZERO_BLOCK,
    ZERO_LEAF,
    Group,
    covered_by,
    digest,
    leaves_of,
    no_leaves,
    places,
    replaced,
)
from addcow_mp.units import KiB

#: Differs from an overlay's magic in the first four bytes.
MAGIC, VERSION = b"ADDCOWMF", 1

#: A file that begins with this is not finished.
DRAFT_MAGIC = b"ADDCOWMP"

#: Bytes of the head: its text is short, whatever the image.
HEAD = 4 * KiB

#: Manifests up to this length are read at once: they describe up to half a GiB of data.
SMALL = 256 * KiB

_HEAD = struct.Struct("<8sII")
_RECORD = struct.Struct("<Q32s32s32s32s")


# Records


def pack_group(number: int, group: Group) -> bytes:
    """The record of a group, empty when there is nothing to record."""
    held, seen = _nonzero(group.held), _nonzero(group.seen) & group.mixed
    maps = (group.covered, group.mixed, held, seen)
    if not any(one.any() for one in maps):
        return b""
    packed = _RECORD.pack(number, *(one.tobytes() for one in maps))
    return packed + _chosen(group.held, held) + _chosen(group.seen, seen)


def _nonzero(block: bytes) -> bitarray:
    if block == ZERO_BLOCK:
        return no_leaves()
    each = (block[at : at + DIGEST] != ZERO_LEAF for at in range(0, len(block), DIGEST))
    return bitarray(each, endian="little")


def _chosen(block: bytes, bits: bitarray) -> bytes:
    return b"".join(block[start:stop] for start, stop in places(bits))


def _spread(digests: bytes, bits: bitarray) -> bytes:
    """A whole block: ``digests`` where ``bits`` are 1, leaves of zeros elsewhere."""
    block, at = bytearray(ZERO_BLOCK), 0
    for start, stop in places(bits):
        block[start:stop] = digests[at : at + stop - start]
        at += stop - start
    return bytes(block)


# The head


class FileState(NamedTuple):
    """What tells that a file is the same and unchanged: bytes, inode, nanoseconds."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """The state of a file with this ``status``."""
        return cls(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


_STATE_KEYS = ("size", "inode", "mtime-ns", "ctime-ns")


def is_rounded_down(size: int, length: int) -> bool:
    """Whether ``size`` is the length of a raw file without its last, partial sector.

    Earlier versions used that as its virtual size in manifests.
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
        files = {
            name: dict(zip(_STATE_KEYS, state, strict=True)) for name, state in self.files.items()
        }
        overlay = {
            "header-size": self.header_size,
            "header-digest": self.header_digest,
            "bitmap-digest": self.bitmap_digest,
        }
        backing = {"guest-digest": self.backing_digest, "virtual-size": self.backing_size}
        head = {
            "kind": self.kind,
            "virtual-size": self.virtual_size,
            "all-local": self.all_local,
            "guest-digest": self.guest_digest,
            "groups": self.groups,
            "files": files,
            **({} if self.header_digest is None else overlay),
            **({} if self.backing_digest is None else {"backing": backing}),
        }
        text = json.dumps(head).encode()
        return (_HEAD.pack(MAGIC, VERSION, len(text)) + text).ljust(HEAD, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> Head:
        """Read what :meth:`pack` wrote. Raises :class:`ValueError` for anything else."""
        try:
            magic, version, length = _HEAD.unpack_from(raw)
            if magic != MAGIC or version != VERSION or length > HEAD - _HEAD.size:
                raise ValueError
            return cls._of(json.loads(raw[_HEAD.size : _HEAD.size + length]))
        except (AttributeError, KeyError, TypeError, RecursionError, struct.error) as error:
            raise ValueError from error

    @classmethod
    def _of(cls, head: dict[str, Any]) -> Head:
        is_overlay, backing = "header-digest" in head, head.get("backing")
        if head["kind"] not in (RAW, ADD_COW):
            raise ValueError
        return cls(
            kind=head["kind"],
            virtual_size=_number(head["virtual-size"]),
            all_local=head["all-local"] is True,
            files={
                name: FileState(*(_number(state[key]) for key in _STATE_KEYS))
                for name, state in head["files"].items()
            },
            header_size=_number(head["header-size"]) if is_overlay else None,
            header_digest=_hex(head["header-digest"]) if is_overlay else None,
            bitmap_digest=_hex(head["bitmap-digest"]) if is_overlay else None,
            backing_digest=_hex(backing["guest-digest"]) if backing else None,
            backing_size=_number(backing["virtual-size"]) if backing else None,
            guest_digest=_hex(head["guest-digest"]),
            groups=_number(head["groups"]),
        )


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError
    return value


def _hex(value: object) -> str:
    if not isinstance(value, str) or len(bytes.fromhex(value)) != DIGEST:
        raise ValueError
    return value


def read_head(path: str) -> Head:
    """The head of a manifest; nothing else of the file is read.

    Raises :class:`ManifestError` for a file without a valid head, :class:`OSError`.
    """
    with _opened(path) as (fd, _):
        try:
            return Head.unpack(os.pread(fd, HEAD, 0))
        except ValueError as error:
            raise _not_whole(path) from error


def weight_of(path: str, head: Head) -> int:
    """About how many bytes of its layer a manifest has digests of. Raises :class:`OSError`."""
    return weight_of_length(os.stat(path).st_size - head.groups * _RECORD.size)


def weight_of_length(length: int) -> int:
    """The most bytes that a manifest of ``length`` bytes can have digests of."""
    return max(0, length - HEAD - DIGEST) // DIGEST * LEAF


# The file


class FileBytes:
    """The first ``length`` bytes of a file, read when they are used.

    They are not mapped: a bad sector is an error here, and a SIGBUS under a mapping.
    """

    def __init__(self, fd: int, length: int, path: str) -> None:
        self._fd = os.dup(fd)
        self._length = length
        self._path = path

    def __del__(self) -> None:
        os.close(self._fd)

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing.reduction import DupFd

        return (_received, (DupFd(self._fd), self._length, self._path))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._length)
        length = max(0, stop - start)
        try:
            found = os.pread(self._fd, length, start)
        except OSError as error:
            raise FileError.of(self._path, "read it", error) from error
        if len(found) < length:
            reason = "the file ends early; was it cut short meanwhile?"
            raise FileError(path=self._path, action="read it", reason=reason)
        return found


def _received(duplicate: Any, length: int, path: str) -> FileBytes:
    fd = duplicate.detach()
    try:
        return FileBytes(fd, length, path)
    finally:
        os.close(fd)


class Manifest:
    """A manifest with this ``content``, whose records end at ``end``; :meth:`load` opens one.

    It can be used when its file is removed, and pickled for a process that is being started.
    """

    def __init__(self, path: str, content: bytes | FileBytes, head: Head, end: int) -> None:
        self.path = path
        self.head = head
        self._content = content
        self._end = end
        #: Where each record begins, by the number of its group, in order.
        self.records = dict(self._records(end))

    def __reduce__(self) -> tuple[object, ...]:
        return (Manifest, (self.path, self._content, self.head, self._end))

    def groups(self, first: int, stop: int) -> list[int]:
        """The groups in ``[first, stop)`` that have a record, in order."""
        numbers = self._numbers
        return numbers[bisect_left(numbers, first) : bisect_left(numbers, stop)]

    @cached_property
    def _numbers(self) -> list[int]:
        return list(self.records)

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
            raise ManifestError(path=path, problem="its content is invalid") from error
        if len(manifest.records) != manifest.head.groups:
            raise ManifestError(path=path, problem="it lacks records that its head counts")
        return manifest

    def _records(self, end: int) -> Iterator[tuple[int, int]]:
        """Number and place of each record. Raises :class:`ValueError` for impossible records."""
        place, least, groups = HEAD, 0, -(-self.head.virtual_size // GROUP)
        while place < end:
            number, *maps = self._record(place)
            covered, mixed, held, seen = (int.from_bytes(bits, "little") for bits in maps)
            if not least <= number < groups or mixed & ~covered or seen & ~mixed:
                raise ValueError
            yield number, place
            place += _RECORD.size + DIGEST * (held.bit_count() + seen.bit_count())
            least = number + 1
        if place != end:
            raise ValueError

    def _record(self, place: int) -> tuple[Any, ...]:
        return _RECORD.unpack(self._content[place : place + _RECORD.size])

    def group(self, number: int) -> Group:
        """What the manifest says of a group."""
        place = self.records.get(number)
        group = Group() if place is None else self._group_at(place)
        if self.head.all_local:
            group.covered = covered_by(self.head.virtual_size, number)
        return group

    def _group_at(self, place: int) -> Group:
        maps = (bitarray(bytes(one), endian="little") for one in self._record(place)[1:])
        covered, mixed, held, seen = maps
        first = place + _RECORD.size
        middle = DIGEST * held.count()
        digests = self._content[first : first + middle + DIGEST * seen.count()]
        return Group(
            covered, mixed, _spread(digests[:middle], held), _spread(digests[middle:], seen)
        )


def _content(path: str) -> tuple[bytes | FileBytes, bytes]:
    """The content of the file, and the digest of all but its last bytes."""
    with _opened(path) as (fd, size):
        if size < HEAD + DIGEST or os.pread(fd, len(MAGIC), 0) != MAGIC:
            raise _not_whole(path)
        if size > SMALL:
            return FileBytes(fd, size, path), digest_of_file(fd, size - DIGEST)
        content = os.pread(fd, size, 0)
        return content, digest(content[:-DIGEST])


def digest_of_file(fd: int, length: int) -> bytes:
    """The digest of the first ``length`` bytes of a file, or of the whole file if it is shorter."""
    hasher = blake3()
    for start in range(0, length, SMALL):
        hasher.update(os.pread(fd, min(SMALL, length - start), start))
    return hasher.digest()


@contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """The descriptor and the length of a regular file; a FIFO is refused without waiting."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ManifestError(path=path, problem="it is no regular file")
        yield fd, status.st_size
    finally:
        os.close(fd)


def _not_whole(path: str) -> ManifestError:
    return ManifestError(path=path, problem="it is not a whole manifest")


def guest_nodes(chain: list[Manifest], size: int) -> Iterator[tuple[int, bytes]]:
    """The nodes over the groups of a view of ``size`` bytes over ``chain``, from the top down.

    Groups of zeros are left out.
    """
    groups = -(-leaves_of(size) // FAN)
    numbers = sorted({number for one in chain for number in one.records if number < groups})
    for number in numbers:
        block = guest_block(chain, number)
        if block != ZERO_BLOCK:
            yield number, digest(block)


def guest_block(chain: list[Manifest], number: int) -> bytes:
    """The digests of the leaves of a group in the view over ``chain``, from the top down."""
    block = ZERO_BLOCK
    for manifest in reversed(chain):
        within = covered_by(manifest.head.virtual_size, number)
        block = replaced(ZERO_BLOCK, manifest.group(number).guest_block(block), within)
    return block


def differing_leaves(one: list[Manifest], other: list[Manifest]) -> Iterator[int]:
    """The leaves that differ between the views over two chains, in order; an empty one is zeros."""
    for number in sorted({number for manifest in (*one, *other) for number in manifest.records}):
        here, there = guest_block(one, number), guest_block(other, number)
        if here != there:
            for leaf in range(FAN):
                at = slice(leaf * DIGEST, (leaf + 1) * DIGEST)
                if here[at] != there[at]:
                    yield number * FAN + leaf
