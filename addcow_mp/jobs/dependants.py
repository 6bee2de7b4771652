"""Dependants: other overlays that need a file which a job is about to change.

They are found by content, whatever they are called: files that begin with the add-cow
magic, in the directories of the files concerned and anywhere beneath the roots that the
user gave. What such a file names as backing or image is compared by inode. Members of the
job's own chain do not count. Files whose header is damaged beyond its names name nothing; one
that may not be read might name anything, and is refused unless forced.

An image file named by two overlays has no meaning: each takes the other's clusters for
garbage. That is refused always; other dependants can be overridden by force.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from addcow_mp.device.access import Access, pseudo_devices
from addcow_mp.device.files import File, identity_at, identity_of
from addcow_mp.device.layer import Layer
from addcow_mp.device.location import base_path, real_path
from addcow_mp.device.overlay import Overlay
from addcow_mp.errors import DependantsError, ImageError
from addcow_mp.format.header import (
    BACKING_NAME_LIMIT,
    FIXED_SIZE,
    IMAGE_NAME_LIMIT,
    MAGIC,
    MIN_HEADER_SIZE,
    Header,
)
from addcow_mp.format.names import path_combine, path_has_protocol, read_string

Identity = tuple[int, int]

#: What `check -r` appends to the name of an overlay whose header and bitmap it keeps.
BACKUP = re.compile(r"\.backup-\d+$")


_MEND = "commit or flatten them first, or use --force to change it under them"


class Named(NamedTuple):
    """An overlay somewhere, and the files that it names, by identity and by path."""

    path: str
    identity: Identity
    image: Identity | None
    backing: Identity | None
    image_path: str | None = None
    backing_path: str | None = None
    #: The path that its names are relative to.
    base: str = ""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The overlays around the files of a job, and files that may be ones but cannot be read.

    ``more`` of them are left out, since these are enough for a refusal.
    """

    overlays: tuple[Named, ...] = ()
    more: int = 0
    unread: tuple[str, ...] = ()


def refuse_dependants(
    overlay: Overlay,
    changed: list[File],
    access: Access,
    mend: str = _MEND,
    around: Surroundings | None = None,
) -> None:
    """Raise :class:`DependantsError` when other overlays need a file of ``changed``.

    ``overlay`` is the job's own chain. With ``access.force`` only a shared image counts. Who
    knows what is ``around`` it already spares looking for it.
    """
    if not changed:
        return
    members = {one.cow.identity: one for one in _members(overlay)}
    around = _around(overlay, access) if around is None else around
    others = [one for one in around.overlays if not _is_member(one, members)]
    if around.unread and not access.force:
        raise ImageError(
            path=around.unread[0],
            problem="it cannot be read, and may be an overlay that needs what is to be changed; "
            "make it readable, or use --force",
        )
    images = {one.image.file.identity for one in members.values()}
    for file in changed:
        if file.identity in images:
            refuse_shared_image(file, [one for one in others if one.image == file.identity])
        dependants = [one.path for one in others if file.identity in (one.backing, one.image)]
        if dependants and not access.force:
            raise DependantsError(
                path=file.path,
                dependants=_listed(dependants, around.more),
                mend=mend,
            )


def _around(overlay: Overlay, access: Access) -> Surroundings:
    near = [file.path for file in (*overlay.files(), *(one.cow for one in _members(overlay)))]
    unread: list[str] = []
    found = overlays_near(near, access.roots, unread)
    return Surroundings(tuple(found), unread=tuple(unread))


def _listed(paths: list[str], more: int = 0) -> str:
    return ", ".join(sorted(paths)) + (f" and {more} more" if more else "")


def _is_member(one: Named, members: dict[Identity, Overlay]) -> bool:
    """Whether ``one`` belongs to the job's own chain, or is what a repair kept of a member."""
    # Under a hard link elsewhere the same names mean other files: then it is another overlay.
    if one.identity in members and one.image == members[one.identity].image.file.identity:
        return True
    original = BACKUP.sub("", one.path)
    return original != one.path and any(
        member.cow.real == original and member.image.file.identity == one.image
        for member in members.values()
    )


