"""The way back: what QEMU has made of an overlay becomes the overlay's own bits and bytes.

The order is such that a stop at any moment leaves a state that the same command finishes:

1. The twin's tables are read and checked, and the space for copying up is asked for.
2. The image file: clusters that are allocated in part are copied up, clusters that read as zeros
   are made zeros, its length becomes the size that QEMU knows. Synced. None of this changes what
   QEMU reads through the twin.
3. The bitmap of the file that is still marked. Synced.
4. One write disables the twin, durably.
5. One write clears the mark, and sets ALL_ALLOCATED where all is allocated, durably.
6. The twin is removed, durably. What is not allocated is freed, synchronous writes end.

Layers below are taken back after their last overlay, if a complete search finds no other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise, zip_longest
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.attributes import SYNCHRONOUS, has_attribute, set_attribute
from addcow_mp.device.chain import LENDING, Use, open_chain
from addcow_mp.device.discovery import overlays_near
from addcow_mp.device.files import BUFFER_SIZE, File, identity_at, new_buffer
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.headers import load_names, resolve
from addcow_mp.device.locks import READING, RESIZING
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.twin import (
    Identity,
    Twin,
    damaged_twin,
    directory_number,
    make_writable,
    other_data_file,
    twins_in,
)
from addcow_mp.errors import (
    AddcowError,
    GuestRunsError,
    ImageError,
    LockedError,
    SpaceError,
    UsageError,
)
from addcow_mp.format.bitmap import PAGE_BITS, CowBitmap, SparseBits
from addcow_mp.format.bits import BITS_PER_BYTE, Run, merged
from addcow_mp.format.geometry import Geometry
from addcow_mp.format.header import ADD_COW
from addcow_mp.format.names import path_combine, path_has_protocol
from addcow_mp.format.qcow2 import Header as TwinHeader
from addcow_mp.format.qcow2_read import Extent
from addcow_mp.format.qcow2_read import State as Entry
from addcow_mp.jobs.lending import (
    Lending,
    State,
    foreign_twin,
    is_original_twin,
    lending_of,
)
from addcow_mp.jobs.qemu_args import commit_command, lent_layers, rebase_command
from addcow_mp.jobs.qemu_export import (
    backing_of_twin,
    layers_below,
    punch_unallocated,
    refuse_writable_twin,
    remove_leftover,
)
from addcow_mp.jobs.removal import refuse_partial, refuse_removal, remove
from addcow_mp.jobs.report import Outcome, Report, ending, reporting

#: Longer runs of clusters are written at once, and not held in memory.
LONG_RUN = 64 * PAGE_BITS

#: Marks over so many clusters are held in memory before they are written: at most 16 MiB.
WINDOW = 4096 * PAGE_BITS


class ImportOptions(NamedTuple):
    """What the user allows.

    ``discard``: remove the ``.add-cow`` file when all is allocated. ``adopt``: take a copy of the
    twin or of the ``.add-cow`` file for the original. ``abandon``: give up what QEMU has written.
    """

    discard: bool = False
    adopt: bool = False
    abandon: bool = False


DEFAULTS = ImportOptions()


def take_back(
    path: str, options: ImportOptions = DEFAULTS, *, access: Access | None = None
) -> Report:
    """Take the overlay at ``path`` back from QEMU; also finish what was interrupted.

    Raises :class:`AddcowError`; refusals come before the first byte is written.
    """
    access = access or Access()
    if options.abandon and not access.force:
        raise UsageError(message="--abandon gives up what the guest has written; it needs --force")
    with reporting("qemu import", path) as report:
        with _guest_is_off(), open_chain(path, LENDING, access, lent=True) as overlay:
            layers = _layers(overlay, access)
            _by_state(overlay, options, access, report)
        for above, layer in pairwise([overlay.cow.real, *layers]):
            _take_layer_back(layer, above, access, report)
    return report


@contextmanager
def _guest_is_off() -> Iterator[None]:
    """A block in which a file that is in use is probably used by a guest."""
    try:
        yield
    except LockedError as error:
        raise GuestRunsError(**error.fields) from error


def _layers(overlay: Overlay, access: Access) -> list[str]:
    """The layers below, from the top down.

    An overlay in which all is allocated is opened without them, and an interrupted command may have
    left them lent. They may also be gone, or lie where its names must not lead.
    """
    names = load_names(overlay.cow, overlay.header)
    if not overlay.all_allocated or names.backing is None or names.backing_format != ADD_COW:
        return [layer.path for layer in layers_below(overlay)]
    confined = access.beside(overlay.cow.real)._replace(files=frozenset())
    with suppress(AddcowError):
        path = resolve(overlay.cow, names.backing)
        with open_chain(path, access=confined, lent=True) as layer:
            return [layer.path, *(one.path for one in layers_below(layer))]
    return []


def _by_state(overlay: Overlay, options: ImportOptions, access: Access, report: Report) -> None:
    lending = lending_of(overlay.cow, overlay.header, overlay.image.file)
    report.state_before = lending.state
    if lending.state is State.FOREIGN_TWIN:
        raise foreign_twin(overlay.path, lending)
    if lending.state is State.LENT_FOR_READING:
        _finish_layer(overlay, lending, None, options, access, report)
        return
    if lending.state is State.TWIN_MISSING:
        _abandon(overlay, options, report)
    with _opened(lending, access) as twin:
        if lending.state in (State.LENT, State.HALFWAY) and not options.adopt:
            _refuse_copies(overlay, lending)
            _refuse_other_data_file(overlay, lending)
        if lending.state is State.LENT:
            overlay = _bring_back(overlay, twin, access, report)
        _finish(overlay, twin, report)
    _discard(overlay, options, access, report)


@contextmanager
def _opened(lending: Lending, access: Access) -> Iterator[Twin | None]:
    """The twin of a lending, locked alone; None where there is none."""
    if lending.twin is None:
        yield None
        return
    twin = Twin.open(access.beside(lending.twin), lending.twin, RESIZING)
    try:
        yield twin
    finally:
        twin.close()


# Refusals


def _abandon(overlay: Overlay, options: ImportOptions, report: Report) -> None:
    """Go on without a twin, if the user gives up what QEMU has written."""
    if not options.abandon:
        damaged = damaged_twin(os.path.dirname(overlay.cow.base), overlay.header.lent_id or 0)
        if damaged is not None:
            raise ImageError(path=damaged[0], problem=damaged[1])
        raise ImageError(
            path=overlay.path,
            problem="it is lent to QEMU, and the qcow2 file that it is used through is not beside "
            "it; move it back, or give up what the guest has written with --abandon --force: the "
            "overlay is then a mixture of old and new data",
        )
    report.warnings.append(
        f"{overlay.path}: what the guest has written is given up; the overlay may be a mixture"
    )


def _refuse_copies(overlay: Overlay, lending: Lending) -> None:
    """Raise when the twin or the ``.add-cow`` file is a copy."""
    mark, copies = lending.mark, []
    if Identity.of(overlay.cow) != (mark.cow_inode, mark.cow_birth):
        copies.append(overlay.path)
    if lending.twin and lending.header and not is_original_twin(lending.twin, lending.header):
        copies.append(lending.twin)
    if copies:
        raise ImageError(
            path=copies[0],
            problem="it is a copy of what was lent: what QEMU has written since may be missing; "
            "if it is the right one, --adopt takes it back",
        )


def _refuse_other_data_file(overlay: Overlay, lending: Lending) -> None:
    """Raise when QEMU may have written into another file than the image file."""
    if lending.header is None:
        return
    other = other_data_file(lending.header, overlay.image.file.identity)
    if other is not None and identity_at(other) is not None:
        raise ImageError(
            path=lending.twin or overlay.path,
            problem=f"it names '{other}' as its data file, and not {overlay.image.file.path}: what "
            "QEMU has written may be there; if it is not, --adopt takes it back",
        )


def _refuse_twin(overlay: Overlay, twin: Twin, access: Access) -> None:
    """Raise when QEMU has made something of the twin that cannot come back."""
    _refuse_other_backing(overlay, twin)
    own = twin.file.identity
    others = [one.path for one in overlays_near([twin.path], access).overlays if one.backing == own]
    if others:
        raise ImageError(
            path=twin.path,
            problem=f"it is the backing file of {', '.join(sorted(others))}, a snapshot; commit "
            f"that and remove it first: {_commit_command(overlay, sorted(others)[0])}",
        )


def _commit_command(overlay: Overlay, snapshot: str) -> str:
    lending = lending_of(overlay.cow, overlay.header, overlay.image.file)
    return commit_command(snapshot, lent_layers(overlay, lending))


def _refuse_other_backing(overlay: Overlay, twin: Twin) -> None:
    name = twin.header.backing
    if name is None:
        return
    path = path_combine(twin.path, os.fsdecode(name))
    expected = _expected_backing(overlay)
    found = None if path_has_protocol(os.fsdecode(name)) else identity_at(path)
    if expected is None or found != identity_at(expected):
        raise ImageError(
            path=twin.path,
            problem=f"its backing file is '{os.fsdecode(name)}' and was '{expected or ''}'; "
            f"restore it: {_rebase_command(overlay, twin)}",
        )


def _rebase_command(overlay: Overlay, twin: Twin) -> str:
    """The command that gives a twin the backing file that it was made with."""
    name, format_ = backing_of_twin(overlay)
    image = overlay.image.file.path
    return rebase_command(twin.path, image, os.fsdecode(name or b""), (format_ or b"raw").decode())


def _expected_backing(overlay: Overlay) -> str | None:
    """The file that the twin was made with as its backing file."""
    if overlay.backing is None:
        return None
    if not isinstance(overlay.backing, Overlay):
        return overlay.backing.path
    layer = overlay.backing
    return lending_of(layer.cow, layer.header, layer.image.file).twin


# What QEMU has made of it


class _Clusters:
    """The twin's tables in clusters of the overlay."""

    def __init__(self, overlay: Overlay, twin: Twin) -> None:
        self.twin = twin
        self.geometry = Geometry(twin.header.fixed.size, overlay.cluster_size)
        #: Bytes of the backing file that an empty entry shows; more are zeros.
        below = 0 if overlay.backing is None else overlay.backing.size
        self._below = below
        self._was_streamed = twin.header.backing is None and overlay.backing is not None
        self._restore = _rebase_command(overlay, twin) if self._was_streamed else ""

    def parts(self) -> Iterator[tuple[Run, list[Extent]]]:
        """Runs of clusters, with what they are made of: one extent, or several of one cluster."""
        size, mixed = self.geometry.cluster_size, list[Extent]()
        for extent in self._extents():
            start = extent.start
            if mixed or start % size:
                stop = min(extent.stop, (start // size + 1) * size)
                mixed.append(Extent(start, stop, extent.state))
                if stop % size and stop < self.geometry.size:
                    continue
                yield self.geometry.touched(mixed[0].start, stop), mixed
                mixed, start = [], stop
            stop = extent.stop if extent.stop == self.geometry.size else extent.stop // size * size
            if start < stop:
                yield self.geometry.touched(start, stop), [Extent(start, stop, extent.state)]
            if max(start, stop) < extent.stop:
                mixed = [Extent(max(start, stop), extent.stop, extent.state)]

    def _extents(self) -> Iterator[Extent]:
        """The extents of the twin; without a backing file, empty ones behind its end are zeros."""
        for extent in self.twin.extents():
            if extent.state is not Entry.EMPTY or not self._was_streamed:
                yield extent
            elif extent.start < self._below:
                raise ImageError(
                    path=self.twin.path,
                    problem="its backing file was removed, and not all that it held was copied "
                    f"(at {extent.start}); restore it: {self._restore}",
                )
            else:
                yield Extent(extent.start, extent.stop, Entry.ZERO)

    def copied_up(self) -> int:
        """Bytes that are copied up at most. Raises :class:`ImageError` for unusable tables."""
        return sum(
            one.stop - one.start
            for _, extents in self.parts()
            if len(extents) > 1
            for one in extents
            if one.state is Entry.EMPTY
        )

    def allocated(self) -> Iterator[Run]:
        """The clusters that become allocated."""
        runs = (run for run, extents in self.parts() if not _is_empty(extents))
        return merged(runs)


def _is_empty(extents: list[Extent]) -> bool:
    return len(extents) == 1 and extents[0].state is Entry.EMPTY


def _bring_back(overlay: Overlay, twin: Twin | None, access: Access, report: Report) -> Overlay:
    """Steps 1 to 3; the overlay as it is now, in the same open files."""
    assert twin is not None  # noqa: S101 - a lent overlay has one
    _refuse_twin(overlay, twin, access)
    refuse_linked([overlay.cow, overlay.image.file], force=access.force)
    clusters = _Clusters(overlay, twin)
    _refuse_image(overlay, clusters)
    if twin.header.has_bitmaps:
        report.warnings.append(f"{twin.path}: its persistent bitmaps are lost")
    report.begin_changes()
    overlay = _resized(overlay, clusters.geometry)
    _fill(overlay, clusters)
    overlay.image.file.sync()
    _publish(overlay, clusters)
    return overlay


def _refuse_image(overlay: Overlay, clusters: _Clusters) -> None:
    """Raise when the image is too short, or what the way back writes does not fit."""
    image, size = overlay.image.file, clusters.geometry.size
    if image.length < size:
        raise ImageError(
            path=image.path,
            problem=f"it has {image.length} bytes, and QEMU knew {size}: it was cut short; restore "
            "it from a backup",
        )
    _refuse_without_space(image, clusters.copied_up())
    _refuse_without_space(overlay.cow, _bitmap_space(overlay, clusters))


def _bitmap_space(overlay: Overlay, clusters: _Clusters) -> int:
    """Bytes of holes of the ``.add-cow`` file that the bits will lie in."""
    start, page = overlay.header.header_size, PAGE_BITS // BITS_PER_BYTE
    pages = merged(
        (start + first // PAGE_BITS * page, start + -(-stop // PAGE_BITS) * page)
        for first, stop in clusters.allocated()
    )
    return sum(
        stop - first - sum(last - data for data, last in overlay.cow.data_runs(first, stop))
        for first, stop in pages
    )


def _refuse_without_space(file: File, needed: int) -> None:
    free = file.free_space
    if needed > free:
        raise SpaceError(path=file.path, needed=needed, free=free)


def _resized(overlay: Overlay, geometry: Geometry) -> Overlay:
    """The overlay with the size that QEMU knows."""
    image, cow = overlay.image.file, overlay.cow
    if image.length != geometry.size:
        image.cut(geometry.size)
    cow.grow(overlay.header.header_size + geometry.bitmap_length)
    if geometry.size == overlay.size and not overlay.bitmap.short:
        return overlay
    overlay.bitmap.unmap()
    return Overlay(cow, image, overlay.backing, overlay.header)


def _fill(overlay: Overlay, clusters: _Clusters) -> None:
    """Make the image file hold what a guest sees of every cluster that becomes allocated."""
    buffer = new_buffer(min(BUFFER_SIZE, max(overlay.cluster_size, 1)))
    for _, extents in clusters.parts():
        for one in extents:
            if one.state is Entry.ZERO:
                overlay.image.file.make_zero(one.start, one.stop)
            elif one.state is Entry.EMPTY and len(extents) > 1:
                overlay.copy_up(one.start, one.stop, buffer)


def _publish(overlay: Overlay, clusters: _Clusters) -> None:
    """Make the bits those of the twin's tables, durably."""
    bits, marks, begin = overlay.bitmap, SparseBits(), 0
    with overlay.cow.doing("write its bitmap"):
        for first, stop in clusters.allocated():
            if stop - first > LONG_RUN or first - begin > WINDOW:
                _write_bits(bits, marks, begin, first)
                marks, begin = SparseBits(), first
            if stop - first > LONG_RUN:
                bits.fill(first, stop, 1)
                begin = stop
            else:
                marks.set(first, stop)
        _write_bits(bits, marks, begin, overlay.geometry.clusters)
        bits.clear_stray()
    overlay.cow.sync()


def _write_bits(bits: CowBitmap, marks: SparseBits, start: int, stop: int) -> None:
    """Make the bits ``[start, stop)`` equal to ``marks``; holes with no mark stay holes."""
    for first, last in merged(sorted((*bits.data_runs(start, stop), *marks.pages()))):
        bits.publish(max(first, start), min(last, stop), marks.copy_to)


# The end


def _finish(overlay: Overlay, twin: Twin | None, report: Report) -> None:
    """Steps 4 to 6; every one of them can be repeated."""
    report.begin_changes()
    if twin is not None and not twin.header.disabled:
        twin.disable()
    if overlay.header.lent_id is not None:
        _clear_mark(overlay)
    if twin is not None:
        twin.remove()
        _warn_of_copies(twin, report)
    if not overlay.all_allocated:
        punch_unallocated(overlay)
    if has_attribute(overlay.image.file.fd, SYNCHRONOUS):
        set_attribute(overlay.image.file.fd, SYNCHRONOUS, False)
    report.outcome = Outcome.DONE


def _warn_of_copies(twin: Twin, report: Report) -> None:
    """Warn of other files through which QEMU could still write the image file."""
    own = twin.header.mark
    for path, other in twins_in(os.path.dirname(twin.path)):
        if own is not None and other.mark is not None and other.mark.lent_id == own.lent_id:
            report.warnings.append(
                f"{path}: QEMU may write the image file through this copy of '{twin.path}'; "
                "remove it"
            )


def _clear_mark(overlay: Overlay) -> None:
    header = overlay.header.with_lent(0, 0)
    if overlay.allocated_clusters == overlay.geometry.clusters:
        header = header.with_all_allocated(True)
    overlay.write_header(header)


def _discard(overlay: Overlay, options: ImportOptions, access: Access, report: Report) -> None:
    if not options.discard:
        return
    done = "taken back from QEMU"
    with ending(overlay.path, done, "the .add-cow file was not removed"):
        refuse_partial(overlay)
        refuse_removal(overlay, access)
    remove(overlay, report, done)


# Layers below


def _take_layer_back(path: str, above: str, access: Access, report: Report) -> None:
    """Take a layer back that is lent for reading, if nothing needs it any more.

    A twin that an interrupted export has left beside the layer is removed.
    """
    try:
        with open_chain(path, {0: Use(RESIZING, READING)}, access.beside(path), lent=True) as layer:
            lending = lending_of(layer.cow, layer.header, layer.image.file)
            if lending.state is State.LENT_FOR_READING:
                _finish_layer(layer, lending, above, DEFAULTS, access, report)
            elif lending.state in (State.LEFTOVER, State.FOREIGN_TWIN) and lending.twin:
                if lending.state is not State.LEFTOVER:
                    refuse_writable_twin(layer, lending)
                remove_leftover(lending.twin)
    except AddcowError as error:
        reason = str(error).removeprefix(f"{path}: ")
        report.warnings.append(f"{path}: it was not taken back: {reason}")


def _finish_layer(
    layer: Overlay,
    lending: Lending,
    above: str | None,
    options: ImportOptions,
    access: Access,
    report: Report,
) -> None:
    """Clear the mark of a layer. Raises :class:`ImageError` while something may still need it.

    ``above``: the overlay with which it comes back; None where the user names the layer.
    """
    reason = _still_needed(layer, lending, above, access)
    if reason is not None:
        raise ImageError(path=layer.path, problem=f"it is lent to QEMU for reading, and {reason}")
    if lending.twin is not None and not _is_unchanged(layer, lending.twin, access):
        _give_up_changes(lending.twin, options, report)
    report.begin_changes()
    if lending.twin is not None:
        make_writable(lending.twin)
        twin = Twin.open(access.beside(lending.twin), lending.twin, RESIZING)
        try:
            twin.disable()
            layer.write_header(layer.header.with_lent(0, 0))
            twin.remove()
        finally:
            twin.close()
    report.outcome = Outcome.DONE


def _give_up_changes(twin: str, options: ImportOptions, report: Report) -> None:
    """Raise where something has written through a layer's twin, unless that is to be given up."""
    changed = "something has written through it, although it is for reading"
    if not options.abandon:
        raise ImageError(path=twin, problem=f"{changed}; --abandon --force gives that up")
    report.warnings.append(f"{twin}: {changed}; that is given up, the layer may be a mixture")


def _still_needed(
    layer: Overlay, lending: Lending, above: str | None, access: Access
) -> str | None:
    """Why a layer cannot be taken back yet; None when it can."""
    if lending.twin is None:
        return "the qcow2 file that it is read through is not beside it"
    if lending.header and not _is_searched(lending.header, above, access):
        return (
            "overlays in directories that are not searched may need it; when all of them are back, "
            f"'addcow qemu import --root DIR {layer.path}' takes it back, with each such DIR"
        )
    twin = identity_at(lending.twin)
    near = overlays_near([layer.cow.real, lending.twin, above or layer.cow.real], access)
    users = [one for one in near.overlays if twin is not None and one.backing == twin]
    users += [one for one in near.overlays if one.backing == layer.cow.identity and one.is_lent]
    if users:
        named = [one for one in users if one.is_overlay] or users
        names = ", ".join(sorted({one.path for one in named}))
        return f"{names} above it need it: take these back first"
    if near.unread or near.hidden:
        return f"'{(*near.unread, *near.hidden)[0].path}' cannot be examined"
    return None


def _is_searched(twin: TwinHeader, above: str | None, access: Access) -> bool:
    """Whether the search covers all directories with overlays that a layer was lent for."""
    if not twin.used_elsewhere:
        return True
    if above is None:
        return bool(access.roots)
    return twin.used_only_in(directory_number(os.path.dirname(os.path.realpath(above))))


def _is_unchanged(layer: Overlay, path: str, access: Access) -> bool:
    """Whether the tables of a layer's twin say what its bitmap says."""
    try:
        twin = Twin.open(access.beside(path), path, READING)
    except AddcowError:
        return False
    try:
        spans = (layer.geometry.span(*run) for run in layer.allocated_runs())
        found = (one for one in twin.extents() if one.state is not Entry.EMPTY)
        expected = (Extent(start, stop, Entry.ALLOCATED) for start, stop in spans)
        return all(one == other for one, other in zip_longest(found, expected))
    finally:
        twin.close()
