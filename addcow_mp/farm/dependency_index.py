"""The dependency index: the overlays around the files of a farm, kept up to date while jobs run.

A job on one image searches the directories of its files, and beneath the roots, for other overlays
that need what it changes. For a farm this search is done once, and each job is given the overlays
that name one of its files. Jobs on a farm may take hours, so a directory whose modification time
has changed is searched again: an overlay that is created meanwhile counts.

What cannot be read prevents the same jobs that it prevents for a single image: those whose own
files are in that directory, and, beneath a root, those that change what other overlays may need.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import (
    Identity,
    Named,
    NearbyOverlays,
    Unexamined,
    examined_user,
    listing,
    named_by,
)
from addcow_mp.device.exclusions import exclusions
from addcow_mp.farm.graph import Graph
from addcow_mp.farm.places import in_order, without_backups

#: A job is given no more overlays: one is enough for a refusal, these are for its message.
MOST_LISTED = 8


#: Seconds between searches for overlays that are created meanwhile.
REFRESH_SECONDS = 1.0


class DependencyIndex:
    """All overlays in ``paths``, in the directories of the files they name, and beneath roots.

    ``farm``: the overlays among ``paths``, in that order, each file once. ``unexamined``: those of
    ``paths`` that could not be examined.
    """

    def __init__(self, paths: Iterable[str], access: Access) -> None:
        self.graph: Graph[Named] = Graph()
        self._roots = tuple(f"{os.path.realpath(root).rstrip('/')}/" for root in access.roots)
        self._excluded = exclusions(access.exclude)
        self._meanings: set[tuple[Identity | None, ...]] = set()
        #: What could not be read, by its path without links.
        self._unread: dict[str, Unexamined] = {}
        #: Files that were examined, by their paths without links in directories.
        self._known: set[str] = set()
        self._real = lru_cache(maxsize=None)(os.path.realpath)
        #: The modification time of each directory when it was searched.
        self._changed: dict[str, int] = {}
        self._deep: set[str] = set()
        unexamined = [self._examine(path) for path in paths]
        self.farm = without_backups(one for one in self.graph.nodes.values() if one.is_overlay)
        self.unexamined = in_order(filter(None, unexamined))
        for root in self._roots:
            self._search(root.rstrip("/") or "/", deep=True)
        for directory in sorted(set(self._directories())):
            self._search(directory, deep=directory in self._deep)

    def around(
        self, named: Named, *, as_backing: bool, leaving: Collection[Identity] = ()
    ) -> NearbyOverlays:
        """The overlays that name a file of ``named``: those that a job on it would find.

        ``as_backing``: its backing file is changed too, not only its own files. ``leaving``:
        overlays that are removed before the job begins.
        """
        below = self.graph.below(named) if as_backing else None
        others = (named.backing, None if below is None else below.image)
        changed = (named.image, *(others if as_backing else (named.identity,)))
        files = {file for file in changed if file is not None}
        found = {id(one): one for file in files for one in self.graph.users(file)}
        users = [one for one in found.values() if one is not named and one.identity not in leaving]
        # A shared image file is always refused: its owners are listed first.
        listed = sorted(users, key=lambda one: one.image not in files)[:MOST_LISTED]
        more = len(users) - len(listed)
        if not self._unread:
            return NearbyOverlays(tuple(listed), more)
        paths = [named.path, named.image_path]
        paths += [named.backing_path] if as_backing else []
        paths += [] if below is None else [below.image_path]
        own = {directory for path in paths if path for directory in self._directories_of(path)}
        return NearbyOverlays(tuple(listed), more, *self._unread_around(own))

    def _unread_around(
        self, own: Collection[str]
    ) -> tuple[tuple[Unexamined, ...], tuple[Unexamined, ...]]:
        """What could not be read: one thing in the directories ``own``, one beneath a root."""
        near: list[Unexamined] = []
        hidden: list[Unexamined] = []
        for path, one in self._unread.items():
            if (path if one.is_directory else os.path.dirname(path)) in own:
                near = near or [one]
            elif _is_beneath(path, self._roots):
                hidden = hidden or [one]
        return tuple(near), tuple(hidden)

    def refresh(self) -> None:
        """Search the directories again that have changed."""
        for directory, changed in list(self._changed.items()):
            try:
                is_same = os.stat(directory).st_mtime_ns == changed
            except OSError:
                is_same = True  # it no longer exists, nor do the overlays in it
            if not is_same:
                del self._changed[directory]
                self._forget_unread(directory)
                self._search(directory, deep=directory in self._deep)

    def _forget_unread(self, directory: str) -> None:
        """Let the files in ``directory`` be examined again that could not be read."""
        for path, one in list(self._unread.items()):
            if os.path.dirname(path) == directory and not one.is_directory:
                del self._unread[path]
                self._known.discard(path)

    # Directories

    def _directories(self) -> Iterator[str]:
        """The directories of all files of the chains, as far as names may lead."""
        waiting = [(one, self._real(os.path.dirname(one.base or one.path))) for one in self.farm]
        followed = {one.identity for one in self.farm}
        while waiting:
            one, top = waiting.pop()
            allowed = (f"{top.rstrip('/')}/", *self._roots)
            for path in filter(None, (one.path, one.image_path, one.backing_path)):
                yield from (
                    each for each in self._directories_of(path) if _is_beneath(each, allowed)
                )
            below = one.backing_path
            if below is not None and one.backing is not None and one.backing not in followed:
                followed.add(one.backing)
                if _is_beneath(os.path.dirname(os.path.realpath(below)), allowed):
                    named = named_by(below)
                    waiting += [] if named is None else [(named, top)]

    def _directories_of(self, path: str) -> list[str]:
        """The directory of ``path``, and for a link also the directory of its target."""
        target = [os.path.dirname(os.path.realpath(path))] if os.path.islink(path) else []
        head, slash, _ = path.rpartition("/")
        return [self._real(head or slash), *target]

    def _search(self, directory: str, *, deep: bool) -> None:
        """Examine the files in ``directory``, with ``deep`` also in all directories below."""
        waiting = [directory]
        while waiting:
            here = waiting.pop()
            if here in self._changed:
                continue
            found = listing(here, self._excluded)
            if found.changed is not None:
                self._changed[here] = found.changed
            for one in found.unexamined:
                self._add_unread(one.path, one)
            for path in (*found.files, *found.linked):
                self._examine(path)
            if deep:
                self._deep.add(here)
                waiting += found.directories

    # Files

    def _examine(self, path: str) -> Unexamined | None:
        """Add the overlay or qcow2 file at ``path``, once; returns why it cannot be read."""
        head, slash, name = path.rpartition("/")
        real = f"{self._real(head or slash)}/{name}"
        if real in self._known:
            return self._unread.get(real)
        self._known.add(real)
        one = examined_user(path)
        if isinstance(one, Unexamined):
            self._add_unread(real, one)
            return one
        if one is not None:
            self._add(one)
        return None

    def _add_unread(self, real: str, one: Unexamined) -> None:
        if one.may_hide_overlay:
            self._unread[real] = one

    def _add(self, one: Named) -> None:
        if one.meaning not in self._meanings:
            self._meanings.add(one.meaning)
            self.graph.add(one)


def _is_beneath(path: str, roots: Collection[str]) -> bool:
    """Whether ``path`` is one of ``roots``, which end with a slash, or beneath one."""
    return f"{path.rstrip('/')}/".startswith(tuple(roots))
