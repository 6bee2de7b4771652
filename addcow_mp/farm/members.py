"""The members of a farm: every overlay in a set of places, and what each one stands on.

What cannot be examined stays in the list with the reason: nothing is left out because nobody
could look. Headers, bitmaps and lengths are all that is read.

Who backs whom is told by inode, so that a name says nothing. *Depth* counts the overlays below
an image, down to a raw file or to nothing; a chain that bites its tail has none.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from addcow_mp.device.access import Access
from addcow_mp.errors import AddcowError, FormatError
from addcow_mp.farm.places import files_of, overlays_of
from addcow_mp.jobs.dependants import Identity, Named
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


def members(places: Iterable[str], access: Access | None = None) -> list[Member]:
    """The overlays in ``places``, in order of their paths.

    Names inside images may lead beneath any directory among ``places`` as well. Raises
    :class:`ImageError` when a place is not there or cannot be read.
    """
    return members_of(*files_of(places, access or Access()))


def members_of(paths: Iterable[str], access: Access) -> list[Member]:
    """Those of ``paths``, in their order, that are overlays; a file under two names once."""
    named = overlays_of(paths)
    depths = _depths({one.identity: one for one in named})
    return [_member(one, depths[one.identity], access) for one in named]


def _member(named: Named, depth: int | None, access: Access) -> Member:
    try:
        about, problem = info(named.path, access), None
    except AddcowError as error:
        about, problem = None, error.kept()
    return Member(named, about, problem, depth)


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
