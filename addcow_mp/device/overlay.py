"""An add-cow overlay as a layer: header, bitmap, image file, and the layers below.

A cluster is allocated if its bit is set, in the file or in the bitmap *pending* in memory.
Allocated clusters are read from the image file, all others from the backing file, and as zeros if
there is none or it has ended. The contents of the image file in other clusters are undefined and
never shown.

A write allocates its clusters: the rest of a partly written cluster is copied up from below, then
the data is written, then the bits are set in *pending*. Only :meth:`Overlay.flush` writes the
bitmap file: it copies *pending*, makes the image's data durable, publishes the copied bits, makes
them durable, and then drops them from *pending*. So the data of a bit in the file is always on
disk. After a failed flush the overlay refuses every change.

With ALL_ALLOCATED set, bitmap and backing file are ignored.

Only one process writes an overlay. Its threads may write at the same time; requests for the same
cluster wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from addcow_mp.device import faults
from addcow_mp.device.extent import AscendingWalk, Extent, ExtentKind, joined
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
from addcow_mp.format.header import Header
from addcow_mp.units import KiB, round_down

#: Clusters whose bits are copied at a time, to combine them with pending ones.
COPY_BITS = 1024 * KiB


class Overlay:
    """An open add-cow overlay: ``cow`` is the ``.add-cow`` file, ``image`` its image file.

    ``path`` is the path of ``cow``; ``size``, the virtual size, and ``cluster_size`` are in bytes.
    The overlay owns the files and layers given to it and closes them. Use
    :func:`addcow_mp.device.chain.open_chain` to open one with all checks.
    """

    def __init__(self, cow: File, image: File, backing: Layer | None, header: Header) -> None:
        self.cow = cow
        self.path = cow.path
        self.image = RawLayer(image, virtual_size(image.length))
        self.backing = backing
        self.header = header
        #: Whether every cluster is allocated, whatever the bitmap says.
        self.all_allocated = header.all_allocated
        self.cluster_size = header.cluster_size
        for file in self.files():
            file.cluster_size = self.cluster_size
        with cow.doing("map its bitmap"):
            if faults.armed:
                faults.hit("bitmap_load")
            self._take_size(self.image.size)
        self.pending = SparseBits()
        self._range_lock = RangeLock()
        self._pending_lock = threading.Lock()
        self._flushing = threading.Lock()
        self._failed: BaseException | None = None
        self._has_changed = False
        #: The paths of its manifests, which the first change has removed.
        self.manifests_removed: list[str] = []
        #: Called before the first change; it raises if the overlay must not be changed.
        self.refuse_change: Callable[[], None] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Overlay, (self.cow, self.image.file, self.backing, self.header))

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _take_size(self, size: int) -> None:
        self.size, self.geometry = size, Geometry(size, self.cluster_size)
        self.bitmap = CowBitmap(
            self.cow.fd,
            self.header.header_size,
            self.geometry,
            self.path,
            alone=self.cow.excludes_writers,
        )

    def use_size(self, size: int) -> None:
        """Go on with another virtual size, which the image file has or is about to get.

        Nothing is written. No write may be pending.
        """
        self.bitmap.unmap()
        self.image = RawLayer(self.image.file, size)
        self._take_size(size)

    # Properties

    @property
    def allocated_clusters(self) -> int:
        """The number of allocated clusters."""
        if self.all_allocated:
            return self.geometry.clusters
        if not self.pending:
            return self.bitmap.count()
        return sum(stop - first for first, stop in self.allocated_runs())

    @property
    def is_empty(self) -> bool:
        """Whether no cluster is allocated, and the image file has no space that can be freed."""
        image, end = self.image.file, self.size
        if image.length > end:  # bytes behind the view are not read, and keep the block of its end
            end = round_down(end, image.block_size)
        data = image.next_data(0)
        return self.allocated_clusters == 0 and (data is None or data >= end)

    def files(self) -> Iterator[File]:
        """The raw file of each depth."""
        yield self.image.file
        if self.backing is not None:
            yield from self.backing.files()

    # Reading

    def runs_by_allocation(self, value: int, start: int, stop: int) -> Iterator[Run]:
        """The runs of clusters in ``[start, stop)`` that are allocated (1) or not (0)."""
        if self.all_allocated:
            return iter([(start, stop)] if value and start < stop else [])
        if not self.pending:
            return self.bitmap.runs(value, start, stop)
        return merged(self._runs_with_pending(value, start, stop))

    def _runs_with_pending(self, value: int, start: int, stop: int) -> Iterator[Run]:
        for base in range(start, stop, COPY_BITS):
            with self._pending_lock:
                bits = self.bitmap.slice(base, min(base + COPY_BITS, stop))
                self.pending.add_to(bits, base)
            for first, last in runs(bits, value, 0, len(bits)):
                yield base + first, base + last

    def allocated_runs(self) -> Iterator[Run]:
        """The runs ``[first, stop)`` of allocated clusters, in order."""
        return self.runs_by_allocation(1, 0, self.geometry.clusters)

    def layout(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """The bytes ``[start, stop)`` in runs that are allocated (True) or not."""
        first, last = self.geometry.touched(start, stop)
        position = start
        for run in self.runs_by_allocation(1, first, last):
            run_start, run_stop = self.geometry.span(*run)
            if position < run_start:
                yield position, run_start, False
            position = min(run_stop, stop)
            yield max(run_start, start), position, True
        if position < stop:
            yield position, stop, False

    def walk(self, start: int, stop: int, depth: int = 0) -> Iterator[Extent]:
        """The extents of ``[start, stop)``, layer by layer."""
        own = AscendingWalk(partial(self.image.walk, depth=depth), stop)
        below = AscendingWalk(partial(self.walk_below, depth=depth), stop)
        for first, last, allocated in self.layout(start, stop):
            yield from (own if allocated else below).extents(first, last)

    def walk_below(self, start: int, stop: int, depth: int = 0) -> Iterator[Extent]:
        """The extents that ``[start, stop)`` would have if no cluster were allocated."""
        held = start
        if self.backing is not None and start < self.backing.size:
            held = min(stop, self.backing.size)
            yield from self.backing.walk(start, held, depth + 1)
        if held < stop:
            yield Extent(held, stop, depth, ExtentKind.ABSENT)

    def is_allocated(self, cluster: int) -> bool:
        """Whether one cluster is allocated."""
        # A flush writes a bit to the file before it drops it from the pending ones: asked in the
        # other order, a bit could be seen in neither of them.
        return self.all_allocated or self.pending.is_set(cluster) or self.bitmap.is_set(cluster)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the guest's bytes from ``offset`` on, within the size."""
        cluster, rest = divmod(offset, self.cluster_size)
        if rest + len(view) <= self.cluster_size:
            # Within one cluster no run is searched for: random reads of a guest are short.
            read = self.image.read_into if self.is_allocated(cluster) else self._read_below
            read(view, offset)
            return
        for first, last, allocated in self.layout(offset, offset + len(view)):
            part = view[first - offset : last - offset]
            if allocated:
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
        """The extents of the bytes ``[start, stop)``; adjacent equal ones are joined."""
        stop = self.size if stop is None else stop
        self._check_range(start, stop - start)
        return joined(self.walk(start, stop))

    def warnings(self) -> list[str]:
        """What a user of this chain should know, one line each."""
        return [
            *(short_bitmap_warning(self.path) if self.bitmap.short else []),
            *link_warnings([self.cow, self.image.file]),
            *(self.backing.warnings() if self.backing is not None else []),
        ]

    # Changing

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``offset`` and allocate its clusters. Raises :class:`RangeError`."""
        view = memoryview(data).cast("B")
        self._change(offset, len(view), lambda: self.image.file.write(view, offset))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make ``length`` bytes at ``offset`` read as zeros, without space where possible."""
        self._change(offset, length, lambda: self.image.file.make_zero(offset, offset + length))

    def discard(self, offset: int, length: int) -> None:
        """Free the whole clusters of a range: they then read as zeros. Other bytes stay."""
        self._check_range(offset, length)
        size, stop = self.cluster_size, offset + length
        start = -(-offset // size) * size
        stop = stop if stop == self.size else stop // size * size
        self.write_zeroes(min(start, stop), max(0, stop - start))

    def _change(self, offset: int, length: int, store: Callable[[], None]) -> None:
        self._check_range(offset, length)
        if not self._has_changed or self._failed is not None:
            self.check_writable()
        if length == 0:
            return
        if not self._has_changed:
            self._begin_to_change()
        first, stop = self.geometry.touched(offset, offset + length)
        if self._are_allocated(first, stop):
            # Nothing is copied up over these clusters any more, and no bit changes.
            store()
            return
        with self._range_lock.holding(first, stop):
            self._copy_up_around(offset, offset + length)
            store()
            self._mark_allocated(first, stop)

    def _begin_to_change(self) -> None:
        with self._pending_lock:
            if not self._has_changed:
                self.refuse_change()
                self.manifests_removed += invalidate_all(self, durable=self.cow.durable)
                self._has_changed = True

    def check_permission(self) -> None:
        """Raise if this overlay must not be changed, unless it has been changed already."""
        with self._pending_lock:
            if not self._has_changed:
                self.refuse_change()

    def _are_allocated(self, first: int, stop: int) -> bool:
        if stop - first == 1:
            return self.is_allocated(first)
        return next(self.runs_by_allocation(0, first, stop), None) is None

    def _mark_allocated(self, first: int, stop: int) -> None:
        with self._pending_lock:
            for start, end in list(self.bitmap.runs(0, first, stop)):
                self.pending.set(start, end)

    def _copy_up_around(self, start: int, stop: int) -> None:
        """Copy up the rest of the clusters that ``[start, stop)`` covers only in part."""
        first, last = self.geometry.touched(start, stop)
        head, tail = self.geometry.span(first, last)
        for edge_start, edge_stop, cluster in ((head, start, first), (stop, tail, last - 1)):
            if edge_start < edge_stop and not self.is_allocated(cluster):
                length = min(edge_stop - edge_start, BUFFER_SIZE)
                self.copy_up(edge_start, edge_stop, memoryview(bytearray(length)))

    def copy_up(self, start: int, stop: int, buffer: memoryview) -> None:
        """Copy ``[start, stop)`` from below into the image file, over its former contents."""
        files = list(self.files())
        for extent in self.walk_below(start, stop):
            if faults.armed:
                clusters = self.geometry.touched(extent.start, extent.stop)
                source = files[min(extent.depth, len(files) - 1)]
                for event, file in (("cow_read", source), ("cow_write", self.image.file)):
                    with file.doing(f"copy up at {extent.start}"):
                        faults.hit(event, clusters)
            if extent.kind is ExtentKind.DATA:
                copy(files[extent.depth], self.image.file, extent.start, extent.stop, buffer)
            else:
                self.image.file.make_zero(extent.start, extent.stop)

    def flush(self) -> None:
        """Make all earlier writes durable: first the data, then its bits.

        Raises :class:`SyncError` or :class:`FileError`. The overlay then refuses every change,
        because it is unknown what reached the disk.
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

        The data of bits that are set, or the copies of clusters whose bits are cleared, must be
        durable already. Bits past the last cluster are cleared.
        """
        with self.cow.doing("write its bitmap"):
            for first, stop in done:
                if faults.armed:
                    faults.hit("bitmap_update", (first, stop))
                self.bitmap.fill(first, stop, value)
            if marks:
                for run in marks.runs() if faults.armed else ():
                    faults.hit("bitmap_update", run)
                self.bitmap.fill_marked(marks, value)
            self.bitmap.clear_stray()
        self.cow.sync()

    def clear_bitmap(self) -> None:
        """Clear all bits in one step, durably: whatever interrupts it, all are cleared or none is.

        The file is cut where its bitmap begins, since bits behind its end read as 0.
        """
        self.bitmap.unmap()
        self.cow.cut(self.header.header_size)
        self.cow.grow(self.header.header_size + self.geometry.bitmap_length)
        self.cow.sync(attributes=True)

    def set_all_allocated(self, value: bool) -> None:
        """Write the header with ALL_ALLOCATED set or cleared, and make it durable."""
        self.write_header(self.header.with_all_allocated(value))

    def write_header(self, header: Header) -> None:
        """Write ``header`` in one write, and make it durable. Names are not written.

        A write that fails may have written a part: then the old header is written again.
        """
        try:
            self.cow.write(header.pack(), 0)
        except FileError:
            with suppress(FileError):
                self.cow.write(self.header.pack(), 0)
            raise
        self.cow.sync()
        self.header = header
        self.all_allocated = header.all_allocated

    def close(self) -> None:
        """Flush what a guest has written, and close all files, including those below."""
        try:
            # A job has synced what must be durable: another sync would wait for the disk again.
            if self._has_changed and self.cow.fd >= 0 and self._failed is None:
                self.flush()
            if self.backing is not None:
                self.backing.close()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close all files without a flush: bits that were not flushed are not in the bitmap."""
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
        """Raise unless this overlay is open for writing, complete, and no flush has failed."""
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
    """Raise if the file ends inside its bitmap: such an overlay can only be read."""
    if overlay.bitmap.short:
        raise ImageError(
            path=overlay.path,
            problem="the file ends inside its bitmap; it can be read, and written again after "
            "'addcow check -r all' has repaired the bitmap",
        )