def refuse_shared_image(image: File, others: list[Named]) -> None:
    """Raise when ``others`` use ``image`` as their image file too."""
    if others:
        raise DependantsError(
            path=image.path,
            dependants=_listed([one.path for one in others]),
            mend="two overlays cannot share an image file; give one of them a copy",
        )


def _members(layer: Layer | None) -> Iterator[Overlay]:
    while isinstance(layer, Overlay):
        yield layer
        layer = layer.backing


def overlays_near(
    paths: list[str], roots: tuple[str, ...], unread: list[str] | None = None
) -> list[Named]:
    """The overlays in the directories of ``paths`` and beneath ``roots``, each meaning once.

    A file that is not allowed to be read, and large enough for an overlay, goes to ``unread``.
    """
    found: dict[tuple[Identity, Identity | None, Identity | None], Named] = {}
    directories = dict.fromkeys(os.path.dirname(os.path.realpath(path)) for path in paths)
    places = [(directory, False) for directory in directories]
    places += [(os.path.realpath(root), True) for root in roots]
    for directory, deep in places:
        for entry in files_in(directory, deep=deep):
            one = named_by(entry.path, unread)
            if one is not None:
                found.setdefault((one.identity, one.image, one.backing), one)
    return list(found.values())


def files_in(directory: str, *, deep: bool) -> Iterator[os.DirEntry[str]]:
    """The regular files in ``directory``, and with ``deep`` in all below it.

    A link to a file counts as well. Links to directories are not followed.
    """
    waiting = [directory]
    while waiting:
        here = waiting.pop()
        try:
            if os.stat(here).st_dev in pseudo_devices():
                continue
            with os.scandir(here) as entries:
                for entry in entries:
                    if is_file(entry):
                        yield entry
                    elif deep and entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ImageError(
                path=here, problem=f"cannot look for overlays there: {error.strerror}"
            ) from error


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether ``entry`` is a regular file, or a link to one, and not one of the kernel's own."""
    try:
        if not entry.is_symlink():
            return entry.is_file()
        status = entry.stat()
        return stat.S_ISREG(status.st_mode) and status.st_dev not in pseudo_devices()
    except OSError:
        return False  # a link that leads in circles


def named_by(path: str, unread: list[str] | None = None) -> Named | None:
    """What the file at ``path`` names; None when it is no overlay or cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        if unread is not None and os.stat(path).st_size >= MIN_HEADER_SIZE:
            unread.append(path)
        return None
    except OSError:
        return None
    try:
        head = os.pread(fd, FIXED_SIZE, 0)
        if not head.startswith(MAGIC):
            return None
        if len(head) < FIXED_SIZE:
            return Named(path, identity_of(os.fstat(fd)), None, None)
        header = Header.unpack(head)
        base = base_path(path, real_path(fd, path))
        image = _path(base, fd, header.image_offset, header.image_size, IMAGE_NAME_LIMIT)
        backing = _path(base, fd, header.backing_offset, header.backing_size, BACKING_NAME_LIMIT)
        own = identity_of(os.fstat(fd))
        return Named(path, own, _identity(image), _identity(backing), image, backing, base)
    except OSError:
        return None
    finally:
        os.close(fd)


def _path(base: str, fd: int, offset: int, size: int, limit: int) -> str | None:
    """The path of the file whose name lies there, seen from ``base``; None when there is none."""
    if not offset or not size:
        return None
    try:
        name = read_string(fd, offset, size, limit)
    except (ImageError, OSError):
        return None
    return None if path_has_protocol(name) else path_combine(base, name)


def _identity(path: str | None) -> Identity | None:
    return None if path is None else identity_at(path)
