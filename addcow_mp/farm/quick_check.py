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

import os
from collections.abc import Callable
from itertools import starmap
from typing import NamedTuple

from bitarray import bitarray

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity
from addcow_mp.device.files import identity_of
from addcow_mp.device.headers import MAX_DEPTH
from addcow_mp.device.holes import data_runs, next_data
from addcow_mp.device.magic import LONGEST_MAGIC, magic_of
from addcow_mp.farm.plain import (
    HEAD,
    LONGEST_BITMAP,
    NotPlainError,
    Place,
    Places,
    bits_in,
    legal,
    plain_name,
    remember,
    require,
)
from addcow_mp.format.bits import Run, runs
from addcow_mp.format.geometry import Geometry, virtual_size
from addcow_mp.format.header import ADD_COW, FIXED_SIZE, MAGIC, RAW, Header, format_name
from addcow_mp.format.qcow2 import MAGIC as QCOW2_MAGIC
from addcow_mp.units import KiB

#: Bytes that are compared with zeros; more are left to the full check.
MOST_READ = 256 * KiB

_ZEROS = bytes(MOST_READ)


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
        self._places = Places(access)
        self._seen_files: dict[tuple[str, str, str], SeenFile] = {}
        #: Image files of overlays that were checked: none begins as an overlay does.
        self._images: dict[Place, None] = {}
        #: Whether the file that :meth:`at` looked at last begins as a qcow2 file does.
        self.met_qcow2 = False
        self._in_progress: set[tuple[str, str, str]] = set()
        self._checks: dict[str, Callable[[Place, int], SeenFile | None]]
        self._checks = {ADD_COW: self._overlay, RAW: self._raw}

    def at(self, path: str) -> SeenFile | None:
        """The result for the file at ``path``; None when it does not begin as an overlay does.

        Raises :class:`NotPlainError` when only the full check can give the result.
        """
        self.met_qcow2 = False
        place = self._places.place(path)
        if place in self._images:
            return None
        seen = self._seen(place, ADD_COW)
        require(seen is None or seen.clean)
        return seen

    def _seen(self, place: Place, format_: str) -> SeenFile | None:
        """The result for ``place`` as a file of ``format_``: the kept one, or a new one."""
        key = (*place, format_)
        known = self._seen_files.get(key)
        if known is not None:
            return known
        require(key not in self._in_progress and format_ in self._checks)
        self._in_progress.add(key)
        try:
            fd, place = self._places.open(place)
            try:
                seen = self._checks[format_](place, fd)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise NotPlainError from error
        finally:
            self._in_progress.discard(key)
        if seen is not None:
            remember(self._seen_files, key, seen)
        return seen

    # One file

    def _overlay(self, place: Place, fd: int) -> SeenFile | None:
        head = os.pread(fd, HEAD, 0)
        if not head.startswith(MAGIC):
            self.met_qcow2 = head.startswith(QCOW2_MAGIC)
            return None
        status = self._places.status(fd)
        header, image_name, backing_name = _plain_header(fd, head, status.st_size)
        below = self._below(place, header, backing_name)
        where = self._places.target(place, image_name)
        image, _ = self._places.open(where)
        try:
            held = self._places.status(image)
            require(magic_of(os.pread(image, LONGEST_MAGIC, 0)) is None)
            remember(self._images, where, None)
            clean = _is_clean(fd, status.st_size, header, image, held.st_size)
        finally:
            os.close(image)
        own = identity_of(status), identity_of(held)
        identities, overlays = below.identities.union(own), below.overlays + 1
        require(len(identities) == len(below.identities) + len(own) and overlays < MAX_DEPTH)
        backing = None if below is NOTHING else below.identity
        return SeenFile(*own, backing, identities, overlays, clean)

    def _raw(self, _: Place, fd: int) -> SeenFile:
        identity = identity_of(self._places.status(fd))
        require(magic_of(os.pread(fd, LONGEST_MAGIC, 0)) is None)
        return SeenFile(identity, identities=frozenset([identity]))

    def _below(self, place: Place, header: Header, name: str) -> SeenFile:
        """The result for the backing file."""
        if not header.has_backing:
            return NOTHING
        below = self._places.target(place, name)
        if header.all_allocated and not os.path.lexists("".join(below)):
            return NOTHING  # with ALL_ALLOCATED it is not needed
        seen = self._seen(below, format_name(header.backing_format))
        if seen is None:
            raise NotPlainError
        return seen


# The header


def _plain_header(fd: int, head: bytes, length: int) -> tuple[Header, str, str]:
    """The header of a file of ``length`` bytes that begins with ``head``, and its names."""
    header = legal(head[:FIXED_SIZE])
    if header.name_ranges()[-1][1] > len(head):
        head = os.pread(fd, header.header_size, 0)
    require(length >= header.header_size and format_name(header.image_format) == RAW)
    end = FIXED_SIZE
    for start, stop in header.name_ranges():
        require(_is_zero(head[end:start]))
        end = max(end, stop)  # names may overlap
    require(_is_zero(head[end:]))
    # Where the file has a hole, nothing is read.
    data = next_data(fd, len(head)) if len(head) < header.header_size else None
    if data is not None and data < header.header_size:
        require(_is_zero(os.pread(fd, header.header_size - data, data)))
    image = plain_name(head, header.image_offset, header.image_size)
    return header, image, plain_name(head, header.backing_offset, header.backing_size)


def _is_zero(data: bytes) -> bool:
    return data == _ZEROS[: len(data)] or not data.strip(b"\0")


# The bitmap


def _is_clean(fd: int, length: int, header: Header, image: int, size: int) -> bool:
    """Whether the bitmap is whole, has no stray bits, and covers all data of the image."""
    geometry = Geometry(virtual_size(size), header.cluster_size)
    stop = header.header_size + geometry.bitmap_length
    if length < stop or geometry.bitmap_length > LONGEST_BITMAP:
        return False
    bits = bits_in(fd, header.header_size, stop)
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
