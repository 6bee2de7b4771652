"""Reads back what a job wrote: proof that the disk holds what the guest saw before.

The guest's view is digested before the job: as a whole, and for each group of leaves, so that a
difference has a place. After the job, whatever it changed is unmapped, synced and dropped from
memory, the files are opened again, and the view is digested from what the disk returns. The job's
own descriptors stay open, and with them its locks: no other program changes the files in between.

The first digest reads into memory what the job is about to move, so only the second reading costs
time. The digests are not stored; manifests store them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from addcow_mp.device import faults
from addcow_mp.device.chain import open_layer
from addcow_mp.device.layer import Layer
from addcow_mp.device.layers import own_files
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.page_cache import drop_cached, refuse_unknowable
from addcow_mp.engine.allocation import data_stretches
from addcow_mp.engine.scan import ScanHooks, scan
from addcow_mp.engine.tasks import Task, cut
from addcow_mp.engine.view_digest import View
from addcow_mp.engine.worker import Failed
from addcow_mp.errors import (
    AddcowError,
    FileError,
    ImageError,
    NotReadBackError,
    ReadBackError,
    StoppedError,
    UnverifiedError,
)
from addcow_mp.format.geometry import Geometry
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.format.leaves import GROUP, view_digest, zero_node
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.report import Report


@dataclass(frozen=True)
class ViewDigests:
    """What a guest sees in ``size`` bytes: the nodes of all groups that have data, by number.

    ``weight``: about how many bytes were read for it.
    """

    size: int
    nodes: dict[int, bytes]
    weight: int

    @cached_property
    def digest(self) -> str:
        """The guest digest, in hexadecimal."""
        return view_digest(self.size, self.nodes)

    def differing(self, other: ViewDigests) -> list[int]:
        """Return the groups in which ``other``, of the same size, differs."""
        zero = zero_node(1)
        numbers = sorted(self.nodes.keys() | other.nodes.keys())
        return [one for one in numbers if self.nodes.get(one, zero) != other.nodes.get(one, zero)]


def digest_view(layer: Layer, size: int, options: RunOptions, hooks: Hooks) -> ViewDigests:
    """Digest the first ``size`` bytes of ``layer``. Raises :class:`RestartsError` when stopped."""
    tasks = _tasks(layer, size)
    nodes = dict[int, bytes]()

    def failed(result: Failed) -> None:
        start, stop = result.task.first * GROUP, min(result.task.stop * GROUP, layer.size)
        action = f"read what the guest sees from {start} to {stop}"
        raise FileError(path=layer.path, action=action, reason=str(result.error))

    scan_hooks = ScanHooks(layer.path, failed, hooks.stopping, progress=hooks.progress)
    for _, found in scan(View(layer, size), tasks, options.scan_options, scan_hooks):
        nodes |= found
    return ViewDigests(size, nodes, sum(task.weight for task in tasks))


def _tasks(layer: Layer, size: int) -> list[Task]:
    geometry = Geometry(size, GROUP)
    return cut(data_stretches(list(layer.files()), geometry, 1), geometry.clusters)


# Around a job


@dataclass(frozen=True)
class Proof:
    """What is read back: the view of ``layer``, which a job must preserve.

    ``written``: the layer that receives data. ``changed``: all layers whose files change.
    """

    layer: Layer
    written: Layer
    changed: tuple[Layer, ...]

    @property
    def path(self) -> str:
        """The file that receives the data."""
        return next(self.written.files()).path


@contextmanager
def reading_back(
    overlay: Overlay, proof: Proof | None, options: RunOptions, hooks: Hooks, report: Report
) -> Iterator[Hooks]:
    """Around a job after which ``proof`` must show what ``overlay`` shows; None = read nothing.

    Yields the hooks of the job itself. Raises :class:`ReadBackError` for other content,
    :class:`NotReadBackError` when it is stopped, and :class:`UnverifiedError` when it fails.
    """
    if proof is None:
        yield hooks
        return
    for one in proof.changed:
        for file in own_files(one):
            refuse_unknowable(file)
    before = digest_view(overlay, overlay.size, options, hooks.within(0, 0))
    weight = before.weight
    yield hooks.within(weight, weight)
    # The job's own locks also conflict with a second opening. And a layer in the middle of the
    # chain may name files beside the top of it.
    access = options.access.beside(overlay.cow.base)._replace(share=True)
    options = replace(options, access=access)
    after = _read_back(proof, before.size, options, hooks.within(2 * weight, 0))
    differing = before.differing(after)
    if differing:
        start = differing[0] * GROUP
        raise ReadBackError(path=proof.path, start=start, length=min(GROUP, before.size - start))
    report.guest_digest = after.digest


def _read_back(proof: Proof, size: int, options: RunOptions, hooks: Hooks) -> ViewDigests:
    try:
        _drop_from_memory(proof)
        return _digest_again(proof, size, options, hooks)
    except StoppedError:
        raise NotReadBackError(path=proof.path) from None
    except AddcowError as error:
        raise UnverifiedError(path=proof.path, cause=str(error)) from error


def _drop_from_memory(proof: Proof) -> None:
    for one in proof.changed:
        if isinstance(one, Overlay):
            one.bitmap.unmap()
        for file in own_files(one):
            drop_cached(file)
    if faults.armed:
        with next(proof.written.files()).doing("read it back"):
            faults.hit("read_back")


def _digest_again(proof: Proof, size: int, options: RunOptions, hooks: Hooks) -> ViewDigests:
    format_ = ADD_COW if isinstance(proof.layer, Overlay) else RAW
    with closing(open_layer(proof.layer.path, format_, access=options.access)) as layer:
        if layer.size != proof.layer.size:
            problem = f"it is {layer.size} bytes large, and was {proof.layer.size}"
            raise ImageError(path=next(layer.files()).path, problem=problem)
        return digest_view(layer, size, options, hooks)
