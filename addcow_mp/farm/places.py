"""Places: where a farm's files are looked for.

A place is a directory, walked to its ends without following links to directories, a file, or a
pattern for them. Overlays are known by their content, never by a suffix. Each file counts once,
whichever path leads to it: it is shown under its own name where that is among the places, else
under the first link to it. Names inside images may lead beneath any directory among the places,
and so may links that are found there: only a file that is a place itself may be a link that leads
elsewhere.

What could not be looked at is part of what was found, with the reason, as is a place that is not
there; only where there is no place at all, there is nothing to be done.
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
from addcow_mp.device.exclusions import Exclusions, exclusions
from addcow_mp.device.files import identity_at, kind_of
from addcow_mp.errors import ImageError

#: Files that are told by their names, where there are more.
EXAMPLES = 3


@dataclass
class Found:
    """The files in places, in order, and how what they name may be opened.

    ``named``: files that are places themselves. ``directories``: those that are, with the number
    of links to directories in each that were not followed. ``unexamined``: what could not be
    looked at.
    """

    access: Access
    files: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    directories: dict[str, int] = field(default_factory=dict)
    unexamined: list[Unexamined] = field(default_factory=list)


def files_of(places: Iterable[str], access: Access) -> Found:
    """The files in ``places``, and ``access`` with the directories among them as roots.

    Raises :class:`ImageError` when none of them is there.
    """
    looking = _Looking(access)
    for place in places:
        looking.look_for(place)
    return looking.end()


class _Looking:
    """Places that are being looked through."""

    def __init__(self, access: Access) -> None:
        self._excluded: Exclusions = exclusions(access.exclude)
        self._found = Found(access)
        #: Each file, where it really lies, and how it is shown.
        self._files: dict[str, str] = {}
        self._links: list[str] = []
        self._missing: list[str] = []
        self._met = False
        #: Not for longer than one search: links and the working directory may change.
        self._real = lru_cache(maxsize=1024)(os.path.realpath)

    def look_for(self, place: str) -> None:
        """Look at a place, and at all that it fits where it is a pattern."""
        try:
            os.lstat(place)
        except (OSError, ValueError) as error:
            one = Unexamined.of(place, error)
            if one.absent:
                self._look_for_pattern(place)
            else:
                self._add([one])
        else:
            self._look_at(place)

    def _look_for_pattern(self, pattern: str) -> None:
        hidden: list[Unexamined] = []
        paths = matching_paths(pattern, hidden)
        self._add(hidden)
        for path in paths:
            self._look_at(path)
        if not paths and not hidden:
            self._missing.append(pattern)

    def _look_at(self, path: str) -> None:
        self._met = True
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            self._add([Unexamined.of(path, error)])
            return
        if self._excluded.matches(path, is_directory=stat.S_ISDIR(mode)):
            return
        if stat.S_ISDIR(mode):
            self._walk(path)
        elif stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            self._found.named.append(path)
            self._enter([path] if not os.path.islink(path) else [])
            self._links += [path] if os.path.islink(path) else []
        else:
            self._add([Unexamined(path, f"it is {kind_of(mode)}, not a regular file")])

    def _walk(self, directory: str) -> None:
        links = 0
        for one in listings(directory, self._excluded, deep=True):
            self._enter(one.files)
            self._links += one.linked
            self._add(one.unexamined)
            links += one.links
        self._found.directories[directory] = links

    def _enter(self, paths: list[str]) -> None:
        for path in paths:
            directory, slash, name = path.rpartition("/")
            self._files.setdefault(f"{self._real(directory or slash).rstrip('/')}/{name}", path)

    def _add(self, unexamined: Iterable[Unexamined]) -> None:
        left = (
            one
            for one in unexamined
            if not self._excluded.matches(one.path, is_directory=one.is_directory)
        )
        self._found.unexamined += left

    def end(self) -> Found:
        """What was found."""
        found, missing = self._found, self._missing
        if missing and not self._met and not found.unexamined:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ImageError(path=missing[0], problem=f"{_MISSING}{more}; {_MEND}")
        found.unexamined += [
            Unexamined(place, f"{_MISSING}; {_MEND}", absent=True) for place in missing
        ]
        found.unexamined = in_order(found.unexamined)
        for path in self._links:
            self._files.setdefault(os.path.realpath(path), path)
        found.files = sorted(self._files.values())
        roots = (*found.directories, *found.access.roots)
        found.access = found.access._replace(roots=roots, files=frozenset(found.named))
        return found


_MISSING, _MEND = "no such file or directory", "name another place"


def in_order(unexamined: Iterable[Unexamined]) -> list[Unexamined]:
    """By their paths, each once."""
    return sorted({one.path: one for one in unexamined}.values(), key=lambda one: one.path)


# Overlays


def overlays_of(paths: Iterable[str], unexamined: list[Unexamined]) -> list[Named]:
    """Those of ``paths``, in their order, that are overlays; a file under two names once.

    What could not be looked at goes to ``unexamined``.
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
    """``found`` without what a repair kept of an overlay beside it: that is no image of its own."""
    by_path = {one.path: one for one in found}
    return [one for one in by_path.values() if not _is_backup(one, by_path)]


def _is_backup(one: Named, by_path: dict[str, Named]) -> bool:
    if not BACKUP.search(one.path):
        return False
    original = by_path.get(BACKUP.sub("", one.path))
    return original is not None and original.image == one.image


# Why there is nothing


def reasons_for_nothing(found: Found, listed: Collection[str]) -> Iterator[str]:
    """Why places list no overlay, where ``listed`` are those that are listed."""
    yield from _no_overlays(found, listed)
    if not listed and not found.unexamined:
        for directory, links in found.directories.items():
            told = f"{directory}: no add-cow overlay there"
            yield f"{told}; {_not_followed(links)}" if links else told


def _not_followed(links: int) -> str:
    if links == 1:
        return "1 symbolic link to a directory is not followed"
    return f"{links} symbolic links to directories are not followed"


def _no_overlays(found: Found, listed: Collection[str]) -> Iterator[str]:
    """The files that were named and are none, in one line."""
    known = {*listed, *(one.path for one in found.unexamined)}
    others = [path for path in dict.fromkeys(found.named) if path not in known]
    if others:
        identities = {identity_at(path) for path in known}
        others = [path for path in others if identity_at(path) not in identities]
    if len(others) == 1:
        yield f"{others[0]}: not an add-cow file"
    elif others:
        more = f" and {len(others) - EXAMPLES} more" if len(others) > EXAMPLES else ""
        yield f"{', '.join(others[:EXAMPLES])}{more}: not add-cow files"
