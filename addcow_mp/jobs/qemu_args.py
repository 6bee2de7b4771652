"""What to give to QEMU or libvirt for an overlay that is lent.

A twin names no data file that can be opened, so every data file and every backing file down the
chain is given by name. When QEMU has streamed, and has taken the backing file out of the twin, none
is given: the guest goes on with the image file alone.

:func:`rebase_command` and :func:`commit_command` are what qemu-img needs for the same files.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from addcow_mp.device.access import Access
from addcow_mp.device.chain import open_chain
from addcow_mp.device.discovery import overlays_near
from addcow_mp.device.files import identity_at
from addcow_mp.device.layer import Layer
from addcow_mp.device.locks import READING
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.twin import Twin
from addcow_mp.errors import ImageError
from addcow_mp.format.qcow2 import Header
from addcow_mp.format.qcow2_entries import Tables
from addcow_mp.format.qcow2_read import State as Entry
from addcow_mp.jobs.lending import Lending, State, lending_of, not_lent

#: The name of the topmost node.
NODE = "addcow0"


@dataclass(frozen=True)
class Lent:
    """One layer as QEMU uses it: a twin with its image file, or a raw base with neither."""

    path: str
    image: str | None = None
    cache: int = 0


@dataclass(frozen=True)
class QemuArgs:
    """What to give to QEMU or libvirt for an overlay that is lent, whose ``layers`` these are."""

    layers: list[Lent]

    @property
    def blockdev(self) -> dict[str, Any]:
        """The arguments of ``blockdev-add``, which opens the whole chain."""
        return blockdev(self.layers)

    @property
    def options(self) -> list[str]:
        """The options of ``qemu-system``, as words: the chain, and a virtio disk of it."""
        # Zeros as data: a qcow2 file makes others in its tables, over the image file's old data,
        # which a power cut can bring back when the guest writes there again.
        device = f"virtio-blk-pci,drive={NODE},write-zeroes=off"
        return ["-blockdev", json.dumps(self.blockdev), "-device", device]

    @property
    def libvirt(self) -> str:
        """The ``<disk>`` element for libvirt 10.10 and later."""
        return libvirt(self.layers)


def qemu_args(path: str, access: Access | None = None) -> QemuArgs:
    """What to give to QEMU for the lent overlay at ``path``. Raises :class:`AddcowError`."""
    return QemuArgs(lent_chain(path, (access or Access())._replace(share=True)))


def lent_chain(path: str, access: Access | None = None) -> list[Lent]:
    """The files of the lent overlay at ``path``, from the top down, as absolute paths."""
    access = access or Access()
    with open_chain(path, access=access, lent=True) as overlay:
        lending = lending_of(overlay.cow, overlay.header, overlay.image.file)
        if lending.state is State.LENT_FOR_READING:
            raise _for_reading(overlay, lending, access)
        layers = lent_layers(overlay, lending)
        if _is_streamed(overlay, lending, layers[0], access):
            del layers[1:]
    for file in (name for one in layers for name in (one.path, one.image) if name is not None):
        refuse_no_text(file)
    return layers


def lent_layers(overlay: Overlay, lending: Lending) -> list[Lent]:
    """The files of a chain that is open, from the top down; ``lending``: that of the topmost."""
    layers = [_lent(overlay, lending, State.LENT)]
    layer: Layer | None = overlay.backing
    while layer is not None:
        if not isinstance(layer, Overlay):
            return [*layers, Lent(next(layer.files()).real)]
        below = lending_of(layer.cow, layer.header, layer.image.file)
        layers.append(_lent(layer, below, State.LENT_FOR_READING))
        layer = layer.backing
    return layers


def _lent(layer: Overlay, lending: Lending, wanted: State) -> Lent:
    if lending.header is not None and lending.state is wanted:
        twin = os.path.realpath(lending.twin or "")
        return Lent(twin, layer.image.file.real, _cache_size(lending.header))
    if lending.state is State.LENT:
        raise ImageError(
            path=layer.path,
            problem=f"QEMU may write it through '{lending.twin}', and the overlay above it needs it"
            " as it was: give QEMU only one of them; 'addcow qemu import' takes it back",
        )
    raise not_lent(layer.path, lending)


def _for_reading(layer: Overlay, lending: Lending, access: Access) -> ImageError:
    """The error for a layer that a guest must not write: overlays above it need it."""
    own = {layer.cow.identity, None if lending.twin is None else identity_at(lending.twin)} - {None}
    near = overlays_near([layer.cow.real], access, follows_links=False).overlays
    above = sorted({one.path for one in near if one.is_lent and one.backing in own})
    named = f": {', '.join(above)}" if above else ""
    return ImageError(
        path=layer.path,
        problem=f"it is lent to QEMU for reading only; give QEMU the overlay above it{named}",
    )


def _is_streamed(overlay: Overlay, lending: Lending, top: Lent, access: Access) -> bool:
    """Whether the twin has no backing file any more, and needs none.

    Where its backing file was removed and not all was copied, it is given all the same: what the
    guest sees stays right.
    """
    if overlay.backing is None or lending.header is None or lending.header.backing is not None:
        return False
    # QEMU may have it open: the tables of a twin that has streamed do not become empty again.
    twin = Twin.open(access.beside(top.path)._replace(share=True), top.path, READING)
    try:
        below = overlay.backing.size
        return all(one.state is not Entry.EMPTY or one.start >= below for one in twin.extents())
    finally:
        twin.close()


def refuse_no_text(path: str) -> None:
    """Raise for a name that QEMU cannot be given: its bytes are not UTF-8."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        raise ImageError(
            path=path, problem="QEMU and libvirt take names in UTF-8 only; rename it"
        ) from error


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
    }
    if top.cache:
        node["l2-cache-size"] = top.cache
    if below:
        node["backing"] = {**_node(below), "read-only": True}
    return node


def rebase_command(twin: str, image: str, backing: str, format_: str) -> str:
    """The command that writes the name ``backing`` into a twin, whose data file is ``image``."""
    node, of = _named(_node([Lent(twin, image)])), ["-F", format_] if backing else []
    return shlex.join(["qemu-img", "rebase", "-u", "-b", backing, *of, node])


def commit_command(snapshot: str, layers: list[Lent]) -> str:
    """The command that writes what the qcow2 file ``snapshot`` holds into the twin below it."""
    node = {"driver": "qcow2", "file": {"driver": "file", "filename": snapshot}}
    return shlex.join(["qemu-img", "commit", _named({**node, "backing": _node(layers)})])


def _named(node: dict[str, Any]) -> str:
    """A block node as a file name for qemu-img."""
    return f"json:{json.dumps(node)}"


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
