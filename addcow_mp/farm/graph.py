"""The graph of a farm: who backs whom, what is not there, and what nobody names.

Nodes are files: every overlay in the places, every backing file that one of them names, wherever
it lies and whether it is there or not, and every other regular file in the places. A file is one
node, known by its inode; only what is not there is known by its resolved name. Image files are no
nodes, they belong to their overlays. An overlay with ALL_ALLOCATED consults no backing file, so
it stands alone, though its header may go on naming one.

An overlay has one backing file, so the graph is a forest, and its roots are the files that
nothing backs. A file is unnamed only when all that could name it was looked at; otherwise it is
*not examined*, like what could not be looked at itself. A circle of overlays has no root: the
first of its members, by path, is drawn as one, and the row where the circle closes says so. An
overlay outside of the places is followed down only as far as names may lead
(:mod:`addcow_mp.device.access`).

*base-changed* says that the backing holds data that was written after the overlay's own files
last were: its mtime is later than those of the overlay's ``.add-cow`` and image file. A guest
then may see a disk that never was: old clusters of its own over new ones. Of an overlay as
backing, both its files count. But one without a local cluster has just been committed, and one
with ALL_ALLOCATED just been flattened: both move data without changing what is read there, as
every view above goes on to read the same bytes from another file. An overlay with ALL_ALLOCATED
reads no backing, so that none can change under it, and in a circle nothing can be read at all.
Only the backing next below is compared: the mark stands where the change came in. An mtime is a
hint, not a proof: a copy sets it, and touch. A commit of one overlay into a base that others
share is a change to those others, and is told rightly.

Nothing is changed, and nothing is judged: that is what the farm's check is for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity, Named, is_gone
from addcow_mp.device.files import File, identity_of
from addcow_mp.device.headers import peek_header, read_name
from addcow_mp.device.manifest_file import described_by
from addcow_mp.errors import AddcowError
from addcow_mp.farm.members import Member, members_of
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

Key = Identity | str
"""What makes a file the same: its identity, or its resolved name when it is not there."""

#: Why a file is not there, and not merely hidden from us.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class NodeKind(StrEnum):
    """What a node is: an overlay in the places, or a file of another sort."""

    OVERLAY = "overlay"
    BACKING = "backing"
    MISSING = "missing"
    NOT_EXAMINED = "not-examined"
    UNNAMED = "unnamed"


class Mark(StrEnum):
    """What is remarkable about a node, the gravest first."""

    DAMAGED = "damaged"
    UNEXAMINED = "unexamined"
    MISSING_IMAGE = "missing-image"
    MISSING_BACKING = "missing-backing"
    CYCLE = "cycle"
    SHARED_IMAGE = "shared-image"
    BASE_CHANGED = "base-changed"
    NOT_EXAMINED = "not-examined"
    UNNAMED = "unnamed"


_MAY_NAME_IT = "what could not be looked at may name it"

#: Marks that the state of an overlay says by itself.
_STATES = (Mark.DAMAGED, Mark.UNEXAMINED, Mark.MISSING_IMAGE)


class Said(NamedTuple):
    """What the header of an overlay says of other files, as far as it can be read."""

    image: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    all_allocated: bool = False
    #: The path that these names are relative to.
    base: str = ""


@dataclass(eq=False)
class Node:
    """A file. ``member`` and ``said`` are known of overlays, also outside of the places.

    ``written``: when the newest of its files was, in nanoseconds. ``overlays``: those directly
    over it, in order of paths once the graph is complete. ``problem``: why it is not examined.
    """

    path: str
    kind: NodeKind
    format: str | None = None
    virtual_size: int | None = None
    member: Member | None = None
    said: Said = field(default_factory=Said)
    written: int | None = None
    problem: str | None = None
    marked: set[Mark] = field(default_factory=set)
    backing: Node | None = field(default=None, repr=False)
    overlays: list[Node] = field(default_factory=list, repr=False)

    @property
    def marks(self) -> list[Mark]:
        """Its marks, the gravest first."""
        return [mark for mark in Mark if mark in self.marked]

    @property
    def full_image(self) -> str | None:
        """The image file's path as seen from here."""
        return _full(self.said.base, self.said.image)

    @property
    def full_backing(self) -> str | None:
        """The backing file's path as seen from here."""
        return _full(self.said.base, self.said.backing)


