"""A glance: proof that an overlay is clean, in a few system calls, or the advice to look closer.

Of ten thousand images nearly all are clean and laid out plainly: names at the beginning of the
header, a small bitmap, data where bits are set. For those a glance asserts all that
:mod:`addcow_mp.jobs.check` asserts, looking only once at what a thousand of them share.
Whatever is the least bit out of the ordinary, sound or not, is *not* judged here: the full check
does that, and alone has words for it. So a glance that gives up costs time, never a finding.

What was seen of a file is remembered for the files above it. No lock is taken: one that a guest
takes while an image is glanced at is as good as one taken right after the check.
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
from addcow_mp.units import KiB

#: What is read of a file at once: a plainly laid out header has its names in it.
HEAD = 4 * KiB

#: A longer bitmap is left to the full check, which maps it.
LONGEST_BITMAP = 256 * KiB

#: Bytes that are looked at for zeros; more are left to the full check as well.
MOST_READ = 256 * KiB

_ZEROS = bytes(MOST_READ)

#: Files and directories remembered; then it begins anew, so that memory stays flat.
REMEMBERED = 1024

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW

K = TypeVar("K")
V = TypeVar("V")

Place = tuple[str, str]
"""A directory without links on the way, ending with a slash, and a name in it."""


class NeedsFullCheckError(Exception):
    """The file is not plain enough to be judged at a glance."""


class SeenFile(NamedTuple):
    """A file with nothing wrong about it, as far as files above it are concerned.

    ``identities``: its own and those of all files below it, ``overlays`` how many of them are
    overlays. ``clean`` says that the full check of it would find nothing at all.
    """

    identity: Identity
    image: Identity | None = None
    backing: Identity | None = None
    identities: frozenset[Identity] = frozenset()
    overlays: int = 0
    clean: bool = True


#: What is seen below an overlay without a backing file: no file has this identity.
NOTHING = SeenFile((-1, -1))


class _Plain(NamedTuple):
    """A legal header, its names, and nothing else."""

    header: Header
    image: str
    backing: str


class QuickCheck:
    """The glances of one process; ``access`` says where names may lead."""

    def __init__(self, access: Access) -> None:
        self._heeds_locks = access.locking and not access.share
        self._roots = tuple(os.path.realpath(root).rstrip("/") + "/" for root in access.roots)
        self._seen_files: dict[tuple[str, str, str], SeenFile] = {}
        #: Image files that were met: they begin as no other format does.
        self._images: dict[Place, None] = {}
        self._directories: dict[str, str] = {}
        self._under_way: set[tuple[str, str, str]] = set()
        self._ways: dict[str, Callable[[Place, int], SeenFile | None]]
        self._ways = {ADD_COW: self._overlay, RAW: self._raw}

    def at(self, path: str) -> SeenFile | None:
        """What was seen of the file at ``path``; None when it does not begin as an overlay does.

        Raises :class:`NeedsFullCheckError` when only the full check can say how it is.
        """
        place = self._place(path)
        if place in self._images:
            return None
        seen = self._seen(place, ADD_COW)
        if seen is not None and not seen.clean:
            raise NeedsFullCheckError
        return seen

    def _place(self, path: str) -> Place:
        directory, slash, name = path.rpartition("/")
        return self._real(directory + slash), name

    def _real(self, directory: str) -> str:
        real = self._directories.get(directory)
        if real is None:
            real = os.path.realpath(directory or ".").rstrip("/") + "/"
            _remember(self._directories, directory, real)
        return real

    def _seen(self, place: Place, format_: str) -> SeenFile | None:
        """What is remembered of ``place``, looked at as ``format_``, or what is seen there."""
        key = (*place, format_)
        known = self._seen_files.get(key)
        if known is not None:
            return known
        if key in self._under_way or format_ not in self._ways:
            raise NeedsFullCheckError
        self._under_way.add(key)
        try:
            fd, place = self._open(place)
            try:
                seen = self._ways[format_](place, fd)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise NeedsFullCheckError from error
        finally:
            self._under_way.discard(key)
        if seen is not None:
            _remember(self._seen_files, key, seen)
        return seen

    # One file

    def _overlay(self, place: Place, fd: int) -> SeenFile | None:
        head = os.pread(fd, HEAD, 0)
        if not head.startswith(MAGIC):
            return None
        status = self._status(fd)
        plain = _plain(fd, head, status.st_size)
        below = self._below(place, plain)
        where = self._led_to(place, plain.image)
        image, _ = self._open(where)
        try:
            held = self._status(image)
            if magic_of(os.pread(image, LONGEST_MAGIC, 0)) is not None:
                raise NeedsFullCheckError
            _remember(self._images, where, None)
            clean = _is_clean(fd, status.st_size, plain.header, image, held.st_size)
        finally:
            os.close(image)
        own = identity_of(status), identity_of(held)
        identities = below.identities.union(own)
        overlays = below.overlays + 1
        if len(identities) < len(below.identities) + len(own) or overlays >= MAX_DEPTH:
            raise NeedsFullCheckError
        backing = None if below is NOTHING else below.identity
        return SeenFile(*own, backing, identities, overlays, clean)

    def _raw(self, _: Place, fd: int) -> SeenFile:
        identity = identity_of(self._status(fd))
        if magic_of(os.pread(fd, LONGEST_MAGIC, 0)) is not None:
            raise NeedsFullCheckError
        return SeenFile(identity, identities=frozenset([identity]))

    def _below(self, place: Place, plain: _Plain) -> SeenFile:
        """What was seen of the backing file."""
        if not plain.header.has_backing:
            return NOTHING
        below = self._led_to(place, plain.backing)
        if plain.header.all_allocated and not os.path.lexists("".join(below)):
            return NOTHING  # nobody needs it
        seen = self._seen(below, format_name(plain.header.backing_format))
        if seen is None:
            raise NeedsFullCheckError
        return seen

    def _open(self, place: Place) -> tuple[int, Place]:
        """Open a file, and say where it really lies: names inside it are relative to that.

        What a link leads to must be where names may lead from the link's directory as well.
        """
        try:
            return os.open("".join(place), _FLAGS), place
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        real = os.path.realpath("".join(place))
        if not real.startswith((place[0], *self._roots)):
            raise NeedsFullCheckError
        directory, slash, name = real.rpartition("/")
        return os.open(real, _FLAGS), (directory + slash, name)

    def _led_to(self, place: Place, name: str) -> Place:
        """Where ``name``, in the overlay at ``place``, leads, if it may lead there."""
        if "/" not in name:
            return place[0], name
        there = self._place(name if name.startswith("/") else place[0] + name)
        if not there[0].startswith((place[0], *self._roots)):
            raise NeedsFullCheckError
        return there

    def _status(self, fd: int) -> os.stat_result:
        """The status of a plain file that nobody changes at this moment."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_dev in pseudo_devices():
            raise NeedsFullCheckError
        if self._heeds_locks and not is_available(fd, READING):
            raise NeedsFullCheckError
        return status


