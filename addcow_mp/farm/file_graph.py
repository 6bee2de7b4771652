"""The graph of all files of a farm: overlays, what they stand on, and files that no overlay names.

Nodes are the overlays in the places, every backing file that one of them names, wherever it is and
also if it is missing, and all other regular files in the places. A missing file is identified by
its resolved name. Image files have no nodes: they belong to their overlays. An overlay with
ALL_ALLOCATED reads no backing file, so it stands alone, although its header may name one.

An overlay has one backing file, so the graph is a forest. Its roots are the files without a backing
file. A cycle has no root: the first of its overlays, by path, is drawn as one. A file is *unnamed*
only if every file that could name it was examined; otherwise it is *not examined*. Backing overlays
outside of the places are followed as far as names may lead (:mod:`addcow_mp.device.access`).

Nothing is changed or checked: the farm check does that.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity, Named, is_gone, named_in
from addcow_mp.device.files import identity_at, identity_of
from addcow_mp.device.manifest_file import described_by
from addcow_mp.device.twin import other_data_file, twin_header
from addcow_mp.errors import AddcowError
from addcow_mp.farm.graph import Graph, Key
from addcow_mp.farm.marks import Mark, Node, NodeKind, marks_of
from addcow_mp.farm.members import Member, members_of
from addcow_mp.farm.places import Found, files_of, in_order
from addcow_mp.format.geometry import raw_size
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.format.qcow2 import Header
from addcow_mp.format.qcow2 import Mark as TwinMark
from addcow_mp.jobs.info import info

#: Errors that say that there is no file, and not that access to it is refused.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

_MAY_BE_NAMED = "what could not be examined may name it"


class Row(NamedTuple):
    """A row of the forest.

    ``is_last``: no sibling follows. ``again``: here a cycle comes back to ``node``.
    """

    node: Node
    depth: int
    is_last: bool
    again: bool = False


@dataclass(frozen=True)
class FileGraph:
    """All files of ``places``; nodes and roots are in order of their paths."""

    exit_statuses: ClassVar = {
        0: "every file was examined",
        1: "a file or place could not be examined",
    }

    graph: Graph[Node]
    roots: list[Node]
    places: Found

    @property
    def nodes(self) -> list[Node]:
        """All nodes."""
        return list(self.graph.nodes.values())

    @property
    def exit_code(self) -> int:
        """1 if a file could not be examined."""
        hidden = any(node.member is not None and node.member.is_hidden for node in self.nodes)
        return int(hidden or bool(self.places.unexamined))

    @property
    def files(self) -> list[Node]:
        """The files that are no overlays in the places."""
        return [node for node in self.nodes if node.kind is not NodeKind.OVERLAY]

    def of_kind(self, kind: NodeKind) -> list[Node]:
        """The nodes of one kind."""
        return [node for node in self.nodes if node.kind is kind]

    def overlays(self, node: Node) -> list[Node]:
        """The overlays directly above ``node``."""
        return self.graph.overlays.get(node.identity, [])

    def count(self, mark: Mark) -> int:
        """How many existing files have ``mark``; a missing file is counted by its overlays."""
        there = (node for node in self.nodes if node.kind is not NodeKind.MISSING)
        return sum(mark in node.marks for node in there)

    def rows(self) -> Iterator[Row]:
        """The forest from its roots up, each file once, and where cycles come back."""
        roots = frozenset(self.roots)
        waiting = [Row(node, 0, is_last=True) for node in reversed(self.roots)]
        while waiting:
            row = waiting.pop()
            yield row
            if not row.again:
                above = self.overlays(row.node)
                waiting += [
                    Row(node, row.depth + 1, node is above[-1], node in roots)
                    for node in reversed(above)
                ]


def file_graph(places: Iterable[str], access: Access | None = None) -> FileGraph:
    """The graph of the files in ``places``.

    Names inside images may also lead beneath the directories among ``places``. Raises
    :class:`ImageError` when none of the places exists.
    """
    found = files_of(places, access or Access())
    builder = _Builder(found)
    for member in members_of(found):
        # Its names may also lead beneath its own directory.
        beside = found.access.beside(member.named.base or member.filename)
        builder.add_overlay(NodeKind.OVERLAY, member, beside)
    builder.add_backings()
    builder.add_unexamined()
    builder.add_unnamed()
    return builder.graph()


class _Builder:
    """Collects nodes; backing files wait until all overlays in the places are nodes."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.nodes: dict[Key, Node] = {}
        self.waiting: deque[tuple[Key, Named, Access]] = deque()

    def add_overlay(self, kind: NodeKind, member: Member, access: Access) -> None:
        """Add an overlay; its backing file waits."""
        named, about = member.named, member.about
        backing = _key(named.backing, named.backing_path or named.backing_name)
        self.nodes[named.identity] = Node(
            named.path,
            kind,
            named.identity,
            image=_key(named.image, named.image_path),
            backing=None if named.all_allocated else backing,
            format=ADD_COW,
            virtual_size=None if about is None else about.virtual_size,
            member=member,
            written=_modified(named.path, named.image_path),
        )
        if backing is not None:
            self.waiting.append((backing, named, access))

    def add_backings(self) -> None:
        """Add the backing files of all overlays, and of overlays among these."""
        while self.waiting:
            key, named, access = self.waiting.popleft()
            if key not in self.nodes:
                self._add_backing(key, named, access)

    def add_unexamined(self) -> None:
        """Add what could not be examined; it may already be a node."""
        self.found.unexamined = in_order(self.found.unexamined)
        for one in self.found.unexamined:
            key = identity_at(one.path) or os.path.realpath(one.path)
            node = self.nodes.get(key) or Node(one.path, NodeKind.NOT_EXAMINED, key)
            self.nodes[key] = replace(node, problem=one.reason)

    def add_unnamed(self) -> None:
        """Add the regular files that no overlay names."""
        images = {node.image for node in self.nodes.values()}
        hidden = (node.is_hidden or node.state == Mark.UNEXAMINED for node in self.nodes.values())
        sees_all = not self.found.unexamined and not any(hidden)
        kind = NodeKind.UNNAMED if sees_all else NodeKind.NOT_EXAMINED
        problem = None if sees_all else _MAY_BE_NAMED
        for path in self.found.files:
            layer = described_by(path)
            if layer is not None and not is_gone(layer):
                continue  # a manifest belongs to its layer
            status, _ = _status(path)
            if status is None or not stat.S_ISREG(status.st_mode):
                continue
            twin = twin_header(path)
            if twin is not None and twin.mark is not None:
                self._add_twin(twin, twin.mark, (status.st_dev, twin.mark.image_inode))
                continue  # a twin belongs to its overlay
            key, size = identity_of(status), raw_size(status.st_size)
            if key not in self.nodes and key not in images:
                self.nodes[key] = Node(path, kind, key, virtual_size=size, problem=problem)

    def _add_twin(self, twin: Header, mark: TwinMark, image: Identity) -> None:
        """Note at the overlays what QEMU may write through a twin."""
        for key, node in self.nodes.items():
            if node.lent_id == mark.lent_id and isinstance(node.image, tuple):
                names_other = other_data_file(twin, node.image) is not None
                self.nodes[key] = replace(node, names_other=names_other)
            elif node.image == image and node.lent_id is None and not twin.disabled:
                self.nodes[key] = replace(node, has_foreign_twin=True)

    def _add_backing(self, key: Key, named: Named, access: Access) -> None:
        """Add a backing file that is no overlay in the places."""
        path = named.backing_path or named.backing_name or ""
        status, is_hidden = _status(named.backing_path)
        if status is not None and named.backing_format == ADD_COW:
            self._add_outside(path, identity_of(status), access)
            return
        is_missing = status is None and not is_hidden
        if is_missing and named.all_allocated:
            return  # no overlay reads it
        kind = NodeKind.MISSING if is_missing else NodeKind.BACKING
        node = Node(path, kind, key, format=named.backing_format, is_hidden=is_hidden)
        if status is not None and stat.S_ISREG(status.st_mode):
            size = raw_size(status.st_size) if named.backing_format == RAW else None
            node = replace(node, virtual_size=size, written=status.st_mtime_ns)
        self.nodes[key] = node

    def _add_outside(self, path: str, identity: Identity, access: Access) -> None:
        """Add an overlay outside of the places, as far as it may be opened."""
        named: Named | None = None
        with suppress(AddcowError, OSError), closing(access.open_beneath(path)) as cow:
            named = named_in(cow.fd, path)
        named = named or Named(path, identity, None, None)
        try:
            member = Member(named, info(path, access, named=False), None)
        except AddcowError as error:
            member = Member(named, None, error.without_traceback())
        self.add_overlay(NodeKind.BACKING, member, access)

    def graph(self) -> FileGraph:
        """The graph of all nodes, with their marks."""
        nodes = sorted(self.nodes.values(), key=_path)
        graph = Graph(nodes)
        depths = graph.depths()
        graph = Graph(replace(node, marks=marks_of(node, graph, depths)) for node in nodes)
        loose = (NodeKind.UNNAMED, NodeKind.NOT_EXAMINED)
        trees = (node for node in graph.nodes.values() if node.kind not in loose)
        roots = [node for node in trees if node.backing is None]
        roots += [min(cycle, key=_path) for cycle in graph.cycles()]
        return FileGraph(graph, sorted(roots, key=_path), self.found)


def _path(node: Node) -> str:
    return node.path


def _key(identity: Identity | None, name: str | None) -> Key | None:
    """The key of a file that is named; a file that does not exist has only its name."""
    return identity or (None if name is None else os.path.realpath(name))


def _modified(*paths: str | None) -> int | None:
    """The newest modification time of files; None if one does not exist."""
    try:
        return max(os.stat(path or "").st_mtime_ns for path in paths)
    except OSError:
        return None


def _status(path: str | None) -> tuple[os.stat_result | None, bool]:
    """The status of a file, and whether access to it is refused."""
    try:
        return os.stat(path or ""), False
    except OSError as error:
        return None, error.errno not in _ABSENT
