"""The members of a farm: every overlay in a set of places, and what each one stands on.

What cannot be examined stays in the list with the reason: nothing is left out because nobody
could look. Headers, bitmaps and lengths are all that is read.

Who backs whom is told by inode, so that a name says nothing. *Depth* counts the overlays below
an image, down to a raw file or to nothing; a chain that bites its tail has none.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import ABSENT, Identity, Named
from addcow_mp.errors import AddcowError, FileError, FormatError
from addcow_mp.farm.places import Found, files_of, overlays_of
from addcow_mp.jobs.info import Info, info


@dataclass(frozen=True)
class Member:
    """One overlay of the farm. ``about`` is None where ``problem`` says why it is unknown."""

    named: Named
    about: Info | None
    problem: AddcowError | None
    depth: int | None = None

    @property
    def filename(self) -> str:
        """The path that it was found under."""
        return self.named.path

    @property
    def state(self) -> str:
        """In a word, what can be said of it without its content."""
        if self.problem is not None:
            return _state_of(self.problem)
        about = self.about
        if about is None or about.names.backing is None or about.header.all_allocated:
            return "standalone"
        if self.named.backing is None:
            return "missing-backing"
        return "overlay" if self.depth is not None else "cycle"

    @property
    def is_hidden(self) -> bool:
        """Whether the system did not let us look at a file of it."""
        return self.state == "unexamined" and isinstance(self.problem, FileError)

    @property
    def local_size(self) -> int | None:
        """Bytes of the guest's disk that are local, the partial last cluster as a whole one."""
        if self.about is None or self.about.allocated_clusters is None:
            return None
        return self.about.allocated_clusters * self.about.header.cluster_size

    @property
    def percent_local(self) -> float | None:
        """The part of its clusters that is local."""
        about = self.about
        if about is None or about.allocated_clusters is None or not about.total_clusters:
            return None
        return 100 * about.allocated_clusters / about.total_clusters


def _state_of(problem: AddcowError) -> str:
    if isinstance(problem, FormatError):
        return "damaged"
    missing = problem.fields.get("errno") in (errno.ENOENT, errno.ENOTDIR)
    return "missing-image" if missing else "unexamined"


def members(places: Iterable[str], access: Access | None = None) -> tuple[list[Member], Found]:
    """The overlays in ``places``, in order of their paths, and what else was found there.

    Names inside images may lead beneath any directory among ``places`` as well. Raises
    :class:`ImageError` when none of the places is there.
    """
    found = files_of(places, access or Access())
    return members_of(found), found


def members_of(found: Found) -> list[Member]:
    """The overlays among the files that were found, in their order; one under two names once.

    Files that cannot be read join what could not be looked at.
    """
    access, named = found.access, overlays_of(found.files, found.unexamined)
    depths = _depths({one.identity: one for one in named})
    return [_member(one, depths[one.identity], access) for one in named]


def _member(named: Named, depth: int | None, access: Access) -> Member:
    try:
        return Member(named, info(named.path, access), _hidden_backing(named), depth)
    except AddcowError as error:
        return Member(named, None, error.without_traceback(), depth)


def _hidden_backing(named: Named) -> FileError | None:
    """Why the backing file cannot be looked at; None when it can, or is not there."""
    if named.backing is None and named.backing_path is not None:
        try:
            os.stat(named.backing_path)
        except OSError as error:
            if error.errno not in ABSENT:
                return FileError.of(named.backing_path, "look at it", error)
        except ValueError:
            return None
    return None


def _depths(found: dict[Identity, Named]) -> dict[Identity, int | None]:
    """How many overlays lie below each; None where they come back to one of themselves."""
    depths: dict[Identity, int | None] = {}
    for one in found.values():
        way: dict[Identity, Named] = {}
        here: Named | None = one
        # Down to what is known: each overlay is passed once, however long its chain.
        while here is not None and here.identity not in depths and here.identity not in way:
            way[here.identity] = here
            here = found.get(here.backing) if here.backing else None
        depth = -1 if here is None else depths.get(here.identity)
        for identity in reversed(way):
            depth = None if depth is None else depth + 1
            depths[identity] = depth
    return depths
