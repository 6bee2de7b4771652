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
from dataclasses import dataclass, replace
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Named, is_gone
from addcow_mp.device.files import File, identity_of
from addcow_mp.device.headers import peek_header, read_name
from addcow_mp.device.manifest_file import described_by
from addcow_mp.errors import AddcowError
from addcow_mp.farm.graph import Graph, Key
from addcow_mp.farm.marks import marks_of
from addcow_mp.farm.members import Member, members_of
from addcow_mp.farm.nodes import HeaderNames, Mark, Node, NodeKind
from addcow_mp.farm.places import Found, files_of, in_order
from addcow_mp.format.geometry import raw_size
from addcow_mp.format.header import (
    ADD_COW,
    BACKING_NAME_LIMIT,
    IMAGE_NAME_LIMIT,
    RAW,
    format_name,
)
from addcow_mp.format.names import path_combine, path_has_protocol
from addcow_mp.jobs.info import Info, info

#: Errors that say that there is no file, and not that access to it is refused.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

_MAY_BE_NAMED = "what could not be looked at may name it"


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

    graph: Graph[Node]
    roots: list[Node]
    places: Found

    @property
    def nodes(self) -> list[Node]:
        """All nodes."""
        return list(self.graph.nodes.values())

    @property
    def is_whole(self) -> bool:
        """Whether every file could be examined."""
        hidden = any(node.member is not None and node.member.is_hidden for node in self.nodes)
        return not self.places.unexamined and not hidden

    @property
    def images(self) -> list[Node]:
        """The overlays in the places."""
        return self.of_kind(NodeKind.OVERLAY)

    @property
    def files(self) -> list[Node]:
        """All other files."""
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
        builder.add_member(member, found.access)
    builder.add_backings()
    builder.add_unexamined()
    builder.add_unnamed()
    return builder.graph()


