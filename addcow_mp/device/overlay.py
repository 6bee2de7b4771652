"""An add-cow overlay as a layer: header, bitmap, image file, and what lies below.

A cluster is local when its bit is set, in the file or in the private *pending*
bitmap; local clusters are read from the image file, all others from the backing
file, and as zeros where there is none or it has ended. What the image file holds
in a cluster that is not local is undefined and never shown.

A write makes its clusters local: the rest of a partly written cluster is copied up
from below, then the data is written, then the bits are set in *pending*. Nothing
reaches the bitmap file before :meth:`Overlay.flush`, which takes a copy of pending,
makes the image's data durable, publishes that copy, makes it durable, and only then
drops those bits from pending. So a bit in the file always has its data on disk. A
flush that fails leaves the overlay refusing every further change.

With ALL_ALLOCATED set, bitmap and backing are not consulted at all.

What this layer does not do: share a bitmap with another process. One process writes
an overlay, its threads side by side; requests on the same cluster wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from addcow_mp.device import faults
from addcow_mp.device.extent import Extent, ExtentKind, joined
from addcow_mp.device.files import BUFFER_SIZE, File, copy
from addcow_mp.device.hardlinks import link_warnings
from addcow_mp.device.headers import short_bitmap_warning
from addcow_mp.device.layer import Layer
from addcow_mp.device.manifest_file import invalidate_all
from addcow_mp.device.range_lock import RangeLock
from addcow_mp.device.raw import RawLayer
from addcow_mp.errors import FileError, ImageError, RangeError
from addcow_mp.format.bitmap import CowBitmap, SparseBits
from addcow_mp.format.bits import Run, merged, runs
from addcow_mp.format.geometry import Geometry, virtual_size
from addcow_mp.format.header import FIXED_SIZE, Header
from addcow_mp.units import KiB

#: Clusters whose bits are copied at a time to look at them together with pending ones.
LOOK_BITS = 1024 * KiB


class Overlay:
    """An open add-cow overlay: ``cow`` is the ``.add-cow`` file, ``image`` its image file.

    Takes over the files and layers given to it and closes them. Use
    :func:`addcow_mp.device.chain.open_chain` to open one with all its checks.
    """

    def __init__(
        self, cow: File, image: File, backing: Layer | None, header: Header | None = None
    ) -> None:
        self.cow = cow
        self.image = RawLayer(image, virtual_size(image.length))
        self.backing = backing
        self.header = read_header(cow) if header is None else header
        self.geometry = Geometry(self.image.size, self.header.cluster_size)
        for file in self.files():
            file.cluster_size = self.geometry.cluster_size
        with cow.doing("map its bitmap"):
            if faults.armed:
                faults.hit("bitmap_load")
            self.bitmap = CowBitmap(cow.fd, self.header.header_size, self.geometry, cow.path)
        self.pending = SparseBits()
        self._range_lock = RangeLock()
        self._pending_lock = threading.Lock()
        self._flushing = threading.Lock()
        self._failed: BaseException | None = None
        self._has_changed = False
        #: Called before the first change; raises what stands against it.
        self.permit: Callable[[], None] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Overlay, (self.cow, self.image.file, self.backing, self.header))

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    # What it is

    @property
    def path(self) -> str:
        """The ``.add-cow`` file's path."""
        return self.cow.path

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self.geometry.size

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return self.geometry.cluster_size

    @property
    def all_allocated(self) -> bool:
        """Whether every cluster is local by decree, whatever the bitmap says."""
        return self.header.all_allocated

    @property
    def allocated_clusters(self) -> int:
        """How many clusters are local."""
        if self.all_allocated:
            return self.geometry.clusters
        if not self.pending:
            return self.bitmap.count()
        return sum(stop - first for first, stop in self.allocated_runs())

    def files(self) -> Iterator[File]:
        """The raw file of each depth."""
        yield self.image.file
        if self.backing is not None:
            yield from self.backing.files()

    # Looking

    def runs_by_allocation(self, value: int, start: int, stop: int) -> Iterator[Run]:
        """The runs of clusters in ``[start, stop)`` that are local (1) or not (0)."""
        if self.all_allocated:
            return iter([(start, stop)] if value and start < stop else [])
        if not self.pending:
            return self.bitmap.runs(value, start, stop)
        return merged(self._runs_with_pending(value, start, stop))

    def _runs_with_pending(self, value: int, start: int, stop: int) -> Iterator[Run]:
        for base in range(start, stop, LOOK_BITS):
            with self._pending_lock:
                bits = self.bitmap.slice(base, min(base + LOOK_BITS, stop))
                self.pending.add_to(bits, base)
            for first, last in runs(bits, value, 0, len(bits)):
                yield base + first, base + last

    def allocated_runs(self) -> Iterator[Run]:
        """The runs ``[first, stop)`` of local clusters, in order."""
        if self.all_allocated or self.pending:
            return self.runs_by_allocation(1, 0, self.geometry.clusters)
        return self.bitmap.runs(1, 0, self.bitmap.known)

    def layout(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """``[start, stop)`` in bytes, cut where clusters begin or cease to be local."""
        first, last = self.geometry.touched(start, stop)
        position = start
        for here, there in self.runs_by_allocation(1, first, last):
            local_start, local_stop = self.geometry.span(here, there)
            if position < local_start:
                yield position, local_start, False
            position = min(local_stop, stop)
            yield max(local_start, start), position, True
        if position < stop:
            yield position, stop, False

    def walk(self, start: int, stop: int, depth: int = 0) -> Iterator[Extent]:
        """What ``[start, stop)`` is made of, layer by layer."""
        for first, last, local in self.layout(start, stop):
            if local:
                yield from self.image.walk(first, last, depth)
            else:
                yield from self.walk_below(first, last, depth)

    def walk_below(self, start: int, stop: int, depth: int = 0) -> Iterator[Extent]:
        """What ``[start, stop)`` would be made of if none of it were local."""
        held = start
        if self.backing is not None and start < self.backing.size:
            held = min(stop, self.backing.size)
            yield from self.backing.walk(start, held, depth + 1)
        if held < stop:
            yield Extent(held, stop, depth, ExtentKind.ABSENT)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the guest's bytes from ``offset`` on, within the size."""
        for first, last, local in self.layout(offset, offset + len(view)):
            part = view[first - offset : last - offset]
            if local:
                self.image.read_into(part, first)
            else:
                self._read_below(part, first)

    def _read_below(self, view: memoryview, offset: int) -> None:
        below = 0 if self.backing is None else max(0, self.backing.size - offset)
        if below and self.backing is not None:
            self.backing.read_into(view[:below], offset)
        if below < len(view):
            view[below:] = bytes(len(view) - below)

    def read(self, offset: int, length: int) -> bytes:
        """The guest's ``length`` bytes at ``offset``. Raises :class:`RangeError`."""
        self._check_range(offset, length)
        buffer = bytearray(length)
        if length:
            self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """What the bytes ``[start, stop)`` are made of, adjacent equal extents joined."""
        stop = self.size if stop is None else stop
        self._check_range(start, stop - start)
        return joined(self.walk(start, stop))

    def warnings(self) -> list[str]:
        """What a reader of this chain should be told: one line each."""
        told = short_bitmap_warning(self.path) if self.bitmap.short else []
        told += link_warnings([self.cow, self.image.file])
        return told + (self.backing.warnings() if self.backing is not None else [])

    # Changing

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``offset``; its clusters become local. Raises :class:`RangeError`."""
        view = memoryview(data).cast("B")
        self._change(offset, len(view), lambda: self.image.file.write(view, offset))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make ``length`` bytes at ``offset`` read as zeros, without space where possible."""
        self._change(offset, length, lambda: self.image.file.make_zero(offset, offset + length))

    def _change(self, offset: int, length: int, store: Callable[[], None]) -> None:
        self._check_range(offset, length)
        self.check_writable()
        if length == 0:
            return
        first, stop = self.geometry.touched(offset, offset + length)
        self._begin_changing()
        with self._range_lock.holding(first, stop):
            if not self.all_allocated:
                self._copy_up_around(offset, offset + length)
            store()
            self._mark_allocated(first, stop)

    def ask_permission(self) -> None:
        """Raise what stands against changing this overlay, unless it has been changed already."""
        with self._pending_lock:
            if not self._has_changed:
                self.permit()

    def _begin_changing(self) -> None:
        """Before the first change: see what stands against it, and take away the manifest."""
        with self._pending_lock:
            if not self._has_changed:
                self.permit()
                invalidate_all(self, durable=self.cow.durable)
                self._has_changed = True

    def _mark_allocated(self, first: int, stop: int) -> None:
        if self.all_allocated or (not self.pending and self.bitmap.all(first, stop)):
            return
        with self._pending_lock:
            for start, end in list(self.bitmap.runs(0, first, stop)):
                self.pending.set(start, end)

    def _copy_up_around(self, start: int, stop: int) -> None:
        """Bring up what lies in the clusters of ``[start, stop)`` but not in that range."""
        first, last = self.geometry.touched(start, stop)
        head, tail = self.geometry.span(first, last)
        for edge_start, edge_stop, cluster in ((head, start, first), (stop, tail, last - 1)):
            if edge_start < edge_stop and next(
                self.runs_by_allocation(0, cluster, cluster + 1), None
            ):
                length = min(edge_stop - edge_start, BUFFER_SIZE)
                self.copy_up(edge_start, edge_stop, memoryview(bytearray(length)))

    def copy_up(self, start: int, stop: int, buffer: memoryview) -> None:
        """Copy ``[start, stop)`` from below into the image, whatever the image held there."""
        files = list(self.files())
        for piece in self.walk_below(start, stop):
            if faults.armed:
                self._meet_copy_up(piece, files[min(piece.depth, len(files) - 1)])
            if piece.kind is ExtentKind.DATA:
                copy(files[piece.depth], self.image.file, piece.start, piece.stop, buffer)
            else:
                self.image.file.make_zero(piece.start, piece.stop)

    def _meet_copy_up(self, piece: Extent, source: File) -> None:
        clusters = self.geometry.touched(piece.start, piece.stop)
        for event, file in (("cow_read", source), ("cow_write", self.image.file)):
            with file.doing(f"copy up at {piece.start}"):
                faults.hit(event, clusters)

    def flush(self) -> None:
        """Return when all that was written before is durable: data first, then its bits.

        Raises :class:`SyncError` or :class:`FileError`; the overlay then refuses
        every further change, since what reached the disk is unknown.
        """
        if not self.cow.writable:
            return
        with self._flushing:
            self._refuse_after_failure()
            try:
                self._flush()
            except BaseException as error:
                self._failed = error
                raise

    def _flush(self) -> None:
        with self._pending_lock:
            announced = self.pending.copy()
        self.image.file.sync()
        if not announced:
            return
        self.publish(announced.runs(), 1)
        with self._pending_lock:
            self.pending.drop(announced)

    def publish(self, done: Iterable[Run], value: int, marks: SparseBits | None = None) -> None:
        """Set the bits of the clusters ``done`` and of those in ``marks`` to ``value``, durably.

        The data that this announces, or the copies that make it dispensable, must be
        durable already. Bits past the last cluster are left 0.
        """
        with self.cow.doing("write its bitmap"):
            for first, stop in done:
                if faults.armed:
                    faults.hit("bitmap_update", (first, stop))
                self.bitmap.fill(first, stop, value)
            if marks:
                self._publish_marks(marks, value)
            self.bitmap.clear_stray()
        self.cow.sync()

    def _publish_marks(self, marks: SparseBits, value: int) -> None:
        if faults.armed:
            for run in marks.runs():
                faults.hit("bitmap_update", run)
        self.bitmap.fill_marked(marks, value)

    def set_all_allocated(self, value: bool) -> None:
        """Write the header with ALL_ALLOCATED set or cleared, and make it durable."""
        header = self.header.with_all_allocated(value)
        self.cow.write(header.pack(), 0)
        self.cow.sync()
        self.header = header

    def close(self) -> None:
        """Flush and close all files, those below included."""
        try:
            if self.cow.fd >= 0 and self._failed is None:
                self.flush()
            if self.backing is not None:
                self.backing.close()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close all files, without a flush: what was not flushed was never announced."""
        self.bitmap.unmap()
        self.cow.close()
        self.image.close()
        if self.backing is not None:
            self.backing.abandon()

    # Refusing

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RangeError(path=self.path, offset=offset, length=length, size=self.size)

    def check_writable(self) -> None:
        """Raise unless this overlay may be changed: open for it, whole, and not failed."""
        if not self.cow.writable:
            raise ImageError(path=self.path, problem="it is open for reading only")
        self._refuse_after_failure()
        refuse_short(self)

    def _refuse_after_failure(self) -> None:
        if self._failed is not None:
            raise FileError(
                path=self.path,
                action="change it",
                reason=f"an earlier flush failed ({self._failed}); close it and check the disk",
            )


def refuse_short(overlay: Overlay) -> None:
    """Raise when the file ends inside its bitmap: such an image is read, not written."""
    if overlay.bitmap.short:
        raise ImageError(
            path=overlay.path,
            problem="the file ends inside its bitmap; it can be read, not written, "
            "until the bitmap is repaired",
        )


def read_header(cow: File) -> Header:
    """Read the fixed header; the file must be long enough to have one."""
    buffer = bytearray(FIXED_SIZE)
    cow.read_into(memoryview(buffer), 0)
    return Header.unpack(bytes(buffer))