class Row(NamedTuple):
    """A line of the forest. ``last`` of its siblings; ``again`` where a circle comes back."""

    node: Node
    depth: int
    last: bool
    again: bool = False


@dataclass(frozen=True)
class Graph:
    """All nodes and the roots of the forest, both in order of paths; unnamed files are no roots."""

    nodes: list[Node]
    roots: list[Node]
    places: Found

    @property
    def is_whole(self) -> bool:
        """Whether everything could be looked at."""
        hidden = any(node.member is not None and node.member.is_hidden for node in self.nodes)
        return not self.places.unexamined and not hidden

    @property
    def images(self) -> list[Node]:
        """The overlays in the places."""
        return [node for node in self.nodes if node.kind is NodeKind.OVERLAY]

    @property
    def files(self) -> list[Node]:
        """All other files."""
        return [node for node in self.nodes if node.kind is not NodeKind.OVERLAY]

    @property
    def unnamed(self) -> list[Node]:
        """The files that no overlay names."""
        return [node for node in self.nodes if node.kind is NodeKind.UNNAMED]

    @property
    def unexamined(self) -> list[Node]:
        """What could not be looked at, and the files that something there may name."""
        return [node for node in self.nodes if node.kind is NodeKind.NOT_EXAMINED]

    def count(self, mark: Mark) -> int:
        """How many files have ``mark``; one that is missing is told by the overlays over it."""
        there = (node for node in self.nodes if node.kind is not NodeKind.MISSING)
        return sum(1 for node in there if mark in node.marked)

    def rows(self) -> Iterator[Row]:
        """The forest from its roots up, each file once, and where circles come back."""
        roots = frozenset(self.roots)
        waiting = _siblings(self.roots, 0)
        while waiting:
            row = waiting.pop()
            yield row
            if not row.again:
                waiting += _siblings(row.node.overlays, row.depth + 1, roots)


def _siblings(nodes: list[Node], depth: int, roots: frozenset[Node] = frozenset()) -> list[Row]:
    """The rows of ``nodes``, the first of them at the end; a root over another file is a circle."""
    end = len(nodes) - 1
    rows = [Row(node, depth, at == end, node in roots) for at, node in enumerate(nodes)]
    return rows[::-1]


def farm_graph(places: Iterable[str], access: Access | None = None) -> Graph:
    """The graph of the overlays in ``places``.

    Names inside images may lead beneath any directory among ``places`` as well. Raises
    :class:`ImageError` when none of the places is there.
    """
    found = files_of(places, access or Access())
    building = _Building(found)
    for member in members_of(found):
        building.add_member(member, found.access)
    building.follow()
    building.add_unexamined()
    building.add_unnamed()
    return building.graph()


