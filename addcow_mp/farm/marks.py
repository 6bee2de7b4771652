"""The files of a farm as nodes of a graph, and their marks.

*base-changed* means that data was written to the backing file after the last write to the overlay:
the modification time of the backing file is later than those of the overlay's ``.add-cow`` and
image file. The guest may then see a mixture of old clusters of its own and new ones of the backing
file. If the backing file is an overlay, the newer of its two files counts.

A job moves data without changing what overlays read. So a backing overlay without an allocated
cluster was committed and one with ALL_ALLOCATED was flattened, and neither is a change. An overlay
with ALL_ALLOCATED reads no backing file. In a cycle no file can be read.

Only the backing file directly below is compared: the mark names the overlay where the change takes
effect. The mark is a hint and no proof: copying a file and ``touch`` also set modification times.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum

from addcow_mp.farm.graph import Graph, Key
from addcow_mp.farm.members import Member


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
    FOREIGN_TWIN = "foreign-twin"
    OTHER_DATA_FILE = "other-data-file"
    BASE_CHANGED = "base-changed"
    LENT = "lent"
    LENT_FOR_READING = "lent-for-reading"
    NOT_EXAMINED = "not-examined"
    UNNAMED = "unnamed"


@dataclass(frozen=True, eq=False)
class Node:
    """A file. ``member`` is known of overlays, also outside of the places.

    ``image``, ``backing``: the files that its guest reads. ``written``: the modification time of
    the newest of its files, in nanoseconds. ``problem``: why it is not examined. ``is_hidden``: the
    system refused access to it. ``has_foreign_twin``: it is not lent, and QEMU may write its image
    file through a twin. ``names_other``: its twin names a data file that is not its image file.
    """

    path: str
    kind: NodeKind
    identity: Key
    image: Key | None = None
    backing: Key | None = None
    format: str | None = None
    virtual_size: int | None = None
    member: Member | None = None
    written: int | None = None
    problem: str | None = None
    is_hidden: bool = False
    has_foreign_twin: bool = False
    names_other: bool = False
    marks: tuple[Mark, ...] = ()

    @property
    def lent_id(self) -> int | None:
        """The id of the lending of an overlay that is lent."""
        about = None if self.member is None else self.member.about
        return None if about is None else about.header.lent_id

    @property
    def state(self) -> str | None:
        """The state of an overlay."""
        return None if self.member is None else self.member.state


def marks_of(node: Node, graph: Graph[Node], depths: Container[Key]) -> tuple[Mark, ...]:
    """The marks of ``node``, the worst first; ``depths`` has the nodes outside of cycles."""
    below = graph.below(node)
    in_cycle = node.identity not in depths
    applies = {
        Mark.DAMAGED: node.state == Mark.DAMAGED,
        Mark.UNEXAMINED: node.state == Mark.UNEXAMINED or node.is_hidden,
        Mark.MISSING_IMAGE: node.state == Mark.MISSING_IMAGE,
        Mark.MISSING_BACKING: NodeKind.MISSING in (node.kind, below and below.kind),
        Mark.CYCLE: in_cycle,
        Mark.SHARED_IMAGE: node.image is not None and len(graph.owners[node.image]) > 1,
        Mark.FOREIGN_TWIN: node.has_foreign_twin,
        Mark.OTHER_DATA_FILE: node.names_other,
        Mark.BASE_CHANGED: not in_cycle and below is not None and _base_changed(node, below),
        Mark.LENT: node.state == Mark.LENT,
        Mark.LENT_FOR_READING: node.state == Mark.LENT_FOR_READING,
        Mark.NOT_EXAMINED: node.problem is not None,
        Mark.UNNAMED: node.kind is NodeKind.UNNAMED,
    }
    return tuple(mark for mark in Mark if applies[mark])


def _base_changed(node: Node, below: Node) -> bool:
    """Whether ``below`` holds data that is newer than ``node``."""
    if below.written is None or node.written is None:
        return False
    is_known = node.member is not None and node.member.about is not None
    return is_known and _holds_data(below) and below.written > node.written


def _holds_data(below: Node) -> bool:
    """Whether the last write to ``below`` was a guest's data and not a commit or a flatten."""
    if below.member is None:
        return True
    about = below.member.about
    return about is not None and bool(about.allocated_clusters) and not about.header.all_allocated
