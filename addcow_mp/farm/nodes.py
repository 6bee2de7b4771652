"""The files of a farm as nodes of a graph: their kinds, marks and names."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from addcow_mp.farm.graph import Key
from addcow_mp.farm.members import Member
from addcow_mp.format.names import path_combine, path_has_protocol


class NodeKind(StrEnum):
    """What a node is: an overlay in the places, or another file."""

    OVERLAY = "overlay"
    BACKING = "backing"
    MISSING = "missing"
    NOT_EXAMINED = "not-examined"
    UNNAMED = "unnamed"


class Mark(StrEnum):
    """A property of a node that the user should know, the worst first."""

    DAMAGED = "damaged"
    UNEXAMINED = "unexamined"
    MISSING_IMAGE = "missing-image"
    MISSING_BACKING = "missing-backing"
    CYCLE = "cycle"
    SHARED_IMAGE = "shared-image"
    BASE_CHANGED = "base-changed"
    NOT_EXAMINED = "not-examined"
    UNNAMED = "unnamed"


class HeaderNames(NamedTuple):
    """The files that the header of an overlay names, as far as it can be read.

    ``base``: the path that the names are relative to.
    """

    image: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    all_allocated: bool = False
    base: str = ""

    @property
    def full_image(self) -> str | None:
        """The path of the image file, relative to the working directory."""
        return self._full(self.image)

    @property
    def full_backing(self) -> str | None:
        """The path of the backing file, relative to the working directory."""
        return self._full(self.backing)

    def _full(self, name: str | None) -> str | None:
        return name if name is None or path_has_protocol(name) else path_combine(self.base, name)


@dataclass(frozen=True, eq=False)
class Node:
    """A file. ``member`` and ``names`` are known of overlays, also outside of the places.

    ``image``, ``backing``: the files that its guest reads. ``written``: the modification time of
    the newest of its files, in nanoseconds. ``problem``: why it is not examined. ``is_hidden``: the
    system refused access to it.
    """

    path: str
    kind: NodeKind
    identity: Key
    image: Key | None = None
    backing: Key | None = None
    format: str | None = None
    virtual_size: int | None = None
    member: Member | None = None
    names: HeaderNames = field(default_factory=HeaderNames)
    written: int | None = None
    problem: str | None = None
    is_hidden: bool = False
    marks: tuple[Mark, ...] = ()
