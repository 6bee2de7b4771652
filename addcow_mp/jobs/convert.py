"""Convert: copy the guest's view into a new sparse raw file.

The new file has holes wherever the chain has no data. An existing file is never overwritten, and
the new one is removed when the job fails.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial

from addcow_mp.device.access import Access
from addcow_mp.device.chain import open_layer, readers_of_chain
from addcow_mp.device.files import TARGET, File, sync_directory
from addcow_mp.device.headers import take_locks
from addcow_mp.device.layer import Layer
from addcow_mp.device.locks import RESIZING
from addcow_mp.device.magic import refuse_as_raw
from addcow_mp.device.manifest_file import invalidate
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.permissions import Readers
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.allocation import alignment, data_stretches
from addcow_mp.engine.selection import WholeView
from addcow_mp.engine.targets import RawTarget
from addcow_mp.engine.tasks import cut
from addcow_mp.engine.transfer_plan import TransferPlan
from addcow_mp.errors import StoppedError, UnfinishedError
from addcow_mp.format.geometry import Geometry
from addcow_mp.format.header import ADD_COW
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.jobs.report import Report, reporting
from addcow_mp.jobs.transfer_job import move
from addcow_mp.units import KiB

#: A raw source has no clusters: its tasks and reports use this unit.
RAW_UNIT = 64 * KiB

#: Blocks of so many zeros become holes of the new file, unless the user chooses another size: the
#: block of most file systems, and what qemu-img convert looks for.
USUAL_SPARSE = 4 * KiB


def convert(
    source: str,
    destination: str,
    *,
    source_format: str = ADD_COW,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
) -> Report:
    """Copy the guest's view of ``source`` into the new raw file ``destination``.

    Raises :class:`AddcowError`; ``destination`` does not exist then.
    """
    access = options.access
    with reporting("convert", source) as report:
        layer = open_layer(source, source_format, access=access)
        try:
            if isinstance(layer, RawLayer) and not access.force:
                refuse_as_raw(layer.file)
            with _new_file(destination, readers_of_chain(layer), report, access) as target:
                move([_plan(layer, target)], report, options, hooks)
        except StoppedError:
            raise UnfinishedError(path=destination) from None
        finally:
            layer.close()
    return report


@contextlib.contextmanager
def _new_file(path: str, readers: Readers, report: Report, access: Access) -> Iterator[File]:
    file, durable = File.create(path, readers), access.durable
    try:
        file.role, file.durable = TARGET, durable
        report.manifests_removed += invalidate(path, durable=durable)
        take_locks(file, RESIZING, access)
        yield file
        file.sync()
        if durable:
            sync_directory(path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        file.close()


def _plan(layer: Layer, target: File) -> TransferPlan:
    unit = layer.cluster_size if isinstance(layer, Overlay) else RAW_UNIT
    geometry, target.cluster_size = Geometry(layer.size, unit), unit
    tasks = cut(data_stretches(list(layer.files()), geometry, alignment(unit)), geometry.clusters)
    selection, grow = WholeView(layer, geometry), partial(target.grow, layer.size)
    return TransferPlan(selection, RawTarget(target, is_fresh=True), tasks, prepare=grow)
