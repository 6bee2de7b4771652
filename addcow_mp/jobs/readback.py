"""Read-back: proof that what a job wrote is on the disk, and is what its guest saw before.

A *sight* is what a guest sees, as digests: one of the whole, and one for each group of leaves, so
that a difference has a place. One is taken before the job; afterwards whatever the job changed is
unmapped, synced and dropped from memory, the files are opened anew, and a second one is taken of
what the disk gives. The job's own descriptors stay open meanwhile, and with them its locks:
nobody else comes in between.

The first sight brings into memory what the job is about to move, so it is the second reading
that costs. Nothing is remembered: who wants to know later, too, makes manifests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from addcow_mp.device import faults
from addcow_mp.device.chain import open_layer
from addcow_mp.device.files import File
from addcow_mp.device.layer import Layer
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

    It took reading about ``weight`` bytes.
    """

    size: int
    nodes: dict[int, bytes]
    weight: int

    @cached_property
    def digest(self) -> str:
        """The guest's digest, in hexadecimal."""
        return view_digest(self.size, self.nodes)

    def differing(self, other: ViewDigests) -> list[int]:
        """The groups in which ``other``, of the same size, shows something else."""
        zero = zero_node(1)
        numbers = sorted(self.nodes.keys() | other.nodes.keys())
        return [one for one in numbers if self.nodes.get(one, zero) != other.nodes.get(one, zero)]


def digest_view(layer: Layer, size: int, options: RunOptions, hooks: Hooks) -> ViewDigests:
    """See the first ``size`` bytes of ``layer``. Raises :class:`RestartsError` when stopped."""
    tasks = _tasks(layer, size)
    nodes = dict[int, bytes]()

    def failed(result: Failed) -> None:
        start, stop = result.task.first * GROUP, min(result.task.stop * GROUP, layer.size)
        action = f"look at what is seen from {start} to {stop}"
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
    """What is to be read back: the view of ``layer``, all of whose bytes a job is to preserve.

    ``written`` is the layer that receives data, ``changed`` are all whose files change.
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
    """Around a job after which ``proof`` shall show what ``overlay`` shows; None asks for none.

    Yields the hooks of the job itself. Raises :class:`ReadBackError` for other content,
    :class:`NotReadBackError` when it is stopped, and :class:`UnverifiedError` for whatever else
    keeps it from an answer.
    """
    if proof is None:
        yield hooks
        return
    for one in proof.changed:
        for file in _own_files(one):
            refuse_unknowable(file)
    before = digest_view(overlay, overlay.size, options, hooks.within(0, 0))
    weight = before.weight
    yield hooks.within(weight, weight)
    # Our own locks stand against everybody, and so against a second opening as well; and what is
    # opened from the middle of the chain on may name what lies beside its top.
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
        return _seen_anew(proof, size, options, hooks)
    except StoppedError:
        raise NotReadBackError(path=proof.path) from None
    except AddcowError as error:
        raise UnverifiedError(path=proof.path, cause=str(error)) from error


def _seen_anew(proof: Proof, size: int, options: RunOptions, hooks: Hooks) -> ViewDigests:
    expected = proof.layer.size
    for one in proof.changed:
        if isinstance(one, Overlay):
            one.bitmap.unmap()
        for file in _own_files(one):
            drop_cached(file)
    if faults.armed:
        with next(proof.written.files()).doing("read it back"):
            faults.hit("read_back")
    format_ = ADD_COW if isinstance(proof.layer, Overlay) else RAW
    with closing(open_layer(proof.layer.path, format_, access=options.access)) as anew:
        if anew.size != expected:
            problem = f"it is {anew.size} bytes large, and was {expected}"
            raise ImageError(path=next(anew.files()).path, problem=problem)
        return digest_view(anew, size, options, hooks)


def _own_files(layer: Layer) -> list[File]:
    """The files of this layer alone."""
    own = [next(layer.files())]
    return [*own, layer.cow] if isinstance(layer, Overlay) else own
