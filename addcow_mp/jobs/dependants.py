"""Dependants: other overlays that need a file which a job is about to change.

They are found by content, whatever they are called: files that begin with the add-cow
magic, in the directories of the files concerned and anywhere beneath the roots that the
user gave. What such a file names as backing or image is compared by inode. Members of the
job's own chain do not count. Files whose header is damaged beyond its names name nothing.

What cannot be read, a file or a directory, may be or hold an overlay that names anything. In the
directories of the job's own files it bars every job that changes a file. Elsewhere beneath the
roots it bars jobs that change what other overlays may stand on: a base, a ``.add-cow`` file. A
job that changes nothing but its own image file goes on: whoever shares that lies beside it. What
is excluded is known to the user and bars nothing; force goes past all of it.

An image file named by two overlays has no meaning: each takes the other's clusters for
garbage. That is refused always; other dependants can be overridden by force.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Exclusions, Unexamined, exclusions, listings
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
class NearbyOverlays:
    """The overlays around the files of a job; ``more`` are left out, these are enough to refuse it.

    ``unread`` are files and directories that cannot be read, in the directories of the job's own
    files, ``hidden`` those elsewhere beneath the roots: there may be more overlays in them.
    """

    overlays: tuple[Named, ...] = ()
    more: int = 0
    unread: tuple[Unexamined, ...] = ()
    hidden: tuple[Unexamined, ...] = ()


def refuse_dependants(
    overlay: Overlay,
    changed: list[File],
    access: Access,
    mend: str = _MEND,
    around: NearbyOverlays | None = None,
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
    if not access.force:
        own = overlay.image.file.identity
        is_alone = all(file.identity == own for file in changed)
        refuse_unexamined(around.unread if is_alone else (*around.unread, *around.hidden))


def refuse_unexamined(unread: Sequence[Unexamined]) -> None:
    """Raise :class:`ImageError` when something that may be or hold a dependant is ``unread``."""
    for one in unread:
        what = (
            "overlays cannot be looked for there, and one may need"
            if one.is_directory
            else "it cannot be read, and may be an overlay that needs"
        )
        raise ImageError(
            path=one.path,
            problem=f"{what} what is to be changed ({one.reason}); make it readable, leave it out "
            "with --exclude if it is known, or use --force",
        )


def _around(overlay: Overlay, access: Access) -> NearbyOverlays:
    near = [file.path for file in (*overlay.files(), *(one.cow for one in _members(overlay)))]
    return overlays_near(near, access)


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


def overlays_near(paths: list[str], access: Access) -> NearbyOverlays:
    """The overlays in the directories of ``paths`` and beneath the roots, each meaning once."""
    directories = dict.fromkeys(os.path.dirname(os.path.realpath(path)) for path in paths)
    near = _Near(exclusions(access.exclude))
    for directory in directories:
        near.look_through(directory, deep=False)
    beyond = _Near(exclusions(access.exclude), near.found)
    for root in access.roots:
        beyond.look_through(os.path.realpath(root), deep=True)
    hidden = tuple(one for one in beyond.unread if one not in near.unread)
    return NearbyOverlays(tuple(near.found.values()), 0, tuple(near.unread), hidden)


class _Near:
    """Overlays that are being looked for; what was ``found`` before counts as well."""

    def __init__(
        self, excluded: Exclusions, found: dict[tuple[Identity | None, ...], Named] | None = None
    ) -> None:
        self.found = {} if found is None else found
        self.unread: list[Unexamined] = []
        self._excluded = excluded

    def look_through(self, directory: str, *, deep: bool) -> None:
        """Look at the files in a directory, with ``deep`` also in all below it."""
        for one in listings(directory, self._excluded, deep=deep):
            self._add(one.unexamined)
            for path in (*one.files, *one.linked):
                self._look_at(path)

    def _look_at(self, path: str) -> None:
        one = examined(path)
        if isinstance(one, Unexamined):
            self._add([one])
        elif one is not None:
            self.found.setdefault((one.identity, one.image, one.backing), one)

    def _add(self, unexamined: list[Unexamined]) -> None:
        self.unread += [one for one in unexamined if may_hide_overlay(one)]


def may_hide_overlay(one: Unexamined) -> bool:
    """Whether there may be an overlay in what could not be looked at."""
    if one.absent or one.is_directory:
        return not one.absent
    try:
        return os.stat(one.path).st_size >= MIN_HEADER_SIZE
    except OSError:
        return True


def named_by(path: str) -> Named | None:
    """What the file at ``path`` names; None when it is no overlay or cannot be read."""
    one = examined(path)
    return one if isinstance(one, Named) else None


def examined(path: str) -> Named | Unexamined | None:
    """What the file at ``path`` names, or why it cannot be read; None when it is no overlay."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return None  # it was removed meanwhile
    except (OSError, ValueError) as error:
        return Unexamined.of(path, error)
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
    except OSError as error:
        return Unexamined.of(path, error)
    finally:
        os.close(fd)


def _path(base: str, fd: int, offset: int, size: int, limit: int) -> str | None:
    """The path of the file whose name lies there, seen from ``base``; None when there is none."""
    if not offset or not size:
        return None
    try:
        name = read_string(fd, offset, size, limit)
    except ImageError:
        return None
    return None if path_has_protocol(name) else path_combine(base, name)


def _identity(path: str | None) -> Identity | None:
    return None if path is None else identity_at(path)