class _Building:
    """A graph that is being built: what is known by now, and what is to be followed down."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.nodes: dict[Key, Node] = {}
        self.owners: dict[Key, list[Node]] = defaultdict(list)
        self.waiting: deque[tuple[Node, Access]] = deque()

    # Files

    def add_member(self, member: Member, access: Access) -> None:
        """An overlay in the places: what it names may lie beside it."""
        said = _said(member.filename, member.about, access, named=True)
        node = self._overlay(NodeKind.OVERLAY, member, said)
        self.waiting.append((node, access.beside(said.base or member.filename)))

    def follow(self) -> None:
        """Join overlays to what they name, and go on with overlays that this leads to."""
        while self.waiting:
            node, access = self.waiting.popleft()
            self._join_image(node)
            self._join_backing(node, access)

    def add_unexamined(self) -> None:
        """What could not be looked at: a file that came up before, or one of its own."""
        self.found.unexamined = in_order(self.found.unexamined)
        for one in self.found.unexamined:
            key = _looked_up(one.path).key
            node = self.nodes.setdefault(key, Node(one.path, NodeKind.NOT_EXAMINED))
            node.problem = one.reason
            node.marked.add(Mark.NOT_EXAMINED)

    def add_unnamed(self) -> None:
        """The regular files that came up nowhere."""
        for path in self.found.files:
            layer = described_by(path)
            if layer is not None and not is_gone(layer):
                continue  # a manifest belongs to what it is about
            there = _looked_up(path)
            if there.status is None or not stat.S_ISREG(there.status.st_mode):
                continue
            if there.key not in self.nodes and there.key not in self.owners:
                size = raw_size(there.status.st_size)
                self.nodes[there.key] = self._not_named(path, size)

    def _not_named(self, path: str, size: int) -> Node:
        """A file that no overlay names, as far as all of them could be looked at."""
        if self._sees_all:
            return Node(path, NodeKind.UNNAMED, virtual_size=size, marked={Mark.UNNAMED})
        marked = {Mark.NOT_EXAMINED}
        return Node(
            path, NodeKind.NOT_EXAMINED, virtual_size=size, problem=_MAY_NAME_IT, marked=marked
        )

    @cached_property
    def _sees_all(self) -> bool:
        """Whether nothing is hidden that could name a file."""
        hidden = any(Mark.UNEXAMINED in node.marked for node in self.nodes.values())
        return not self.found.unexamined and not hidden

    def _overlay(self, kind: NodeKind, member: Member, said: Said) -> Node:
        about = member.about
        node = Node(
            member.filename,
            kind,
            ADD_COW,
            about.virtual_size if about is not None else None,
            member,
            said,
            marked={mark for mark in _STATES if mark == member.state},
        )
        return self.nodes.setdefault(member.named.identity, node)

    def _join_image(self, node: Node) -> None:
        if node.said.image is None:
            return
        own, image = _looked_up(node.path), _named(node.said.base, node.said.image)
        self.owners[image.key].append(node)
        if own.status is not None and image.status is not None:
            node.written = max(own.status.st_mtime_ns, image.status.st_mtime_ns)

    def _join_backing(self, node: Node, access: Access) -> None:
        if node.said.backing is None:
            return
        there = _named(node.said.base, node.said.backing)
        if there.absent and node.said.all_allocated:
            return  # nobody misses it
        below = self.nodes.get(there.key) or self._below(there, node.said, access)
        if not node.said.all_allocated:
            node.backing = below
            below.overlays.append(node)

    def _below(self, there: _There, said: Said, access: Access) -> Node:
        """A backing file that is no overlay in the places."""
        if there.status is not None and said.backing_format == ADD_COW:
            return self._outside(there, access)
        node = Node(
            there.path, NodeKind.MISSING if there.absent else NodeKind.BACKING, said.backing_format
        )
        if there.status is None:
            node.marked.add(Mark.MISSING_BACKING if there.absent else Mark.UNEXAMINED)
        elif stat.S_ISREG(there.status.st_mode):
            node.written = there.status.st_mtime_ns
            known = said.backing_format == RAW
            node.virtual_size = raw_size(there.status.st_size) if known else None
        return self.nodes.setdefault(there.key, node)

    def _outside(self, there: _There, access: Access) -> Node:
        """An overlay that is not in the places, as far as it may be opened."""
        assert there.status is not None  # noqa: S101 - what is not there is not followed
        named = Named(there.path, identity_of(there.status), None, None)
        try:
            about, problem = info(there.path, access, named=False), None
        except AddcowError as error:
            about, problem = None, error.without_traceback()
        said = _said(there.path, about, access, named=False)
        node = self._overlay(NodeKind.BACKING, Member(named, about, problem), said)
        self.waiting.append((node, access))
        return node

    # All of them together

    def graph(self) -> Graph:
        """All that was found, in order and with its marks."""
        nodes = sorted(self.nodes.values(), key=_path)
        for node in nodes:
            node.overlays.sort(key=_path)
        loose = (NodeKind.UNNAMED, NodeKind.NOT_EXAMINED)
        roots = [node for node in nodes if node.backing is None and node.kind not in loose]
        for circle in _circles(nodes):
            _mark_all(circle)
            roots.append(min(circle, key=_path))
        self._mark()
        return Graph(nodes, sorted(roots, key=_path), self.found)

    def _mark(self) -> None:
        for node in self.nodes.values():
            if node.backing is not None and node.backing.kind is NodeKind.MISSING:
                node.marked.add(Mark.MISSING_BACKING)
            if _base_changed(node):
                node.marked.add(Mark.BASE_CHANGED)
        for owners in self.owners.values():
            if len(owners) > 1:
                for node in owners:
                    node.marked.add(Mark.SHARED_IMAGE)


def _path(node: Node) -> str:
    return node.path


def _base_changed(node: Node) -> bool:
    """Whether the backing holds data newer than ``node`` does; the rule is in the essay."""
    below = node.backing
    if below is None or below.written is None or node.written is None:
        return False
    if Mark.CYCLE in node.marked or node.member is None or node.member.about is None:
        return False
    return _holds_data(below) and below.written > node.written


def _holds_data(below: Node) -> bool:
    """Whether what was written to ``below`` is data, and not its removal or its arrival."""
    if below.member is None:
        return True
    about = below.member.about
    return about is not None and bool(about.allocated_clusters) and not about.header.all_allocated


def _circles(nodes: list[Node]) -> Iterator[list[Node]]:
    """The overlays whose backing files lead back to themselves, each circle once."""
    passed: set[Node] = set()
    for node in nodes:
        way: list[Node] = []
        here: Node | None = node
        while here is not None and here not in passed:
            passed.add(here)
            way.append(here)
            here = here.backing
        if here is not None and here in way:
            yield way[way.index(here) :]


def _mark_all(circle: list[Node]) -> None:
    """Mark the members of a circle, and all that stands on them."""
    waiting = list(circle)
    while waiting:
        node = waiting.pop()
        if Mark.CYCLE not in node.marked:
            node.marked.add(Mark.CYCLE)
            waiting += node.overlays


# Names


class _There(NamedTuple):
    """Where a name leads; no ``status`` when that is ``absent`` or cannot be seen."""

    key: Key
    path: str
    status: os.stat_result | None = None
    absent: bool = False


def _full(base: str, name: str | None) -> str | None:
    """The path that ``name`` stands for, seen from ``base``; a protocol is left as it is."""
    return name if name is None or path_has_protocol(name) else path_combine(base, name)


def _named(base: str, name: str) -> _There:
    """Where ``name``, seen from ``base``, leads; a protocol to no file at all."""
    if path_has_protocol(name):
        return _There(name, name, absent=True)
    return _looked_up(path_combine(base, name))


def _looked_up(path: str) -> _There:
    try:
        status = os.stat(path)
    except OSError as error:
        return _There(os.path.realpath(path), path, absent=error.errno in _ABSENT)
    return _There(identity_of(status), path, status)


def _said(path: str, about: Info | None, access: Access, *, named: bool) -> Said:
    """What the header says; read as far as it goes where ``about`` could not be had."""
    if about is not None:
        names = about.names
        backing = names.backing, names.backing_format
        return Said(names.image, *backing, about.header.all_allocated, about.base)
    try:
        cow = access.open_named(path) if named else access.open_beneath(path)
    except AddcowError:
        return Said()
    try:
        return _as_far_as_it_goes(cow)
    except AddcowError:
        return Said()
    finally:
        cow.close()


def _as_far_as_it_goes(cow: File) -> Said:
    header = peek_header(cow)
    return Said(
        _name(cow, header.image_offset, header.image_size, IMAGE_NAME_LIMIT),
        _name(cow, header.backing_offset, header.backing_size, BACKING_NAME_LIMIT),
        format_name(header.backing_format) or None,
        header.all_allocated,
        cow.base,
    )


def _name(cow: File, offset: int, size: int, limit: int) -> str | None:
    """A name of a header that may be damaged; None where there is none to be read."""
    if not offset or not size:
        return None
    try:
        return read_name(cow, offset, size, limit)
    except AddcowError:
        return None
