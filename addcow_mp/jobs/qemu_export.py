"""The way out: an overlay is lent to QEMU, which uses it through a new twin beside it.

Nothing is copied: the twin says in qcow2's tables what the bitmap says. The order is such that a
stop at any moment leaves a state that ``qemu import`` finishes (:mod:`addcow_mp.jobs.lending`):

1. Layers below are lent for reading, from the bottom up. Manifests are removed. What is not
   allocated of the image file is prepared. Image and ``.add-cow`` file are synced.
2. The twin is written disabled and gets its name when it is durable.
3. One write sets the mark in the ``.add-cow`` file, durably.
4. One write enables the twin, durably.

QEMU does not make data durable before the table that announces it. So in a power cut a cluster that
a guest has just written for the first time can show what the image file held there before. *Strict*
lending makes that harmless: what is not allocated is cloned from below into the image file, or the
image file's writes are synchronous (``chattr +S``) as long as it is lent. *Relaxed* lending does
neither, and describes single sectors, so that nothing is lost that the guest did not write itself.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from addcow_mp.device.access import Access
from addcow_mp.device.attributes import SYNCHRONOUS, has_attribute, set_attribute, why_not_set
from addcow_mp.device.chain import Use, Uses, open_chain
from addcow_mp.device.copying import Copier, CopyMethod, CopyOptions
from addcow_mp.device.extent import ExtentKind
from addcow_mp.device.filesystem import can_share
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.headers import Names, load_names
from addcow_mp.device.locks import READING, RESIZING, narrow
from addcow_mp.device.manifest_file import invalidate_all
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.twin import (
    READ_ONLY_MODE,
    Identity,
    Twin,
    data_file_name,
    default_twin,
    lent_error,
    make_twin,
    mark_used_in,
    refuse_other_owner,
    remove_twin,
    twin_of,
)
from addcow_mp.errors import FileError, ImageError, UsageError
from addcow_mp.format.bits import Run
from addcow_mp.format.header import LENT, LENT_FOR_READING, RAW
from addcow_mp.format.qcow2 import (
    DATA_FILE,
    EXTENDED_L2,
    SECTOR_CLUSTER_BITS,
    Fixed,
    Header,
    Kind,
    Mark,
)
from addcow_mp.format.qcow2_entries import MAX_L1_BYTES, Tables
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.lending import Lending, State, foreign_twin, lending_of, refuse_not_here
from addcow_mp.jobs.qemu_args import refuse_no_text

#: Bits of a random id.
ID_BITS = 62

QCOW2 = b"qcow2"


class Protection(StrEnum):
    """What keeps a power cut from showing old data of the image file."""

    CLONED = "cloned"
    SYNCHRONOUS = "synchronous"
    NOT_NEEDED = "not-needed"
    NONE = "none"


@dataclass
class Exported:
    """An overlay that was lent within ``seconds``: its twin, and how it is protected.

    ``layers``: the layers below, which were lent for reading.
    """

    filename: str
    twin: str
    kind: Kind
    protection: Protection
    layers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    manifests_removed: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """The public keys."""
        return {
            "operation": "qemu export",
            "filename": self.filename,
            "twin": self.twin,
            "kind": self.kind.name.lower(),
            "protection": self.protection,
            "layers-lent-for-reading": self.layers,
            "seconds": round(self.seconds, 6),
            **({"manifests-removed": self.manifests_removed} if self.manifests_removed else {}),
        }


def export(
    path: str,
    twin: str | None = None,
    *,
    relaxed: bool = False,
    absolute_data_file: bool = False,
    access: Access | None = None,
) -> Exported:
    """Lend the overlay at ``path`` to QEMU through the new file ``twin`` in its directory.

    Raises :class:`AddcowError`; refusals come before the first byte is written.
    """
    access, begun = access or Access(), time.monotonic()
    with open_chain(path, _uses(path, access), access, lent=True) as overlay:
        target = _target(overlay, twin)
        lending = _refuse(overlay, target, access)
        _refuse_twins(overlay, target)
        protection = _protection(overlay, relaxed=relaxed)
        result = Exported(path, target, _kind(relaxed), protection)
        _lend_layers(overlay, result)
        if lending.state is State.LEFTOVER and lending.twin is not None:
            remove_leftover(lending.twin)
        _prepare_image(overlay, result)
        _hand_over(overlay, result, absolute=absolute_data_file)
    result.seconds = time.monotonic() - begun
    return result


def _kind(relaxed: bool) -> Kind:
    return Kind.SECTOR if relaxed else Kind.PLAIN


def _uses(path: str, access: Access) -> Uses:
    """How each layer is opened: those that are not lent yet get a mark, and are locked alone."""
    uses = {0: Use(RESIZING, RESIZING)}
    with open_chain(path, access=access, lent=True) as overlay:
        for depth, layer in enumerate(layers_below(overlay), 1):
            if not layer.header.lent_for_reading:
                uses[depth] = Use(RESIZING, READING)
    return uses


def layers_below(overlay: Overlay) -> Iterator[Overlay]:
    """The overlays below ``overlay``, from the top down."""
    layer = overlay.backing
    while isinstance(layer, Overlay):
        yield layer
        layer = layer.backing


# Refusals


def _target(overlay: Overlay, twin: str | None) -> str:
    """The path of the new twin, in the directory in which the overlay really lies."""
    directory = os.path.dirname(overlay.cow.real)
    if twin is None:
        return default_twin(overlay.cow.base)
    if not twin:
        raise UsageError(message="QCOW2: the name is empty")
    if os.path.realpath(os.path.dirname(twin) or ".") != directory:
        raise ImageError(
            path=twin,
            problem=f"it must lie in the directory of the .add-cow file, {directory}; name a file "
            "there",
        )
    return twin


def _refuse(overlay: Overlay, target: str, access: Access) -> Lending:
    lending = lending_of(overlay.cow, overlay.header, overlay.image.file)
    refuse_not_here(overlay.cow, overlay.header, lending)
    for layer in layers_below(overlay):
        if layer.header.lent:
            twin = twin_of(layer.cow.base, layer.header)
            raise lent_error(layer.path, layer.header, twin)
        refuse_short(layer)
    if overlay.all_allocated:
        raise ImageError(
            path=overlay.path,
            problem="every cluster is allocated: its image file alone is the disk; 'addcow flatten "
            "--discard' removes the .add-cow file, and QEMU uses the raw file",
        )
    refuse_short(overlay)
    changed = [overlay.cow, overlay.image.file]
    refuse_dependants(overlay, changed, access)
    refuse_linked(changed, force=access.force)
    _refuse_name(target, lending)
    for layer in (overlay, *layers_below(overlay)):
        _refuse_directory(os.path.dirname(layer.cow.real))
    return lending


def _refuse_name(target: str, lending: Lending) -> None:
    """Raise unless a file can be made at ``target``."""
    try:
        os.lstat(target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError.of(target, "make it", error) from error
    if lending.twin != target:
        raise ImageError(path=target, problem="it exists already; name another file")


def _refuse_directory(directory: str) -> None:
    """Raise where no twin can be made."""
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        problem = "the qcow2 file is made in this directory, and it cannot be written"
        raise ImageError(path=directory, problem=problem)


def _refuse_twins(overlay: Overlay, target: str) -> None:
    """Raise when the twins cannot be made, or QEMU could not be given their names."""
    for file in overlay.files():
        refuse_no_text(file.real)
    places = [(overlay, os.path.join(os.path.dirname(overlay.cow.real), os.path.basename(target)))]
    places += [(layer, default_twin(layer.cow.base)) for layer in layers_below(overlay)]
    for layer, place in places:
        refuse_no_text(place)
        if not layer.header.lent_for_reading:
            refuse_other_owner(place, layer.image.file)


def _protection(overlay: Overlay, *, relaxed: bool) -> Protection:
    """How a power cut is made harmless. Raises :class:`ImageError` where nothing does it."""
    image, below = overlay.image.file, list(overlay.files())[1:]
    _refuse_size(overlay, _kind(relaxed))
    if relaxed:
        return Protection.NONE
    if not below:
        return Protection.NOT_NEEDED
    if all(can_share(image, file) for file in below):
        return Protection.CLONED
    before = has_attribute(image.fd, SYNCHRONOUS)
    refused = why_not_set(image.fd, SYNCHRONOUS, True)
    if refused is None:
        set_attribute(image.fd, SYNCHRONOUS, before)
        return Protection.SYNCHRONOUS
    if refused in (errno.EPERM, errno.EACCES):
        raise ImageError(
            path=image.path,
            problem=f"chattr +S is refused ({os.strerror(refused)}), which only its owner and root "
            "may set: run the command as one of them; --crash relaxed lends it without",
        )
    raise ImageError(
        path=image.path,
        problem="its file system neither clones blocks of the backing file nor has synchronous "
        "files (chattr +S): a power cut could damage what the guest has written; --crash relaxed "
        "lends it all the same",
    )


def _refuse_size(overlay: Overlay, kind: Kind) -> None:
    bits = SECTOR_CLUSTER_BITS if kind is Kind.SECTOR else overlay.header.cluster_bits
    most = MAX_L1_BYTES // 8 * Tables(1 << bits, extended=kind is Kind.SECTOR).coverage
    if overlay.size > most:
        raise ImageError(
            path=overlay.path,
            problem=f"its size is {overlay.size} bytes, and with such clusters QEMU takes {most}",
        )


# The image file


def remove_leftover(twin: str) -> None:
    """Remove the disabled twin that an interrupted command has left."""
    remove_twin(twin)


def _prepare_image(overlay: Overlay, result: Exported) -> None:
    """Step 1: cut the image to the virtual size, and make what is not allocated harmless."""
    image = overlay.image.file
    result.manifests_removed = invalidate_all(overlay, durable=image.durable)
    if image.length > overlay.size:
        behind = image.length - overlay.size
        result.warnings.append(f"{image.path}: {behind} bytes behind its last sector were cut off")
        image.cut(overlay.size)
    if result.protection is Protection.CLONED:
        _clone_from_below(overlay)
    else:
        punch_unallocated(overlay)
    if result.protection is Protection.SYNCHRONOUS:
        set_attribute(image.fd, SYNCHRONOUS, True)
    image.sync(attributes=True)
    overlay.cow.sync()


def _clone_from_below(overlay: Overlay) -> None:
    """Let the image file share what is read of clusters that are not allocated."""
    image, files = overlay.image.file, list(overlay.files())
    copier = Copier(image, CopyOptions(CopyMethod.CLONE))
    for run in overlay.runs_by_allocation(0, 0, overlay.geometry.clusters):
        for extent in overlay.walk_below(*overlay.geometry.span(*run)):
            if extent.kind is ExtentKind.DATA:
                copier.move(files[extent.depth], extent.start, extent.stop)
            else:
                image.make_zero(extent.start, extent.stop)


def punch_unallocated(overlay: Overlay) -> None:
    """Free what the image file holds in clusters that are not allocated."""
    for run in overlay.runs_by_allocation(0, 0, overlay.geometry.clusters):
        overlay.image.file.make_zero(*overlay.geometry.span(*run))


# Layers below


def _lend_layers(overlay: Overlay, result: Exported) -> None:
    """Lend the layers below for reading, from the bottom up, and keep them locked as read."""
    chain = [overlay, *layers_below(overlay)]
    for above, layer in reversed(list(pairwise(chain))):
        if not layer.header.lent_for_reading:
            _lend_for_reading(layer)
            narrow(layer.cow, READING)
        directory = os.path.dirname(above.cow.real)
        if directory != os.path.dirname(layer.cow.real):
            lending = lending_of(layer.cow, layer.header, layer.image.file)
            if lending.twin is not None and lending.header is not None:
                mark_used_in(directory, lending.twin, lending.header)
        result.layers.append(layer.path)


def _lend_for_reading(layer: Overlay) -> None:
    target, lent_id = default_twin(layer.cow.base), secrets.randbits(ID_BITS)
    lending = lending_of(layer.cow, layer.header, layer.image.file)
    if lending.twin is not None:
        refuse_writable_twin(layer, lending)
        remove_leftover(lending.twin)
    elif os.path.lexists(target):
        raise ImageError(path=target, problem="it exists, and the layer needs a twin; move it")
    header = _twin_header(layer, Kind.PLAIN, lent_id, absolute=False)
    make_twin(target, header, lambda: _runs(layer), like=layer.image.file, mode=READ_ONLY_MODE)
    layer.write_header(layer.header.with_lent(LENT_FOR_READING, lent_id))


def refuse_writable_twin(layer: Overlay, lending: Lending) -> None:
    """Raise unless the twin of a layer without a mark is one that an interrupted command has left.

    Such a one is for reading. QEMU may write through any other.
    """
    if lending.twin is not None and os.stat(lending.twin).st_mode & stat.S_IWUSR:
        raise foreign_twin(layer.path, lending)


# The twin


def _hand_over(overlay: Overlay, result: Exported, *, absolute: bool) -> None:
    """Steps 2 to 4."""
    lent_id = secrets.randbits(ID_BITS)
    header = _twin_header(overlay, result.kind, lent_id, absolute=absolute).with_disabled(True)
    make_twin(result.twin, header, lambda: _runs(overlay), like=overlay.image.file)
    twin = Twin.open(Access().beside(result.twin), result.twin, RESIZING)
    try:
        overlay.write_header(overlay.header.with_lent(LENT, lent_id))
        twin.enable()
    finally:
        twin.close()


def _runs(overlay: Overlay) -> Iterator[Run]:
    """What is allocated, in bytes."""
    return (overlay.geometry.span(*run) for run in overlay.allocated_runs())


def _twin_header(overlay: Overlay, kind: Kind, lent_id: int, *, absolute: bool) -> Header:
    image, sector = overlay.image.file, kind is Kind.SECTOR
    mark = Mark(kind, lent_id, *Identity.of(overlay.cow), *Identity.of(image), 0, 0)
    backing, format_ = backing_of_twin(overlay)
    return Header(
        Fixed(
            cluster_bits=SECTOR_CLUSTER_BITS if sector else overlay.header.cluster_bits,
            size=overlay.size,
            incompatible=DATA_FILE | (EXTENDED_L2 if sector else 0),
        ),
        mark,
        backing,
        format_,
        os.fsencode(image.real) if absolute else data_file_name(lent_id),
    )


def backing_of_twin(overlay: Overlay) -> tuple[bytes | None, bytes | None]:
    """Name and format of the twin's backing file: the raw base, or the twin of the layer below."""
    names = load_names(overlay.cow, overlay.header)
    if overlay.backing is None or names.backing is None:
        return None, None
    if not isinstance(overlay.backing, Overlay):
        return os.fsencode(names.backing), RAW.encode()
    return os.fsencode(_twin_beside(overlay.backing, names)), QCOW2


def _twin_beside(layer: Overlay, names: Names) -> str:
    """The twin of the layer below, named as the overlay names the layer."""
    lending = lending_of(layer.cow, layer.header, layer.image.file)
    if lending.twin is None:
        raise ImageError(path=layer.path, problem="the file that QEMU reads it through is missing")
    name = os.path.basename(lending.twin)
    if os.path.exists(os.path.join(os.path.dirname(layer.path), name)):
        return os.path.join(os.path.dirname(names.backing or ""), name)
    # A symbolic link leads to the layer: its twin lies beside the layer itself.
    return lending.twin