def _remember(memory: dict[K, V], key: K, value: V) -> None:
    if len(memory) >= REMEMBERED:
        memory.clear()
    memory[key] = value


# The header


def _plain(fd: int, head: bytes, length: int) -> _Plain:
    """The header of a file of ``length`` bytes that begins with ``head``."""
    header = _legal(head[:FIXED_SIZE])
    if header.name_ranges()[-1][1] > len(head):
        head = os.pread(fd, header.header_size, 0)
    if length < header.header_size or not _is_zero(_without_names(head, header)):
        raise NeedsFullCheckError
    if not _is_empty(fd, len(head), header.header_size):
        raise NeedsFullCheckError
    image = _name(head, header.image_offset, header.image_size)
    backing = _name(head, header.backing_offset, header.backing_size)
    if format_name(header.image_format) != RAW:
        raise NeedsFullCheckError
    return _Plain(header, image, backing)


@lru_cache(maxsize=REMEMBERED)
def _legal(fixed: bytes) -> Header:
    """The header in ``fixed``; many images have the same one, names apart."""
    if len(fixed) < FIXED_SIZE:
        raise NeedsFullCheckError
    header = Header.unpack(fixed)
    if next(violations(header), None) is not None:
        raise NeedsFullCheckError
    return header


def _without_names(head: bytes, header: Header) -> bytes:
    """What is left of ``head`` behind the fixed header when the names are taken out."""
    left, end = b"", FIXED_SIZE
    for start, stop in header.name_ranges():
        left += head[end:start]
        end = max(end, stop)  # names may lie over each other
    return left + head[end:]


def _is_zero(data: bytes) -> bool:
    return data == _ZEROS[: len(data)] or not data.strip(b"\0")


def _name(head: bytes, offset: int, size: int) -> str:
    name = os.fsdecode(head[offset : offset + size])
    if "\0" in name or path_has_protocol(name):
        raise NeedsFullCheckError
    return name


def _is_empty(fd: int, start: int, stop: int) -> bool:
    """Whether ``[start, stop)`` is zeros; where the file has a hole, nothing is read."""
    data = next_data(fd, start) if start < stop else None
    return data is None or data >= stop or _is_zero(os.pread(fd, stop - data, data))


# The bitmap


def _is_clean(fd: int, length: int, header: Header, image: int, size: int) -> bool:
    """Whether the bitmap is whole, without stray bits, and all data of the image is local."""
    geometry = Geometry(virtual_size(size), header.cluster_size)
    stop = header.header_size + geometry.bitmap_length
    if length < stop or geometry.bitmap_length > LONGEST_BITMAP:
        return False
    bits = _bits(fd, header.header_size, stop)
    if bits.find(1, geometry.clusters) >= 0:
        return False
    if header.all_allocated:
        return True
    for run in data_runs(image, 0, geometry.size):
        if bits.find(0, *geometry.touched(*run)) >= 0 and not _is_sound(image, run, bits, geometry):
            return False
    return True


def _is_sound(image: int, run: Run, bits: bitarray, geometry: Geometry) -> bool:
    """Whether what lies in ``run`` of the image file is local, or written zeros, and not many."""
    foreign = runs(bits, 0, *geometry.touched(*run))
    parts = [
        (max(start, run[0]), min(stop, run[1])) for start, stop in starmap(geometry.span, foreign)
    ]
    few = sum(stop - start for start, stop in parts) <= MOST_READ
    return few and all(_is_zero(os.pread(image, stop - start, start)) for start, stop in parts)


def _bits(fd: int, start: int, stop: int) -> bitarray:
    """The bits in ``[start, stop)`` of the file; what lies in holes is not read."""
    if stop - start <= HEAD:
        return bitarray(buffer=os.pread(fd, stop - start, start), endian="little")
    content = bytearray(stop - start)
    for first, last in data_runs(fd, start, stop):
        content[first - start : last - start] = os.pread(fd, last - first, first)
    return bitarray(buffer=content, endian="little")
