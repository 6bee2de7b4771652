"""The marks of the nodes of a farm.

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

from addcow_mp.farm.graph import Graph, Key
from addcow_mp.farm.nodes import Mark, Node, NodeKind


def marks_of(node: Node, graph: Graph[Node], depths: Container[Key]) -> tuple[Mark, ...]:
    """The marks of ``node``, the worst first; ``depths`` has the nodes outside of cycles."""
    state = None if node.member is None else node.member.state
    below = graph.below(node)
    in_cycle = node.identity not in depths
    applies = {
        Mark.DAMAGED: state == Mark.DAMAGED,
        Mark.UNEXAMINED: state == Mark.UNEXAMINED or node.is_hidden,
        Mark.MISSING_IMAGE: state == Mark.MISSING_IMAGE,
        Mark.MISSING_BACKING: NodeKind.MISSING in (node.kind, below and below.kind),
        Mark.CYCLE: in_cycle,
        Mark.SHARED_IMAGE: node.image is not None and len(graph.owners[node.image]) > 1,
        Mark.BASE_CHANGED: not in_cycle and below is not None and _base_changed(node, below),
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
