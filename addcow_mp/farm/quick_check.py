"""Quick check: prove that an overlay is clean with a few system calls, or ask for the full check.

Nearly all images are clean and laid out plainly: names at the beginning of the header, a small
bitmap, data where bits are set. For those the quick check asserts all that
:mod:`addcow_mp.jobs.check` asserts, and examines a file that many images share only once. Anything
unusual, sound or not, is left to the full check, which alone makes findings. So a quick check that
gives up costs time, never a finding.

Results are kept for the files above. No lock is taken: a guest that takes a lock during the quick
check could as well take it right after the check.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import lru_cache
from itertools import starmap
from typing import NamedTuple, TypeVar

from bitarray import bitarray

from addcow_mp.device.access import Access, pseudo_devices
from addcow_mp.device.discovery import Identity
from addcow_mp.device.files import identity_of
from addcow_mp.device.headers import MAX_DEPTH
from addcow_mp.device.holes import data_runs, next_data
from addcow_mp.device.locks import READING, is_available
from addcow_mp.device.magic import LONGEST_MAGIC, magic_of
from addcow_mp.format.bits import Run, runs
from addcow_mp.format.geometry import Geometry, virtual_size
from addcow_mp.format.header import ADD_COW, FIXED_SIZE, MAGIC, RAW, Header, format_name, violations
from addcow_mp.format.names import path_has_protocol
from addcow_mp.format.qcow2 import MAGIC as QCOW2_MAGIC
from addcow_mp.units import KiB

#: Bytes of a file that are read at once: they include the names of a plain header.
HEAD = 4 * KiB

#: Longer bitmaps are left to the full check, which maps them.
LONGEST_BITMAP = 256 * KiB

#: Bytes that are compared with zeros; more are left to the full check.
MOST_READ = 256 * KiB

_ZEROS = bytes(MOST_READ)

#: Results that are kept; then all are dropped, so that memory stays bounded.
REMEMBERED = 1024

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW

K = TypeVar("K")
V = TypeVar("V")

Place = tuple[str, str]
"""The real path of a directory, with a slash at its end, and a name in it."""


class NeedsFullCheckError(Exception):
    """The file is not plain enough for the quick check."""


def _require(condition: object) -> None:
    if not condition:
        raise NeedsFullCheckError


class SeenFile(NamedTuple):
    """A file in which files above it would find nothing wrong.

    ``identities``: its own and those of all files below it; ``overlays``: how many of them are
    overlays. ``clean``: the full check of the file itself would find nothing.
    """

    identity: Identity
    image: Identity | None = None
    backing: Identity | None = None
    identities: frozenset[Identity] = frozenset()
    overlays: int = 0
    clean: bool = True


#: Stands for the backing file of an overlay that has none: no file has this identity.
NOTHING = SeenFile((-1, -1))


class QuickCheck:
    """The quick checks of one process; ``access`` says where names may lead."""

    def __init__(self, access: Access) -> None:
        self._respects_locks = access.locking and not access.share
        self._roots = tuple(os.path.realpath(root).rstrip("/") + "/" for root in access.roots)
        self._seen_files: dict[tuple[str, str, str], SeenFile] = {}
        #: Image files of overlays that were checked: none begins as an overlay does.
        self._images: dict[Place, None] = {}
        self._directories: dict[str, str] = {}
        #: Whether the file that :meth:`at` looked at last begins as a qcow2 file does.
        self.met_qcow2 = False
        self._in_progress: set[tuple[str, str, str]] = set()
        self._checks: dict[str, Callable[[Place, int], SeenFile | None]]
        self._checks = {ADD_COW: self._overlay, RAW: self._raw}

    def at(self, path: str) -> SeenFile | None:
        """The result for the file at ``path``; None when it does not begin as an overlay does.

        Raises :class:`NeedsFullCheckError` when only the full check can give the result.
        """
        self.met_qcow2 = False
        place = self._place(path)
        if place in self._images:
            return None
        seen = self._seen(place, ADD_COW)
        _require(seen is None or seen.clean)
        return seen

    def _place(self, path: str) -> Place:
        head, slash, name = path.rpartition("/")
        directory = head + slash
        real = self._directories.get(directory)
        if real is None:
            real = os.path.realpath(directory or ".").rstrip("/") + "/"
            _remember(self._directories, directory, real)
        return real, name

    def _seen(self, place: Place, format_: str) -> SeenFile | None:
        """The result for ``place`` as a file of ``format_``: the kept one, or a new one."""
        key = (*place, format_)
        known = self._seen_files.get(key)
        if known is not None:
            return known
        _require(key not in self._in_progress and format_ in self._checks)
        self._in_progress.add(key)
        try:
            fd, place = self._open(place)
            try:
                seen = self._checks[format_](place, fd)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise NeedsFullCheckError from error
        finally:
            self._in_progress.discard(key)
        if seen is not None:
            _remember(self._seen_files, key, seen)
        return seen

    # One file

    def _overlay(self, place: Place, fd: int) -> SeenFile | None:
        head = os.pread(fd, HEAD, 0)
        if not head.startswith(MAGIC):
            self.met_qcow2 = head.startswith(QCOW2_MAGIC)
            return None
        status = self._status(fd)
        header, image_name, backing_name = _plain_header(fd, head, status.st_size)
        below = self._below(place, header, backing_name)
        where = self._target(place, image_name)
        image, _ = self._open(where)
        try:
            held = self._status(image)
            _require(magic_of(os.pread(image, LONGEST_MAGIC, 0)) is None)
            _remember(self._images, where, None)
            clean = _is_clean(fd, status.st_size, header, image, held.st_size)
        finally:
            os.close(image)
        own = identity_of(status), identity_of(held)
        identities, overlays = below.identities.union(own), below.overlays + 1
        _require(len(identities) == len(below.identities) + len(own) and overlays < MAX_DEPTH)
        backing = None if below is NOTHING else below.identity
        return SeenFile(*own, backing, identities, overlays, clean)

    def _raw(self, _: Place, fd: int) -> SeenFile:
        identity = identity_of(self._status(fd))
        _require(magic_of(os.pread(fd, LONGEST_MAGIC, 0)) is None)
        return SeenFile(identity, identities=frozenset([identity]))

    def _below(self, place: Place, header: Header, name: str) -> SeenFile:
        """The result for the backing file."""
        if not header.has_backing:
            return NOTHING
        below = self._target(place, name)
        if header.all_allocated and not os.path.lexists("".join(below)):
            return NOTHING  # with ALL_ALLOCATED it is not needed
        seen = self._seen(below, format_name(header.backing_format))
        if seen is None:
            raise NeedsFullCheckError
        return seen

    def _open(self, place: Place) -> tuple[int, Place]:
        """Open a file, and return where it really lies: names inside it are relative to that.

        The target of a link must also lie where names may lead from the link's directory.
        """
        try:
            return os.open("".join(place), _FLAGS), place
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        real = os.path.realpath("".join(place))
        _require(real.startswith((place[0], *self._roots)))
        directory, slash, name = real.rpartition("/")
        return os.open(real, _FLAGS), (directory + slash, name)

    def _target(self, place: Place, name: str) -> Place:
        """Where ``name``, in the overlay at ``place``, leads. Raises if it may not lead there."""
        if "/" not in name:
            return place[0], name
        there = self._place(name if name.startswith("/") else place[0] + name)
        _require(there[0].startswith((place[0], *self._roots)))
        return there

    def _status(self, fd: int) -> os.stat_result:
        """The status of a regular file that no other process writes at this moment."""
        status = os.fstat(fd)
        _require(stat.S_ISREG(status.st_mode) and status.st_dev not in pseudo_devices())
        _require(not self._respects_locks or is_available(fd, READING))
        return status


def _remember(memory: dict[K, V], key: K, value: V) -> None:
    if len(memory) >= REMEMBERED:
        memory.clear()
    memory[key] = value


# The header


def _plain_header(fd: int, head: bytes, length: int) -> tuple[Header, str, str]:
    """The header of a file of ``length`` bytes that begins with ``head``, and its names."""
    header = _legal(head[:FIXED_SIZE])
    if header.name_ranges()[-1][1] > len(head):
        head = os.pread(fd, header.header_size, 0)
    _require(length >= header.header_size and format_name(header.image_format) == RAW)
    end = FIXED_SIZE
    for start, stop in header.name_ranges():
        _require(_is_zero(head[end:start]))
        end = max(end, stop)  # names may overlap
    _require(_is_zero(head[end:]))
    # Where the file has a hole, nothing is read.
    data = next_data(fd, len(head)) if len(head) < header.header_size else None
    if data is not None and data < header.header_size:
        _require(_is_zero(os.pread(fd, header.header_size - data, data)))
    image = _name(head, header.image_offset, header.image_size)
    return header, image, _name(head, header.backing_offset, header.backing_size)


@lru_cache(maxsize=REMEMBERED)
def _legal(fixed: bytes) -> Header:
    """The header in ``fixed``; many images have the same one, except for the names."""
    _require(len(fixed) == FIXED_SIZE)
    header = Header.unpack(fixed)
    _require(next(violations(header), None) is None and not header.features)
    return header


def _is_zero(data: bytes) -> bool:
    return data == _ZEROS[: len(data)] or not data.strip(b"\0")


def _name(head: bytes, offset: int, size: int) -> str:
    name = os.fsdecode(head[offset : offset + size])
    _require("\0" not in name and not path_has_protocol(name))
    return name


# The bitmap


def _is_clean(fd: int, length: int, header: Header, image: int, size: int) -> bool:
    """Whether the bitmap is whole, has no stray bits, and covers all data of the image."""
    geometry = Geometry(virtual_size(size), header.cluster_size)
    stop = header.header_size + geometry.bitmap_length
    if length < stop or geometry.bitmap_length > LONGEST_BITMAP:
        return False
    bits = _bits(fd, header.header_size, stop)
    if bits.find(1, geometry.clusters) >= 0:
        return False
    return header.all_allocated or all(
        bits.find(0, *geometry.touched(*run)) < 0 or _is_sound(image, run, bits, geometry)
        for run in data_runs(image, 0, geometry.size)
    )


def _is_sound(image: int, run: Run, bits: bitarray, geometry: Geometry) -> bool:
    """Whether ``run`` of the image file is allocated, or holds only a few zeros elsewhere."""
    foreign = runs(bits, 0, *geometry.touched(*run))
    parts = [
        (max(start, run[0]), min(stop, run[1])) for start, stop in starmap(geometry.span, foreign)
    ]
    few = sum(stop - start for start, stop in parts) <= MOST_READ
    return few and all(_is_zero(os.pread(image, stop - start, start)) for start, stop in parts)


def _bits(fd: int, start: int, stop: int) -> bitarray:
    """The bits in ``[start, stop)`` of the file; holes are not read."""
    if stop - start <= HEAD:
        return bitarray(buffer=os.pread(fd, stop - start, start), endian="little")
    content = bytearray(stop - start)
    for first, last in data_runs(fd, start, stop):
        content[first - start : last - start] = os.pread(fd, last - first, first)
    return bitarray(buffer=content, endian="little")
