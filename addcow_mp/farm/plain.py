"""Plain files: opened and looked at with few system calls, where nothing about them is unusual.

Nearly all images of a farm are laid out plainly: regular files without links, names at the
beginning of the header, a small bitmap. The quick check and the quick estimate read these. Anything
else raises :class:`NotPlainError`, and the full check or estimate gives the answer. So a file that
is not plain costs time, never a wrong answer.

No lock is taken: a guest that takes a lock meanwhile could as well take it right afterwards.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import lru_cache
from typing import TypeVar

from bitarray import bitarray

from addcow_mp.device.access import Access, pseudo_devices
from addcow_mp.device.holes import data_runs
from addcow_mp.device.locks import READING, is_available
from addcow_mp.format.header import FIXED_SIZE, Header, violations
from addcow_mp.format.names import path_has_protocol
from addcow_mp.units import KiB

#: Bytes of a file that are read at once: they include the names of a plain header.
HEAD = 4 * KiB

#: Longer bitmaps are not read at once.
LONGEST_BITMAP = 256 * KiB

#: Results that are kept; then all are dropped, so that memory stays bounded.
REMEMBERED = 1024

FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW

K = TypeVar("K")
V = TypeVar("V")

Place = tuple[str, str]
"""The real path of a directory, with a slash at its end, and a name in it."""


class NotPlainError(Exception):
    """The file is unusual, or cannot be read."""


def require(condition: object) -> None:
    """Raise :class:`NotPlainError` unless ``condition`` holds."""
    if not condition:
        raise NotPlainError


def remember(memory: dict[K, V], key: K, value: V) -> None:
    """Keep ``value``; all others are dropped when there are many."""
    if len(memory) >= REMEMBERED:
        memory.clear()
    memory[key] = value


class Places:
    """Where files lie and where names in them may lead; ``access`` says which roots there are."""

    def __init__(self, access: Access) -> None:
        self.roots = tuple(os.path.realpath(root).rstrip("/") + "/" for root in access.roots)
        self._respects_locks = access.locking and not access.share
        self._directories: dict[str, str] = {}

    def place(self, path: str) -> Place:
        """The place of the file at ``path``."""
        head, slash, name = path.rpartition("/")
        directory = head + slash
        real = self._directories.get(directory)
        if real is None:
            real = os.path.realpath(directory or ".").rstrip("/") + "/"
            remember(self._directories, directory, real)
        return real, name

    def open(self, place: Place) -> tuple[int, Place]:
        """Open a file for reading, and return where it really lies: names in it start there.

        The target of a link must also lie where names may lead from the link's directory.
        """
        try:
            return os.open("".join(place), os.O_RDONLY | FLAGS), place
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        real = os.path.realpath("".join(place))
        require(real.startswith((place[0], *self.roots)))
        directory, slash, name = real.rpartition("/")
        return os.open(real, os.O_RDONLY | FLAGS), (directory + slash, name)

    def target(self, place: Place, name: str) -> Place:
        """Where ``name``, in the overlay at ``place``, leads. Raises if it may not lead there."""
        if "/" not in name:
            return place[0], name
        there = self.place(name if name.startswith("/") else place[0] + name)
        require(there[0].startswith((place[0], *self.roots)))
        return there

    def status(self, fd: int) -> os.stat_result:
        """The status of a regular file that no other process writes at this moment."""
        status = os.fstat(fd)
        require(stat.S_ISREG(status.st_mode) and status.st_dev not in pseudo_devices())
        require(not self._respects_locks or is_available(fd, READING))
        return status


@lru_cache(maxsize=REMEMBERED)
def legal(fixed: bytes) -> Header:
    """The header in ``fixed``; many images have the same one, except for the names."""
    require(len(fixed) == FIXED_SIZE)
    header = Header.unpack(fixed)
    require(next(violations(header), None) is None and not header.features)
    return header


def plain_name(head: bytes, offset: int, size: int) -> str:
    """A name in the bytes ``head`` of a file."""
    name = os.fsdecode(head[offset : offset + size])
    require("\0" not in name and not path_has_protocol(name))
    return name


def bits_in(fd: int, start: int, stop: int) -> bitarray:
    """The bits in ``[start, stop)`` of the file; holes are not read."""
    if stop - start <= HEAD:
        return bitarray(buffer=os.pread(fd, stop - start, start), endian="little")
    content = bytearray(stop - start)
    for first, last in data_runs(fd, start, stop):
        content[first - start : last - start] = os.pread(fd, last - first, first)
    return bitarray(buffer=content, endian="little")
