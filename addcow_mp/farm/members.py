"""The members of a farm: every overlay in the places, and what it stands on.

An overlay that cannot be examined stays in the list with the reason. Only headers, bitmaps and
lengths are read. Backing files are identified by inode, never by name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import ABSENT, Named
from addcow_mp.errors import AddcowError, FileError, FormatError
from addcow_mp.farm.graph import Graph
from addcow_mp.farm.places import Found, files_of, overlays_of
from addcow_mp.jobs.info import Info, info


@dataclass(frozen=True)
class Member:
    """One overlay. ``about`` is None where ``problem`` says why it cannot be examined.

    ``depth``: the number of overlays below it; None in a cycle or above one.
    """

    named: Named
    about: Info | None
    problem: AddcowError | None
    depth: int | None = None

    @property
    def filename(self) -> str:
        """The path under which it was found."""
        return self.named.path

    @property
    def state(self) -> str:
        """Its state in one word, without reading its content."""
        if self.problem is not None:
            return _state_of(self.problem)
        about = self.about
        if about is not None and about.header.lent_id is not None:
            return "lent" if about.header.lent else "lent-for-reading"
        if about is None or about.names.backing is None or about.header.all_allocated:
            return "standalone"
        if self.named.backing is None:
            return "missing-backing"
        return "overlay" if self.depth is not None else "cycle"

    @property
    def is_hidden(self) -> bool:
        """Whether the system refused access to one of its files."""
        return self.state == "unexamined" and isinstance(self.problem, FileError)

    @property
    def allocated_size(self) -> int | None:
        """Bytes in allocated clusters; a partial last cluster counts as a whole one."""
        return None if self.about is None else self.about.allocated_size

    @property
    def percent_allocated(self) -> float | None:
        """The share of its clusters that is allocated."""
        about = self.about
        if about is None or about.allocated_clusters is None or not about.total_clusters:
            return None
        return 100 * about.allocated_clusters / about.total_clusters


def _state_of(problem: AddcowError) -> str:
    if isinstance(problem, FormatError):
        return "damaged"
    missing = problem.fields.get("errno") in (errno.ENOENT, errno.ENOTDIR)
    return "missing-image" if missing else "unexamined"


@dataclass(frozen=True)
class Members:
    """The overlays in ``places``, in order of their paths."""

    exit_statuses: ClassVar = {
        0: "every file was examined",
        1: "a file or place could not be examined, or the given files are no overlays",
    }

    overlays: list[Member]
    places: Found

    @property
    def exit_code(self) -> int:
        """1 if a file could not be examined, or if the given files are no overlays."""
        hidden = any(one.is_hidden for one in self.overlays) or self.places.unexamined
        return int(bool(hidden or (self.places.named and not self.overlays)))


def members(places: Iterable[str], access: Access | None = None) -> Members:
    """The members of a farm.

    Names inside images may also lead beneath the directories among ``places``. Raises
    :class:`ImageError` when none of the places exists.
    """
    found = files_of(places, access or Access())
    return Members(members_of(found), found)


def members_of(found: Found) -> list[Member]:
    """The overlays among the files that were found, in order; one under two names once.

    Files that cannot be read are added to the unexamined ones.
    """
    overlays = overlays_of(found.files, found.unexamined)
    depths = Graph(overlays).depths()
    return [_member(one, depths.get(one.identity), found.access) for one in overlays]


def _member(named: Named, depth: int | None, access: Access) -> Member:
    try:
        return Member(named, info(named.path, access), _hidden_backing(named), depth)
    except AddcowError as error:
        return Member(named, None, error.without_traceback(), depth)


def _hidden_backing(named: Named) -> FileError | None:
    """Why the backing file cannot be examined; None if it can be, or does not exist."""
    if named.backing is None and named.backing_path is not None:
        try:
            os.stat(named.backing_path)
        except OSError as error:
            if error.errno not in ABSENT:
                return FileError.of(named.backing_path, "look at it", error)
        except ValueError:
            return None
    return None
