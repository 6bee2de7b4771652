"""Discovery: the files in directories, which of them are overlays, and what each one names.

Directories are listed one by one. A directory, file or link that cannot be examined is part of
the answer, with the reason: it may hide an overlay. Only regular files and links to them count.
Links to directories are counted and not followed. Links that lead nowhere, sockets, FIFOs and
devices are no images. What the user excludes is neither examined nor reported.

An overlay is known by its first bytes, whatever it is called. The files that it names are
compared by inode. An overlay whose header is damaged beyond its names names nothing.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import translate
from functools import partial
from typing import NamedTuple

from addcow_mp.device.access import Access, pseudo_devices
from addcow_mp.device.exclusions import Exclusions, exclusions
from addcow_mp.device.files import identity_at, identity_of
from addcow_mp.device.location import base_path, real_path, regular_files_in
from addcow_mp.errors import ImageError
from addcow_mp.format.header import (
    BACKING_NAME_LIMIT,
    FIXED_SIZE,
    IMAGE_NAME_LIMIT,
    MAGIC,
    MIN_HEADER_SIZE,
    Header,
    format_name,
)
from addcow_mp.format.names import path_combine, path_has_protocol, read_string
from addcow_mp.format.qcow2 import MAGIC as QCOW2_MAGIC

Identity = tuple[int, int]
"""Device and inode of a file."""

#: Errors which say that nothing is there, and not that it cannot be examined.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

#: The suffix of the file in which ``check -r`` keeps an overlay's old header and bitmap.
BACKUP = re.compile(r"\.backup-\d+$")


@dataclass(frozen=True, slots=True)
class Unexamined:
    """A directory or a file that could not be examined.

    ``absent``: nothing is there any more, or a link that leads in circles.
    """

    path: str
    reason: str
    is_directory: bool = False
    absent: bool = False

    @classmethod
    def of(
        cls, path: str, error: OSError | ValueError, *, is_directory: bool = False
    ) -> Unexamined:
        """What ``error`` says of ``path``; a NUL byte in a path is a ValueError."""
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        reason = getattr(error, "strerror", None) or str(error)
        return cls(path, reason, is_directory, number in ABSENT)

    @property
    def may_hide_overlay(self) -> bool:
        """Whether it may be or hold an overlay."""
        if self.absent or self.is_directory:
            return not self.absent
        try:
            return os.stat(self.path).st_size >= MIN_HEADER_SIZE
        except OSError:
            return True


def is_gone(path: str) -> bool:
    """Whether no file has this name; a file that cannot be examined is not gone."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    return False


# Directories


@dataclass(slots=True)
class Listing:
    """The content of one directory.

    ``linked``: links to files. ``links``: the number of links to directories, which are not
    followed. ``changed``: the directory's mtime in nanoseconds; None if it could not be listed.
    """

    files: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    links: int = 0
    unexamined: list[Unexamined] = field(default_factory=list)
    changed: int | None = None


def listing(directory: str, excluded: Exclusions) -> Listing:
    """The content of ``directory``; nothing in the pseudo file systems of the kernel."""
    found = Listing()
    try:
        status = os.stat(directory)
        if status.st_dev not in pseudo_devices():
            with os.scandir(directory) as entries:
                for entry in entries:
                    _enter(entry, found, excluded)
        found.changed = status.st_mtime_ns
    except OSError as error:
        if not excluded.matches(directory):
            found.unexamined.append(Unexamined.of(directory, error, is_directory=True))
    return found