class _Builder:
    """Collects nodes; backing files wait until all overlays in the places are nodes."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.nodes: dict[Key, Node] = {}
        self.waiting: deque[tuple[_Target, HeaderNames, Access]] = deque()

    def add_member(self, member: Member, access: Access) -> None:
        """Add an overlay in the places; its names may lead beneath its own directory."""
        names = _header_names(member.filename, member.about, access, named=True)
        beside = access.beside(names.base or member.filename)
        self._add_overlay(NodeKind.OVERLAY, member, names, beside)

    def add_backings(self) -> None:
        """Add the backing files of all overlays, and of overlays among these."""
        while self.waiting:
            target, names, access = self.waiting.popleft()
            if target.key not in self.nodes:
                self._add_backing(target, names, access)

    def add_unexamined(self) -> None:
        """Add what could not be examined; it may already be a node."""
        self.found.unexamined = in_order(self.found.unexamined)
        for one in self.found.unexamined:
            key = _looked_up(one.path).key
            node = self.nodes.get(key) or Node(one.path, NodeKind.NOT_EXAMINED, key)
            self.nodes[key] = replace(node, problem=one.reason)

    def add_unnamed(self) -> None:
        """Add the regular files that no overlay names."""
        images = {node.image for node in self.nodes.values()}
        sees_all = not self.found.unexamined and not any(map(_is_hidden, self.nodes.values()))
        kind = NodeKind.UNNAMED if sees_all else NodeKind.NOT_EXAMINED
        problem = None if sees_all else _MAY_BE_NAMED
        for path in self.found.files:
            layer = described_by(path)
            if layer is not None and not is_gone(layer):
                continue  # a manifest belongs to its layer
            file = _looked_up(path)
            if file.is_regular and file.key not in self.nodes and file.key not in images:
                self.nodes[file.key] = Node(
                    path, kind, file.key, virtual_size=file.raw_size, problem=problem
                )

    def _add_overlay(
        self, kind: NodeKind, member: Member, names: HeaderNames, access: Access
    ) -> None:
        about = member.about
        image, backing = _target(names.base, names.image), _target(names.base, names.backing)
        files = (_looked_up(member.filename), image)
        times = [None if file is None else file.written for file in files]
        self.nodes[member.named.identity] = Node(
            member.filename,
            kind,
            member.named.identity,
            image=None if image is None else image.key,
            backing=None if backing is None or names.all_allocated else backing.key,
            format=ADD_COW,
            virtual_size=None if about is None else about.virtual_size,
            member=member,
            names=names,
            written=None if None in times else max(filter(None, times)),
        )
        if backing is not None and not (backing.is_absent and names.all_allocated):
            self.waiting.append((backing, names, access))

    def _add_backing(self, target: _Target, names: HeaderNames, access: Access) -> None:
        """Add a backing file that is no overlay in the places."""
        if target.status is not None and names.backing_format == ADD_COW:
            self._add_outside(target, identity_of(target.status), access)
            return
        self.nodes[target.key] = Node(
            target.path,
            NodeKind.MISSING if target.is_absent else NodeKind.BACKING,
            target.key,
            format=names.backing_format,
            virtual_size=target.raw_size if names.backing_format == RAW else None,
            written=target.written if target.is_regular else None,
            is_hidden=target.status is None and not target.is_absent,
        )

    def _add_outside(self, target: _Target, identity: tuple[int, int], access: Access) -> None:
        """Add an overlay outside of the places, as far as it may be opened."""
        named = Named(target.path, identity, None, None)
        try:
            about, problem = info(target.path, access, named=False), None
        except AddcowError as error:
            about, problem = None, error.without_traceback()
        names = _header_names(target.path, about, access, named=False)
        self._add_overlay(NodeKind.BACKING, Member(named, about, problem), names, access)

    def graph(self) -> FileGraph:
        """The graph of all nodes, with their marks."""
        nodes = sorted(self.nodes.values(), key=_path)
        graph = Graph(nodes)
        depths = graph.depths()
        graph = Graph(replace(node, marks=marks_of(node, graph, depths)) for node in nodes)
        loose = (NodeKind.UNNAMED, NodeKind.NOT_EXAMINED)
        roots = [
            node for node in graph.nodes.values() if node.backing is None and node.kind not in loose
        ]
        roots += [min(cycle, key=_path) for cycle in graph.cycles()]
        return FileGraph(graph, sorted(roots, key=_path), self.found)


def _path(node: Node) -> str:
    return node.path


def _is_hidden(node: Node) -> bool:
    return node.is_hidden or (node.member is not None and node.member.state == Mark.UNEXAMINED)


# Names


class _Target(NamedTuple):
    """The file that a name leads to; without ``status`` it is absent or cannot be examined."""

    key: Key
    path: str
    status: os.stat_result | None = None
    is_absent: bool = False

    @property
    def is_regular(self) -> bool:
        """Whether it is a regular file."""
        return self.status is not None and stat.S_ISREG(self.status.st_mode)

    @property
    def raw_size(self) -> int | None:
        """The virtual size of a regular file as a raw disk."""
        return raw_size(self.status.st_size) if self.status and self.is_regular else None

    @property
    def written(self) -> int | None:
        """Its modification time in nanoseconds."""
        return None if self.status is None else self.status.st_mtime_ns


def _target(base: str, name: str | None) -> _Target | None:
    """The file that ``name``, relative to ``base``, leads to; a protocol leads to none."""
    if name is None:
        return None
    if path_has_protocol(name):
        return _Target(name, name, is_absent=True)
    return _looked_up(path_combine(base, name))


def _looked_up(path: str) -> _Target:
    try:
        status = os.stat(path)
    except OSError as error:
        return _Target(os.path.realpath(path), path, is_absent=error.errno in _ABSENT)
    return _Target(identity_of(status), path, status)


def _header_names(path: str, about: Info | None, access: Access, *, named: bool) -> HeaderNames:
    """The names in a header; without ``about`` it is read as far as possible."""
    if about is not None:
        names, all_allocated = about.names, about.header.all_allocated
        return HeaderNames(
            names.image, names.backing, names.backing_format, all_allocated, about.base
        )
    try:
        cow = access.open_named(path) if named else access.open_beneath(path)
    except AddcowError:
        return HeaderNames()
    try:
        return _readable_names(cow)
    except AddcowError:
        return HeaderNames()
    finally:
        cow.close()


def _readable_names(cow: File) -> HeaderNames:
    header = peek_header(cow)
    return HeaderNames(
        _name(cow, header.image_offset, header.image_size, IMAGE_NAME_LIMIT),
        _name(cow, header.backing_offset, header.backing_size, BACKING_NAME_LIMIT),
        format_name(header.backing_format) or None,
        header.all_allocated,
        cow.base,
    )


def _name(cow: File, offset: int, size: int, limit: int) -> str | None:
    """A name in a header that may be damaged; None where it cannot be read."""
    if not offset or not size:
        return None
    try:
        return read_name(cow, offset, size, limit)
    except AddcowError:
        return None
