"""What to give to QEMU or libvirt for an overlay that is lent.

A twin names no data file that can be opened, so every data file and every backing file down the
chain is given by name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from addcow_mp.device.access import Access
from addcow_mp.device.chain import open_chain
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.format.qcow2 import Header
from addcow_mp.format.qcow2_entries import Tables
from addcow_mp.jobs.lending import State, lending_of, not_lent

#: The name of the topmost node.
NODE = "addcow0"


@dataclass(frozen=True)
class Lent:
    """One layer as QEMU uses it: a twin with its image file, or a raw base with neither."""

    path: str
    image: str | None = None
    cache: int = 0


def lent_chain(path: str, access: Access | None = None) -> list[Lent]:
    """The files of the lent overlay at ``path``, from the top down, as absolute paths."""
    with open_chain(path, access=access, lent=True) as overlay:
        layers: list[Lent] = []
        layer: Layer | None = overlay
        while layer is not None:
            layers.append(_lent(layer))
            layer = layer.backing if isinstance(layer, Overlay) else None
        return layers


def _lent(layer: Layer) -> Lent:
    if not isinstance(layer, Overlay):
        return Lent(next(layer.files()).real)
    lending = lending_of(layer.cow, layer.header, layer.image.file)
    if lending.state not in (State.LENT, State.LENT_FOR_READING) or lending.header is None:
        raise not_lent(layer.path, lending)
    twin = os.path.realpath(lending.twin or "")
    return Lent(twin, layer.image.file.real, _cache_size(lending.header))


def _cache_size(header: Header) -> int:
    """Bytes of the tables that describe the whole disk: QEMU then reads each of them once."""
    tables = Tables(header.cluster_size, extended=header.extended)
    return -(-header.fixed.size // tables.coverage) * header.cluster_size


def blockdev(layers: list[Lent]) -> dict[str, Any]:
    """The arguments of ``blockdev-add`` for the topmost layer; those below it are nested."""
    return {"node-name": NODE, "discard": "unmap", **_node(layers)}


def _node(layers: list[Lent]) -> dict[str, Any]:
    top, below = layers[0], layers[1:]
    file = {"driver": "file", "filename": top.path}
    if top.image is None:
        return {"driver": "raw", "read-only": True, "file": file}
    node: dict[str, Any] = {
        "driver": "qcow2",
        "file": file,
        "data-file": {"driver": "file", "filename": top.image},
        "l2-cache-size": max(top.cache, 1),
    }
    if below:
        node["backing"] = {**_node(below), "read-only": True}
    return node


def libvirt(layers: list[Lent]) -> str:
    """The ``<disk>`` element for libvirt 10.10 and later, which knows ``<dataStore>``."""
    disk = ET.Element("disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="qcow2", discard="unmap")
    _add_source(disk, layers[0])
    _add_backing(disk, layers[1:])
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    ET.indent(disk)
    return ET.tostring(disk, encoding="unicode")


def _add_source(parent: ET.Element, layer: Lent) -> None:
    source = ET.SubElement(parent, "source", file=layer.path)
    if layer.image is not None:
        store = ET.SubElement(source, "dataStore", type="file")
        ET.SubElement(store, "format", type="raw")
        ET.SubElement(store, "source", file=layer.image)


def _add_backing(parent: ET.Element, layers: list[Lent]) -> None:
    if not layers:
        ET.SubElement(parent, "backingStore")
        return
    store = ET.SubElement(parent, "backingStore", type="file")
    ET.SubElement(store, "format", type="raw" if layers[0].image is None else "qcow2")
    _add_source(store, layers[0])
    _add_backing(store, layers[1:])
