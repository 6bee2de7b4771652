"""Places: where the files of a farm are.

A place is a directory, a file, or a pattern for them. Directories are searched completely; links to
directories are not followed. Each file counts once: it is shown under its own name if that is in a
place, else under the first link to it. Names inside images may lead beneath the directories among
the places, as may links that are found there; only a place itself may be a link that leads
elsewhere.

What cannot be examined is part of the result, with the reason. So is a place that does not exist;
if none exists, that is an error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import (
    BACKUP,
    Identity,
    Named,
    Unexamined,
    examined,
    listings,
    matching_paths,
)
from addcow_mp.device.exclusions import exclusions
from addcow_mp.device.files import identity_at, kind_of
from addcow_mp.errors import ImageError

#: Files that are named in a message about more of them.
EXAMPLES = 3

_MISSING = "no such file or directory"
_REMEDY = "name another place"


@dataclass
class Found:
    """The files in places, in order, and how what they name may be opened.

    ``named``: files that are places themselves. ``directories``: directories that are places, with
    the number of links to directories in each. ``unexamined``: what could not be examined.
    """

    access: Access
    files: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    directories: dict[str, int] = field(default_factory=dict)
    unexamined: list[Unexamined] = field(default_factory=list)


def files_of(places: Iterable[str], access: Access) -> Found:
    """The files in ``places``, and ``access`` with the directories among them as roots.

    Raises :class:`ImageError` when none of them exists.
    """
    search = _Search(access)
    for place in places:
        search.add_place(place)
    return search.found()


class _Search:
    """Collects the files in places."""

    def __init__(self, access: Access) -> None:
        self._excluded = exclusions(access.exclude)
        self._found = Found(access)
        #: How each file is shown, by its path without links.
        self._files: dict[str, str] = {}
        self._links: list[str] = []
        self._missing: list[str] = []
        self._any_exists = False
        #: Used for one search only: links and the working directory may change.
        self._real = lru_cache(maxsize=1024)(os.path.realpath)

    def add_place(self, place: str) -> None:
        """Add a place, or all places that it matches as a pattern."""
        hidden: list[Unexamined] = []
        paths = [place]
        try:
            os.lstat(place)
        except (OSError, ValueError) as error:
            one = Unexamined.of(place, error)
            paths = matching_paths(place, hidden) if one.absent else []
            hidden += [] if one.absent else [one]
        self._add_unexamined(hidden)
        if not paths and not hidden:
            self._missing.append(place)
        for path in paths:
            self._add(path)

    def _add(self, path: str) -> None:
        self._any_exists = True
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            self._add_unexamined([Unexamined.of(path, error)])
            return
        if self._excluded.matches(path, is_directory=stat.S_ISDIR(mode)):
            return
        if stat.S_ISDIR(mode):
            self._add_directory(path)
        elif stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            self._found.named.append(path)
            if os.path.islink(path):
                self._links.append(path)
            else:
                self._add_files([path])
        else:
            reason = f"it is {kind_of(mode)}, not a regular file"
            self._add_unexamined([Unexamined(path, reason)])

    def _add_directory(self, directory: str) -> None:
        links = 0
        for one in listings(directory, self._excluded, deep=True):
            self._add_files(one.files)
            self._links += one.linked
            self._add_unexamined(one.unexamined)
            links += one.links
        self._found.directories[directory] = links

    def _add_files(self, paths: list[str]) -> None:
        for path in paths:
            directory, slash, name = path.rpartition("/")
            self._files.setdefault(f"{self._real(directory or slash).rstrip('/')}/{name}", path)

    def _add_unexamined(self, unexamined: Iterable[Unexamined]) -> None:
        matches = self._excluded.matches
        self._found.unexamined += [
            one for one in unexamined if not matches(one.path, is_directory=one.is_directory)
        ]

    def found(self) -> Found:
        """All that was found."""
        found, missing = self._found, self._missing
        if missing and not self._any_exists and not found.unexamined:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ImageError(path=missing[0], problem=f"{_MISSING}{more}; {_REMEDY}")
        absent = [Unexamined(place, f"{_MISSING}; {_REMEDY}", absent=True) for place in missing]
        found.unexamined = in_order([*found.unexamined, *absent])
        for path in self._links:
            self._files.setdefault(os.path.realpath(path), path)
        found.files = sorted(self._files.values())
        roots = (*found.directories, *found.access.roots)
        found.access = found.access._replace(roots=roots, files=frozenset(found.named))
        return found


def in_order(unexamined: Iterable[Unexamined]) -> list[Unexamined]:
    """In order of their paths, each path once."""
    return sorted({one.path: one for one in unexamined}.values(), key=lambda one: one.path)


def overlays_of(paths: Iterable[str], unexamined: list[Unexamined]) -> list[Named]:
    """The overlays among ``paths``, in their order; a file under two names once.

    What cannot be examined is added to ``unexamined``.
    """
    found: dict[Identity, Named] = {}
    for path in paths:
        one = examined(path)
        if isinstance(one, Unexamined):
            unexamined.append(one)
        elif one is not None:
            found.setdefault(one.identity, one)
    return without_backups(found.values())


def without_backups(found: Iterable[Named]) -> list[Named]:
    """``found`` without the backups that a repair keeps beside overlays: they are no images."""
    by_path = {one.path: one for one in found}

    def is_backup(one: Named) -> bool:
        original = by_path.get(BACKUP.sub("", one.path)) if BACKUP.search(one.path) else None
        return original is not None and original.image == one.image

    return [one for one in by_path.values() if not is_backup(one)]


def reasons_for_nothing(found: Found, listed: Collection[str]) -> Iterator[str]:
    """Why places have no overlays but ``listed``, a line each."""
    known = {*listed, *(one.path for one in found.unexamined)}
    others = [path for path in dict.fromkeys(found.named) if path not in known]
    if others:
        identities = set(map(identity_at, known))
        others = [path for path in others if identity_at(path) not in identities]
    if len(others) == 1:
        yield f"{others[0]}: not an add-cow file"
    elif others:
        more = f" and {len(others) - EXAMPLES} more" if len(others) > EXAMPLES else ""
        yield f"{', '.join(others[:EXAMPLES])}{more}: not add-cow files"
    if not listed and not found.unexamined:
        for directory, links in found.directories.items():
            left_out = _NOT_FOLLOWED.get(links, _MANY).format(links)
            yield f"{directory}: no add-cow overlay there{left_out}"


_NOT_FOLLOWED = {0: "", 1: "; 1 symbolic link to a directory is not followed"}
_MANY = "; {} symbolic links to directories are not followed"
