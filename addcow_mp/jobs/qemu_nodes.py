"""The block nodes of a running QEMU: which of them is the twin of an overlay.

QEMU names its files by path, and a node by a name that anybody may have chosen. A node is the twin
when its file *is* the twin and its data file *is* the image file, by device and inode. A relative
path is relative to QEMU's working directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from addcow_mp.device.files import identity_at
from addcow_mp.errors import ImageError
from addcow_mp.jobs.qemu_monitor import Monitor

#: So many nodes are named in an error.
EXAMPLES = 3


class Node(NamedTuple):
    """A qcow2 node of QEMU, with the paths of its file and of its data file."""

    name: str
    file: str | None
    data_file: str | None
    has_backing: bool


class Wanted(NamedTuple):
    """The twin that is searched: paths, and device and inode of twin and image file."""

    path: str
    twin: tuple[int, int]
    image_path: str
    image: tuple[int, int]


def twin_node(monitor: Monitor, wanted: Wanted) -> Node:
    """The node that is the twin. Raises :class:`ImageError` when QEMU does not have it."""
    nodes = list(qcow2_nodes(monitor))
    of_twin = [one for one in nodes if _identity(monitor, one.file) == wanted.twin]
    for node in of_twin:
        if _identity(monitor, node.data_file) == wanted.image:
            return node
    raise _other_data_file(wanted, of_twin[0]) if of_twin else _not_there(wanted, nodes)


def _other_data_file(wanted: Wanted, node: Node) -> ImageError:
    return ImageError(
        path=wanted.path,
        problem=f"QEMU uses it as node '{node.name}' with the data file '{node.data_file}', and "
        f"the image file is '{wanted.image_path}'; start QEMU with what 'addcow qemu args' prints",
    )


def _not_there(wanted: Wanted, nodes: list[Node]) -> ImageError:
    named = [f"'{one.file}' (node '{one.name}')" for one in nodes]
    more = f" and {len(named) - EXAMPLES} more" if len(named) > EXAMPLES else ""
    has = f"its qcow2 files are {', '.join(named[:EXAMPLES])}{more}" if named else "it has no qcow2"
    return ImageError(path=wanted.path, problem=f"this QEMU does not use it: {has}")


def _identity(monitor: Monitor, path: str | None) -> tuple[int, int] | None:
    if path is None:
        return None
    return identity_at(os.path.join(f"/proc/{monitor.process}/cwd", path))


def qcow2_nodes(monitor: Monitor) -> Iterator[Node]:
    """All qcow2 nodes. A name of QEMU's for a node lasts only as long as the node."""
    named = monitor.execute("query-named-block-nodes", flat=True)
    files = {one["node-name"]: one.get("file") for one in named}
    children = _children(monitor.execute("x-debug-query-block-graph"))
    for one in named:
        if one.get("drv") == "qcow2":
            own = children.get(one["node-name"], {})
            file, data_file = (
                files.get(_protocol(own.get(key), children)) for key in ("file", "data-file")
            )
            yield Node(one["node-name"], file, data_file, "backing" in own)


def _children(graph: dict[str, Any]) -> dict[str, dict[str, str]]:
    """For each node its children, by role."""
    nodes = (one for one in graph["nodes"] if one["type"] == "block-driver")
    names: dict[int, str] = {one["id"]: one["name"] for one in nodes}
    children: dict[str, dict[str, str]] = {}
    for edge in graph["edges"]:
        parent, child = names.get(edge["parent"]), names.get(edge["child"])
        if parent is not None and child is not None:
            children.setdefault(parent, {})[edge["name"]] = child
    return children


def _protocol(name: str | None, children: dict[str, dict[str, str]]) -> str | None:
    """The node that opens the file, below filters such as limits of a rate."""
    while name is not None and "file" in children.get(name, {}):
        name = children[name]["file"]
    return name