def _enter(entry: os.DirEntry[str], found: Listing, excluded: Exclusions) -> None:
    try:
        if excluded and excluded.matches(entry.path, is_directory=_is_directory(entry)):
            return
        if entry.is_symlink():
            _enter_link(entry, found)
        elif entry.is_file(follow_symlinks=False):
            found.files.append(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            found.directories.append(entry.path)
    except OSError as error:
        _add_hidden(Unexamined.of(entry.path, error), found.unexamined)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return True  # most likely a dead mount


def _enter_link(entry: os.DirEntry[str], found: Listing) -> None:
    status = entry.stat()
    if stat.S_ISDIR(status.st_mode):
        found.links += 1
    elif stat.S_ISREG(status.st_mode) and status.st_dev not in pseudo_devices():
        found.linked.append(entry.path)


def _add_hidden(one: Unexamined, unexamined: list[Unexamined]) -> None:
    if not one.absent:
        unexamined.append(one)


def listings(directory: str, excluded: Exclusions, *, deep: bool) -> Iterator[Listing]:
    """The content of ``directory``, and with ``deep`` of all directories below it."""
    waiting = [directory]
    while waiting:
        one = listing(waiting.pop(), excluded)
        yield one
        if deep:
            waiting += reversed(one.directories)


# Overlays


class Named(NamedTuple):
    """An overlay, and the files that it names, by identity, by path and as its header names them.

    ``base``: the path that its names are relative to.
    """

    path: str
    identity: Identity
    image: Identity | None
    backing: Identity | None
    image_path: str | None = None
    backing_path: str | None = None
    base: str = ""
    image_name: str | None = None
    backing_name: str | None = None
    backing_format: str | None = None
    all_allocated: bool = False
    is_lent: bool = False
    is_overlay: bool = True

    @property
    def meaning(self) -> tuple[Identity | None, ...]:
        """The files that it consists of.

        Under a hard link in another directory the same names mean other files: another overlay.
        """
        return self.identity, self.image, self.backing


def named_by(path: str) -> Named | None:
    """What the file at ``path`` names; None when it is no overlay or cannot be read."""
    one = examined(path)
    return one if isinstance(one, Named) else None


def examined(path: str) -> Named | Unexamined | None:
    """What the file at ``path`` names, or why it cannot be read; None when it is no overlay."""
    return _examined_by(path, named_in)


def examined_user(path: str) -> Named | Unexamined | None:
    """The same also of a qcow2 file.

    A qcow2 file uses its backing file. A twin that QEMU may open also uses its image file.
    """
    return _examined_by(path, _user_in)


def twin_of_image(directory: str, image: Identity) -> str | None:
    """The twin in a directory through which QEMU may write this image file, if there is one."""
    for path in regular_files_in(directory):
        user = examined_user(path) if _begins_as_qcow2(path) else None
        if isinstance(user, Named) and user.image == image:
            return path
    return None


def _begins_as_qcow2(path: str) -> bool:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            return os.pread(fd, len(QCOW2_MAGIC), 0) == QCOW2_MAGIC
        finally:
            os.close(fd)
    return False


def _examined_by(path: str, names: Callable[[int, str], Named | None]) -> Named | Unexamined | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return None  # it was removed meanwhile
    except (OSError, ValueError) as error:
        return Unexamined.of(path, error)
    try:
        return names(fd, path)
    except OSError as error:
        return Unexamined.of(path, error)
    finally:
        os.close(fd)


def _user_in(fd: int, path: str) -> Named | None:
    magic = os.pread(fd, len(MAGIC), 0)
    if magic == QCOW2_MAGIC:
        return _named_in_qcow2(fd, path)
    return named_in(fd, path) if magic == MAGIC else None


def _named_in_qcow2(fd: int, path: str) -> Named:
    from addcow_mp.device.twin import qcow2_names

    names, own = qcow2_names(fd), identity_of(os.fstat(fd))
    backing = None if names.backing is None else path_combine(os.path.realpath(path), names.backing)
    found = Named(path, own, names.image, _identity(backing), None, backing, path)
    return found._replace(is_overlay=False)


def named_in(fd: int, path: str) -> Named | None:
    """What the open file names; None when it is no overlay. Raises :class:`OSError`."""
    head = os.pread(fd, FIXED_SIZE, 0)
    if not head.startswith(MAGIC):
        return None
    own = identity_of(os.fstat(fd))
    if len(head) < FIXED_SIZE:
        return Named(path, own, None, None)
    header = Header.unpack(head)
    base = base_path(path, real_path(fd, path))
    image = _name(fd, header.image_offset, header.image_size, IMAGE_NAME_LIMIT)
    backing = _name(fd, header.backing_offset, header.backing_size, BACKING_NAME_LIMIT)
    image_path, backing_path = _path(base, image), _path(base, backing)
    return Named(
        path,
        own,
        _identity(image_path),
        _identity(backing_path),
        image_path,
        backing_path,
        base,
        image,
        backing,
        format_name(header.backing_format) or None,
        header.all_allocated,
        header.lent_id is not None,
    )


def _name(fd: int, offset: int, size: int, limit: int) -> str | None:
    """The name at ``offset``; None when there is none that can be read."""
    if not offset or not size:
        return None
    try:
        return read_string(fd, offset, size, limit)
    except ImageError:
        return None


def _path(base: str, name: str | None) -> str | None:
    """The path that ``name`` stands for; None when it names no file."""
    return None if name is None or path_has_protocol(name) else path_combine(base, name)


def _identity(path: str | None) -> Identity | None:
    return None if path is None else identity_at(path)


# Around the files of a job


@dataclass(frozen=True, slots=True)
class NearbyOverlays:
    """The overlays around the files of a job; ``more`` is the number of those left out.

    ``unread``: files and directories in the directories of the job's own files that cannot be
    read, and may hide overlays. ``hidden``: the same elsewhere beneath the roots.
    """

    overlays: tuple[Named, ...] = ()
    more: int = 0
    unread: tuple[Unexamined, ...] = ()
    hidden: tuple[Unexamined, ...] = ()


def overlays_near(
    paths: Iterable[str], access: Access, *, follows_links: bool = True
) -> NearbyOverlays:
    """The overlays in the directories of ``paths`` and beneath the roots.

    ``follows_links``: also those that links in these directories lead to, wherever they lie. A job
    that changes files has to find them; a command that only describes files opens nothing outside.
    """
    found: dict[tuple[Identity | None, ...], Named] = {}
    directories = dict.fromkeys(os.path.dirname(os.path.realpath(path)) for path in paths)
    excluded = exclusions(access.exclude)
    search = partial(_search, excluded=excluded, found=found, follows_links=follows_links)
    unread = search(directories, deep=False)
    hidden = search(map(os.path.realpath, access.roots), deep=True)
    elsewhere = tuple(one for one in hidden if one not in unread)
    return NearbyOverlays(tuple(found.values()), 0, tuple(unread), elsewhere)


def _search(
    directories: Iterable[str],
    excluded: Exclusions,
    found: dict[tuple[Identity | None, ...], Named],
    *,
    deep: bool,
    follows_links: bool,
) -> list[Unexamined]:
    """Add the overlays in ``directories`` to ``found``; returns what may hide further ones."""
    unexamined = []
    for directory in directories:
        for one in listings(directory, excluded, deep=deep):
            unexamined += one.unexamined
            linked = one.linked if follows_links else []
            for overlay in map(examined_user, (*one.files, *linked)):
                if isinstance(overlay, Unexamined):
                    unexamined.append(overlay)
                elif overlay is not None:
                    found.setdefault(overlay.meaning, overlay)
    return [one for one in unexamined if one.may_hide_overlay]


# Patterns for places


def matching_paths(pattern: str, unexamined: list[Unexamined]) -> list[str]:
    """The paths that match a shell pattern, in order; ``**`` is any number of directories.

    Directories that cannot be listed are added to ``unexamined``.
    """
    found = ["/" if pattern.startswith("/") else ""]
    for part in filter(None, pattern.split("/")):
        found = [one for base in found for one in _matching_in(base, part, unexamined)]
    return sorted(set(found) - {""})


def _matching_in(base: str, part: str, unexamined: list[Unexamined]) -> list[str]:
    path, is_directory = os.path.join(base, part), False
    try:
        if not glob.has_magic(part):
            os.lstat(path)
            return [path]
        if part == "**":
            return [base, *_below(base, unexamined)]
        path, is_directory = base or ".", True
        regex = re.compile(translate(part))
        names = [name for name in os.listdir(path) if regex.match(name)]
    except (OSError, ValueError) as error:
        _add_hidden(Unexamined.of(path, error, is_directory=is_directory), unexamined)
        return []
    return [os.path.join(base, one) for one in names if part[0] == "." or one[0] != "."]


def _below(base: str, unexamined: list[Unexamined]) -> Iterator[str]:
    """All directories below ``base`` except hidden ones, as paths that begin with it."""
    prefix = "" if base else "./"
    for one in listings(base or ".", exclusions((".*",)), deep=True):
        unexamined += [each for each in one.unexamined if each.is_directory]
        yield from (path.removeprefix(prefix) for path in one.directories)
