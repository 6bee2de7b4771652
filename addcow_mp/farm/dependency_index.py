"""Neighbours: the overlays around the files of a farm, kept up to date while the farm is changed.

A job on one image looks through the directories of its files, and beneath the roots, for other
overlays that need what it will change. For ten thousand images that would be done ten thousand
times: here it is done once, and each job is handed those overlays that name a file of its own.
A farm's jobs may take hours. A directory whose time of change is another than when it was looked
through is looked through again, so that an overlay that somebody creates meanwhile counts.

What cannot be read bars the jobs that it would bar alone, and no others: those whose own files lie
in that directory, and, beneath a root, those that change what other overlays may stand on.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import partial

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import (
    Identity,
    Named,
    NearbyOverlays,
    Unexamined,
    examined,
    listing,
    named_by,
)
from addcow_mp.device.exclusions import exclusions
from addcow_mp.farm.places import in_order, without_backups

#: More that name one file are not handed on: one is enough for a refusal, these for its words.
MOST_TOLD = 8


class DependencyIndex:
    """All overlays in ``paths``, in the directories of the files they name, and beneath roots."""

    def __init__(self, paths: Iterable[str], access: Access) -> None:
        self._roots = tuple(map(os.path.realpath, access.roots))
        self._users: defaultdict[Identity, list[Named]] = defaultdict(list)
        self._overlays: dict[Identity, Named] = {}
        self._meanings: set[tuple[Identity | None, ...]] = set()
        #: What could not be looked at, by its path without links on the way.
        self._unread: dict[str, Unexamined] = {}
        self._excluded = exclusions(access.exclude)
        self._known: set[str] = set()
        self._homes: dict[str, str] = {}
        #: When each directory was changed last, as it was looked through.
        self._changed: dict[str, int] = {}
        self._deep: set[str] = set()
        hidden = [self._look_at(path) for path in paths]
        #: The overlays among ``paths``, in that order, each file once.
        self.farm = without_backups(self._overlays.values())
        #: Those of ``paths`` that could not be looked at.
        self.unexamined = in_order(filter(None, hidden))
        for root in self._roots:
            self._look_through(root, deep=True)
        for directory in sorted(set(self._directories())):
            self._look_through(directory, deep=directory in self._deep)

    def below(self, named: Named) -> Named | None:
        """The overlay that is the backing file of ``named``, if it is one."""
        return None if named.backing is None else self._overlays.get(named.backing)

    def around(
        self, named: Named, *, as_backing: bool, leaving: Collection[Identity] = ()
    ) -> NearbyOverlays:
        """The overlays that name a file of ``named``: those that a job on it would find.

        ``as_backing`` says that its backing file is changed too, not only its own files.
        ``leaving`` are overlays that will be gone by then.
        """
        below = self.below(named) if as_backing else None
        others = (named.backing, None if below is None else below.image)
        changed = (named.image, *(others if as_backing else (named.identity,)))
        files = {file for file in changed if file is not None}
        found = {id(one): one for file in files for one in self._users[file] if one is not named}
        users = {key: one for key, one in found.items() if one.identity not in leaving}
        # An image file that is shared is refused always: those who share one come first.
        told = sorted(users.values(), key=lambda one: one.image not in files)[:MOST_TOLD]
        paths = (named.image_path, *((named.backing_path,) if as_backing else ()))
        paths += (below.image_path,) if as_backing and below is not None else ()
        own = {home for path in (named.path, *paths) if path for home in self._homes_of(path)}
        return NearbyOverlays(tuple(told), len(users) - len(told), *self._unread_around(own))

    def _unread_around(
        self, own: Collection[str]
    ) -> tuple[tuple[Unexamined, ...], tuple[Unexamined, ...]]:
        """One that could not be looked at in the directories ``own``, and one beneath a root."""
        near: list[Unexamined] = []
        hidden: list[Unexamined] = []
        for path, one in self._unread.items():
            if (path if one.is_directory else os.path.dirname(path)) in own:
                near = near or [one]
            elif self._is_beneath_root(path):
                hidden = hidden or [one]
        return tuple(near), tuple(hidden)

    def _is_beneath_root(self, path: str) -> bool:
        return any(f"{path}/".startswith(root.rstrip("/") + "/") for root in self._roots)

    def drop_cached(self, named: Named) -> None:
        """Take note that an overlay is gone."""
        for file in filter(None, {named.image, named.backing}):
            self._users[file] = [one for one in self._users[file] if one is not named]

    def look_again(self) -> None:
        """Take note of overlays that are new in a directory that was changed."""
        for directory, changed in list(self._changed.items()):
            try:
                same = os.stat(directory).st_mtime_ns == changed
            except OSError:
                same = True  # it is gone, and what was in it: that can only do less harm
            if not same:
                del self._changed[directory]
                self._forget_unread(directory)
                self._look_through(directory, deep=directory in self._deep)

    def _forget_unread(self, directory: str) -> None:
        """Let the files there be read that could not be."""
        for path, one in list(self._unread.items()):
            if os.path.dirname(path) == directory and not one.is_directory:
                del self._unread[path]
                self._known.discard(path)

    # Directories

    def _directories(self) -> Iterator[str]:
        """Those of all files of the chains, as far down as names may lead."""
        waiting = [(one, self._home(one.base or one.path)) for one in self.farm]
        followed = {one.identity for one in self.farm}
        while waiting:
            one, top = waiting.pop()
            for path in (one.path, one.image_path, one.backing_path):
                if path is not None:
                    yield from filter(partial(self._may_lead, top), self._homes_of(path))
            below = one.backing_path
            if below is not None and one.backing is not None and one.backing not in followed:
                followed.add(one.backing)
                real = os.path.realpath(below)
                named = named_by(below) if self._may_lead(top, os.path.dirname(real)) else None
                waiting += [] if named is None else [(named, top)]

    def _homes_of(self, path: str) -> list[str]:
        """The directory of ``path``, and if that is a link also the one of the file itself."""
        real = [os.path.dirname(os.path.realpath(path))] if os.path.islink(path) else []
        return [self._home(path), *real]

    def _may_lead(self, top: str, directory: str) -> bool:
        """Whether names inside the overlay in ``top``, and below it, may lead to ``directory``."""
        here = directory.rstrip("/") + "/"
        return any(here.startswith(root.rstrip("/") + "/") for root in (top, *self._roots))

    def _home(self, path: str) -> str:
        """The directory of ``path`` without links on the way."""
        directory = os.path.dirname(path)
        home = self._homes.get(directory)
        if home is None:
            home = self._homes[directory] = os.path.realpath(directory)
        return home

    def _look_through(self, directory: str, *, deep: bool) -> None:
        waiting = [directory]
        while waiting:
            here = waiting.pop()
            if here not in self._changed:
                waiting += self._look_into(here, deep=deep)

    def _look_into(self, here: str, *, deep: bool) -> list[str]:
        """Look at the files of one directory; returns those below it if they count."""
        found = listing(here, self._excluded)
        if found.changed is not None:
            self._changed[here] = found.changed
        for one in found.unexamined:
            self._take_unread(one.path, one)
        for path in (*found.files, *found.linked):
            self._look_at(path)
        self._deep |= {here} if deep else set()
        return found.directories if deep else []

    def _take_unread(self, real: str, one: Unexamined) -> None:
        if one.may_hide_overlay:
            self._unread[real] = one

    # Files

    def _look_at(self, path: str) -> Unexamined | None:
        """Take note of the file at ``path``, once; it is returned if it cannot be looked at."""
        real = f"{self._home(path)}/{os.path.basename(path)}"
        if real in self._known:
            return self._unread.get(real)
        self._known.add(real)
        one = examined(path)
        if isinstance(one, Unexamined):
            self._take_unread(real, one)
            return one
        if one is not None:
            self._enter(one)
        return None

    def _enter(self, one: Named) -> None:
        """Take note of an overlay."""
        if one.meaning not in self._meanings:
            self._meanings.add(one.meaning)
            self._overlays.setdefault(one.identity, one)
            for file in filter(None, {one.image, one.backing}):
                self._users[file].append(one)
