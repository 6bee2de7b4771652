"""Quick estimate: what a job would do with a plain image, by a few system calls.

Most images of a farm are plain: three regular files with one name each, which no other program uses
and no other overlay needs, a raw backing file, little to move. For those the quick estimate says
what the estimates of :mod:`addcow_mp.jobs.commit`, :mod:`addcow_mp.jobs.flatten` and
:mod:`addcow_mp.jobs.reset` would say, without the objects of a job. It refuses nothing: anything
unusual is left to the full estimate.

As there, each file that the job will write is opened for writing, and nothing is written. The job
itself trusts no estimate: it opens and locks the files, and may refuse what has changed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bitarray import bitarray

from addcow_mp.device import faults
from addcow_mp.device.files import File, free_bytes
from addcow_mp.device.filesystem import can_share
from addcow_mp.device.holders import refuse_held
from addcow_mp.device.location import base_path
from addcow_mp.device.manifest_file import SUFFIX
from addcow_mp.engine.allocation import alignment, data_stretches
from addcow_mp.engine.space import SpaceNeeded, copied_parts
from addcow_mp.engine.tasks import TASK_BYTES
from addcow_mp.errors import AddcowError
from addcow_mp.farm.image_job import ImageJob, Operation
from addcow_mp.farm.plain import (
    FLAGS,
    HEAD,
    LONGEST_BITMAP,
    NotPlainError,
    Place,
    Places,
    bits_in,
    legal,
    plain_name,
    require,
)
from addcow_mp.format.bits import Run, runs
from addcow_mp.format.geometry import Geometry, virtual_size
from addcow_mp.format.header import FIXED_SIZE, MAGIC, RAW, Header, format_name
from addcow_mp.format.names import path_combine
from addcow_mp.jobs.options import RunOptions
from addcow_mp.jobs.report import Estimate

#: The bits of a mode with which everybody may read.
_READABLE = stat.S_IRGRP | stat.S_IROTH


class _Plain(NamedTuple):
    """A plain overlay: its open files, its header, and its bits."""

    cow: File
    image: File
    base: File
    header: Header
    geometry: Geometry
    bits: bitarray

    @property
    def allocated(self) -> int:
        """The number of allocated clusters."""
        return self.bits.count(1, 0, self.geometry.clusters)

    @property
    def is_empty(self) -> bool:
        """Whether no cluster is allocated, and the image file has no space that can be freed."""
        if self.allocated:
            return False
        data = self.image.next_data(0)
        return data is None or data >= self.geometry.size

    def spans(self, bit: int) -> Iterator[Run]:
        """The bytes of the clusters whose bits are ``bit``."""
        return (self.geometry.span(*run) for run in runs(self.bits, bit, 0, self.geometry.clusters))


class QuickEstimates:
    """The quick estimates of one process."""

    def __init__(self, options: RunOptions) -> None:
        self._access = options.access
        self._copy_options = options.copy_options
        self._places = Places(options.access)
        #: The block size of each file system whose files share blocks, None for others.
        self._blocks: dict[int, int | None] = {}
        self._estimates: dict[Operation, Callable[[_Plain], Estimate | None]] = {
            Operation.COMMIT: self._of_commit,
            Operation.FLATTEN: self._of_flatten,
            Operation.RESET: self._of_reset,
        }

    def of(self, image_job: ImageJob) -> Estimate | None:
        """What ``image_job`` would do; None when there is nothing to do.

        Raises :class:`NotPlainError` when only the full estimate can tell.
        """
        nearby, spec = image_job.nearby, image_job.spec
        require(not (nearby.overlays or nearby.more or nearby.unread or nearby.hidden))
        require(spec.operation in self._estimates)
        require(not (image_job.receives or spec.discard or self._access.share or faults.armed))
        opened: list[File] = []
        try:
            commits = spec.operation is Operation.COMMIT
            plain = self._plain(image_job.path, opened, commits=commits)
            return self._estimates[spec.operation](plain)
        except (OSError, ValueError, AddcowError) as error:
            raise NotPlainError from error
        finally:
            for file in opened:
                os.close(file.fd)

    # Files

    def _plain(self, path: str, opened: list[File], *, commits: bool) -> _Plain:
        place = self._places.place(path)
        require(place[0].startswith(self._places.roots))
        cow = self._opened(path, place, opened)
        head = os.pread(cow.fd, HEAD, 0)
        require(head.startswith(MAGIC))
        header = legal(head[:FIXED_SIZE])
        require(header.name_ranges()[-1][1] <= len(head) and not header.all_allocated)
        require(header.has_backing)
        require(format_name(header.image_format) == format_name(header.backing_format) == RAW)
        base_of_names = base_path(path, "".join(place))
        ranges = (
            (header.image_offset, header.image_size),
            (
                header.backing_offset,
                header.backing_size,
            ),
        )
        image_name, backing_name = (plain_name(head, *each) for each in ranges)
        where = self._places.target(place, image_name)
        image = self._opened(path_combine(base_of_names, image_name), where, opened)
        where = self._places.target(place, backing_name)
        backing_path = path_combine(base_of_names, backing_name)
        base = self._opened(backing_path, where, opened, writable=commits)
        require(len({file.identity for file in opened}) == len(opened))
        size = image.first_status.st_size
        geometry = Geometry(size, header.cluster_size)
        start = header.header_size
        require(size and size == virtual_size(size) and geometry.bitmap_used <= LONGEST_BITMAP)
        require(cow.first_status.st_size >= start + geometry.bitmap_length)
        bits = bits_in(cow.fd, start, start + geometry.bitmap_used)
        return _Plain(cow, image, base, header, geometry, bits)

    def _opened(
        self, path: str, place: Place, opened: list[File], *, writable: bool = True
    ) -> File:
        """Open a plain file; one that will be written has one name and no manifest."""
        real = "".join(place)
        # No device is opened for writing.
        require(stat.S_ISREG(os.lstat(real).st_mode))
        fd = os.open(real, FLAGS | (os.O_RDWR if writable else os.O_RDONLY))
        file = File(path, fd, writable=writable)
        opened.append(file)
        status = file.first_status = self._places.status(fd)
        if writable:
            require(status.st_nlink == 1 and not os.path.lexists(real + SUFFIX))
            refuse_held(file, locking=self._access.locking)
        return file

    # Estimates

    def _of_commit(self, plain: _Plain) -> Estimate | None:
        image, base, geometry = plain.image, plain.base, plain.geometry
        require(os.pread(base.fd, len(MAGIC), 0) != MAGIC)
        if plain.is_empty:
            return None
        weight = plain.allocated * geometry.cluster_size
        require(weight <= TASK_BYTES)
        taken, freed = self._taken(image, base, plain.spans(1)), 0
        device = base.first_status.st_dev
        gives_back = image.first_status.st_dev == device
        if gives_back:
            block = self._block(image, base)
            held = image.data_runs(0, geometry.size)
            freed = _length(part for run in held for part in self._copied(run, block))
        return Estimate(weight, SpaceNeeded(taken, taken, freed), base.path, device, gives_back)

    def _of_flatten(self, plain: _Plain) -> Estimate:
        image, base, geometry = plain.image, plain.base, plain.geometry
        # Otherwise the job lets fewer users read the image file.
        require(base.first_status.st_mode & _READABLE == _READABLE)
        weight = 0
        for stretch in data_stretches([image, base], geometry, alignment(geometry.cluster_size)):
            stop = min(stretch.stop, geometry.clusters)
            missing = stop - stretch.first - plain.bits.count(1, stretch.first, stop)
            weight += min(stretch.weight, missing * geometry.cluster_size)
        require(weight <= TASK_BYTES)
        holes = _bitmap_holes(plain)
        require(holes <= free_bytes(os.fstatvfs(plain.cow.fd)))
        end = base.first_status.st_size
        spans = ((start, min(stop, end)) for start, stop in plain.spans(0) if start < end)
        taken = self._taken(base, image, spans) + holes
        space = SpaceNeeded(taken, taken, 0)
        return Estimate(weight, space, image.path, image.first_status.st_dev)

    def _of_reset(self, plain: _Plain) -> Estimate | None:
        if plain.is_empty:
            return None
        image, freed = plain.image, SpaceNeeded(freed=plain.image.allocated)
        return Estimate(0, freed, image.path, image.first_status.st_dev)

    def _taken(self, source: File, target: File, spans: Iterable[Run]) -> int:
        """The bytes of ``spans`` that are copied from ``source`` into holes of ``target``."""
        block = self._block(source, target)
        return sum(
            stop - start - _length(target.data_runs(start, stop))
            for span in spans
            for run in source.data_runs(*span)
            for start, stop in self._copied(run, block)
        )

    def _copied(self, run: Run, block: int | None) -> Iterator[Run]:
        return copied_parts(*run, self._copy_options, block)

    def _block(self, source: File, target: File) -> int | None:
        """The block size of the file system that both share blocks on, if they do."""
        device = target.first_status.st_dev
        if source.first_status.st_dev != device:
            return None
        if device not in self._blocks:
            shares = can_share(source, target)
            self._blocks[device] = target.block_size if shares else None
        return self._blocks[device]


def _length(parts: Iterable[Run]) -> int:
    return sum(stop - start for start, stop in parts)


def _bitmap_holes(plain: _Plain) -> int:
    """Bytes of the used part of the bitmap that are holes of the file."""
    start, used = plain.header.header_size, plain.geometry.bitmap_used
    return used - _length(plain.cow.data_runs(start, start + used))
