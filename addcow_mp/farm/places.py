"""Places: where a farm's files are looked for.

A place is a directory, walked to its ends without following links to directories, a file, or a
pattern for them. Overlays are known by their content, never by a suffix. Each file counts once,
whichever path leads to it: it is shown under its own name where that is among the places, else
under the first link to it. Names inside images may lead beneath any directory among the places,
and so may links that are found there: only a file that is a place itself may be a link that leads
elsewhere.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache

from addcow_mp.device.access import Access
from addcow_mp.errors import ImageError
from addcow_mp.jobs.dependants import BACKUP, Identity, Named, files_in, named_by


def files_of(places: Iterable[str], access: Access) -> tuple[list[str], Access]:
    """The files in ``places``, in order, and ``access`` with those directories as roots.

    Raises :class:`ImageError` when a place is not there or cannot be read.
    """
    paths = list(_expanded(places))
    roots = tuple(path for path in paths if os.path.isdir(path))
    files = frozenset(paths).difference(roots)
    return sorted(_each_once(paths)), access._replace(roots=(*roots, *access.roots), files=files)


def _expanded(places: Iterable[str]) -> Iterator[str]:
    """Each place, and for a pattern all that it fits."""
    for place in places:
        fitting = [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True))
        if not fitting:
            raise ImageError(path=place, problem="no such file or directory; name another place")
        yield from fitting


def _each_once(paths: Iterable[str]) -> list[str]:
    """Each file in ``paths`` once; a link only where its file is not there under its own name."""
    real_directory = lru_cache(maxsize=1024)(os.path.realpath)
    found: dict[str, str] = {}
    links = []
    for path, is_link in _files(paths):
        if is_link:
            links.append(path)
        else:
            directory, name = os.path.split(path)
            found.setdefault(os.path.join(real_directory(directory), name), path)
    for path in links:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _files(paths: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The files in ``paths``, and whether each is a symbolic link."""
    for path in paths:
        if os.path.isdir(path):
            for entry in files_in(path, deep=True):
                yield entry.path, entry.is_symlink()
        else:
            yield path, os.path.islink(path)


def overlays_of(paths: Iterable[str]) -> list[Named]:
    """Those of ``paths``, in their order, that are overlays; a file under two names once."""
    found: dict[Identity, Named] = {}
    for path in paths:
        one = named_by(path)
        if one is not None:
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
