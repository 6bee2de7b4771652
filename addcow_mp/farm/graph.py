"""The graph of a farm: which file stands on which, by inode.

A node is an overlay, or another file that the caller adds. It names at most one image file and one
backing file. Following backing files gives the *chain* of a node. The *depth* of a node is the
number of nodes below it. A node in a cycle, or above one, has no depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from typing import Generic, Protocol, TypeVar

from addcow_mp.device.discovery import Identity

Key = Identity | str
"""Identifies a file: by inode, or by its resolved name where there is no file."""


class Linked(Protocol):
    """A file, and the files that it names."""

    @property
    def identity(self) -> Key:
        """The file itself."""

    @property
    def image(self) -> Key | None:
        """Its image file."""

    @property
    def backing(self) -> Key | None:
        """Its backing file."""


N = TypeVar("N", bound=Linked)


class Graph(Generic[N]):
    """Nodes by key, and the nodes that name each file.

    ``owners``: the nodes that name a file as their image file. ``overlays``: those that name it as
    their backing file. All are in the order in which they were added.
    """

    def __init__(self, nodes: Iterable[N] = ()) -> None:
        self.nodes: dict[Key, N] = {}
        self.owners: dict[Key, list[N]] = {}
        self.overlays: dict[Key, list[N]] = {}
        for node in nodes:
            self.add(node)

    def add(self, node: N) -> None:
        """Add a node; of several with one key, the first one is found by it."""
        self.nodes.setdefault(node.identity, node)
        if node.image is not None:
            self.owners.setdefault(node.image, []).append(node)
        if node.backing is not None:
            self.overlays.setdefault(node.backing, []).append(node)

    def remove_user(self, node: N) -> None:
        """Remove ``node`` from the users of the files that it names."""
        for users, file in ((self.owners, node.image), (self.overlays, node.backing)):
            if file is not None:
                users[file] = [one for one in users[file] if one is not node]

    def users(self, file: Key) -> list[N]:
        """The nodes that name ``file``."""
        return [*self.owners.get(file, ()), *self.overlays.get(file, ())]

    def below(self, node: N) -> N | None:
        """The node that is the backing file of ``node``."""
        return None if node.backing is None else self.nodes.get(node.backing)

    def chain(self, node: N) -> Iterator[N]:
        """``node`` and the nodes below it, each once."""
        seen: set[Key] = set()
        here: N | None = node
        while here is not None and here.identity not in seen:
            seen.add(here.identity)
            yield here
            here = self.below(here)

    def depths(self) -> dict[Key, int]:
        """The depth of each node that has one."""
        sorter: TopologicalSorter[Key] = TopologicalSorter()
        for key, node in self.nodes.items():
            below = self.below(node)
            sorter.add(key, *(() if below is None else (below.identity,)))
        with suppress(CycleError):  # all nodes outside of cycles are still sorted
            sorter.prepare()
        depths: dict[Key, int] = {}
        while ready := sorter.get_ready():
            for key in ready:
                below = self.below(self.nodes[key])
                depths[key] = 0 if below is None else depths[below.identity] + 1
            sorter.done(*ready)
        return depths

    def cycles(self) -> Iterator[list[N]]:
        """The nodes of each cycle."""
        passed: set[Key] = set()
        for node in self.nodes.values():
            way: dict[Key, N] = {}
            here: N | None = node
            while here is not None and here.identity not in passed:
                passed.add(here.identity)
                way[here.identity] = here
                here = self.below(here)
            if here is not None and here.identity in way:
                yield list(way.values())[list(way).index(here.identity) :]
