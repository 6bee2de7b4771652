"""One task of verifying: compares parts of layers with their manifests.

Each layer is compared alone, without its backing file, so that a difference has a file and a
place. First everything but the leaves (:mod:`addcow_mp.engine.layer_state`): a file that was
replaced is not read. Then the leaves (:mod:`addcow_mp.engine.leaf_compare`).

A task has several parts. It ends when it has read so much that another process may take the rest,
or when the job is stopped. The result says what is left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.chain import refuse_lent
from addcow_mp.device.files import BACKING, COW, IMAGE, new_buffer
from addcow_mp.device.headers import Names, errors_naming, load_header, load_names, open_claimed
from addcow_mp.device.layer import Layer
from addcow_mp.device.locks import READING
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.layer_state import (
    ManifestCache,
    compare_backing,
    find_manifest,
    has_same_bitmap,
    has_same_files,
    report_damaged_header,
)
from addcow_mp.engine.leaf_compare import LeafComparison, Sample
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.throttle import STEPS_PER_SECOND
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.errors import AddcowError, LentError, StoppedError
from addcow_mp.findings import LayerReport, Severity
from addcow_mp.format.header import ADD_COW
from addcow_mp.format.leaves import FAN, GROUP, LEAF
from addcow_mp.units import EiB, MiB

#: Groups with data for one task, 256 MiB: so the parts of a large layer are shared evenly.
GROUPS_PER_TASK = 256 * MiB // GROUP

#: A number behind all leaves.
END = EiB // LEAF * 16


@dataclass(frozen=True)
class LayerRef:
    """A layer to be verified: an overlay or a raw file.

    ``holder``: the path that the name of this layer in an overlay is relative to; None = the user
    named the layer.
    """

    path: str
    format: str = ADD_COW
    holder: str | None = None


@dataclass(frozen=True, order=True, slots=True)
class LeafRange:
    """The leaves ``[first, stop)`` of the layer with this ``index`` among the targets."""

    index: int
    first: int = 0
    stop: int = END


@dataclass(frozen=True, slots=True)
class VerifyTask(Task):
    """Some parts, to be verified one after the other, and the layer of each."""

    parts: tuple[LeafRange, ...]
    targets: tuple[LayerRef, ...]


class Verified(NamedTuple):
    """The result for a part, and the ranges of it that are left."""

    part: LeafRange
    layer_report: LayerReport
    left: tuple[LeafRange, ...] = ()


class VerifyWork:
    """Does tasks of verifying. Opens layers for each task, and keeps manifests between tasks.

    ``sample``: what to read; None = everything.
    """

    def __init__(self, access: Access, sample: Sample | None = None) -> None:
        self.access = access
        self.sample = sample
        #: The process that does the current task.
        self._worker = WorkerContext()
        self.buffer = new_buffer()
        self.manifests = ManifestCache()
        self._accesses: dict[str, Access] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return (VerifyWork, (self.access, self.sample))

    def __call__(self, task: Task, worker: WorkerContext) -> list[Verified]:
        """The results for the parts of a :class:`VerifyTask` that were begun, in order."""
        assert isinstance(task, VerifyTask)  # noqa: S101 - the only tasks of this work
        self._worker, rate = worker, worker.throttle.rate
        # With a limit, a task takes about a second: a crash costs no more.
        most = GROUPS_PER_TASK * FAN
        allowance = min(most, max(1, rate // LEAF)) if rate else most
        results = list[Verified]()
        for part, target in zip(task.parts, task.targets, strict=True):
            if allowance > 0 and not worker.must_stop():
                one = _PartVerification(self, part, target, allowance)
                results.append(one.result())
                allowance -= one.leaves
        return results

    @property
    def step(self) -> int:
        """Leaves that are compared at once; a stop waits for them."""
        rate = self._worker.throttle.rate
        return min(FAN, max(1, rate // LEAF // STEPS_PER_SECOND)) if rate else FAN

    def spend(self, length: int) -> None:
        """Count bytes that were read. Raises :class:`StoppedError` when the job is stopped."""
        self._worker.spend(length, "")

    def check_stop(self) -> None:
        """Raise :class:`StoppedError` when the job is stopped."""
        self._worker.check("")

    def access_for(self, target: LayerRef) -> Access:
        """How the layer, and the files that it names, may be opened."""
        # Only a link costs a second system call.
        is_link = target.holder is None and os.path.islink(target.path)
        base = os.path.realpath(target.path) if is_link else target.holder or target.path
        return self.access_beside(base)

    def access_beside(self, base: str) -> Access:
        """How names that are relative to ``base`` may be opened."""
        directory = os.path.dirname(base)
        if directory not in self._accesses:
            self._accesses[directory] = self.access.beside(base)
        return self._accesses[directory]


class _PartVerification:
    """Verifies at most ``allowance`` leaves of one part of a layer."""

    def __init__(self, work: VerifyWork, part: LeafRange, target: LayerRef, allowance: int) -> None:
        self._work = work
        self._part = part
        self._target = target
        self._allowance = allowance
        self._report = LayerReport(target.path)
        #: The number of leaves that were compared.
        self.leaves = 0

    def result(self) -> Verified:
        """Verify the part; the report and what is left."""
        left: tuple[LeafRange, ...] = ()
        try:
            with ExitStack() as opened:
                left = tuple(self._verified(*self._open(opened)))
        except LentError as error:
            self._add("lent", Severity.NOTE, error)
        except AddcowError as error:
            if not self._has_damaged_header():
                self._add("unexamined", Severity.UNVERIFIED, error)
        return Verified(self._part, self._report, left)

    def _add(self, name: str, severity: Severity, error: AddcowError) -> None:
        path = self._target.path
        self._report.add(name, severity, path, str(error).removeprefix(f"{path}: "))

    def _open(self, opened: ExitStack) -> tuple[Layer, Names | None]:
        """The layer without its backing file, and the names in an overlay."""
        target, work = self._target, self._work
        named = target.holder is None
        access = work.access if named else work.access_for(target)
        role = COW if target.format == ADD_COW else BACKING
        file = open_claimed(access, target.path, READING, role, named=named)
        opened.callback(file.close)
        if target.format != ADD_COW:
            return RawLayer(file), None
        access = work.access_beside(file.base) if named else access
        header = load_header(file)
        refuse_lent(file, header, changes=False)
        names = load_names(file, header)
        with errors_naming(file, names.image, "image file") as path:
            image = open_claimed(access, path, READING, IMAGE, named=False)
        opened.callback(image.close)
        return Overlay(file, image, None, header), names

    def _verified(self, layer: Layer, names: Names | None) -> Iterator[LeafRange]:
        """Compare ``layer`` with its manifest; yields what is left of the part."""
        work, report, target = self._work, self._report, self._target
        manifest = find_manifest(layer.path, target.format, work.manifests.manifest, report)
        if manifest is None:
            return
        same = has_same_files(layer, manifest, report)
        head_at = partial(work.manifests.head, access=work.access_for(target))
        compare_backing(layer, names, manifest, head_at, report)
        if not same:
            return
        leaves = LeafComparison(layer, manifest, work.sample, work.spend, work.buffer)
        leaves.has_sound_bits = has_same_bitmap(layer, manifest.head, work.buffer, report)
        numbers = leaves.groups(self._part.first, self._part.stop)
        try:
            groups, position = self._compare(leaves, numbers)
        finally:
            leaves.add_to(report)
        if not leaves.has_sound_bits and any(
            manifest.group(one).mixed.any() for one in manifest.records
        ):
            message = "leaves that mix layers were not verified, because the bitmap differs"
            report.add("mixed", Severity.UNVERIFIED, layer.path, message)
        yield from self._rest(numbers[groups:], position)

    def _rest(self, numbers: list[int], position: int) -> Iterator[LeafRange]:
        """What is left from ``position`` on, cut so that other processes can take parts of it."""
        if numbers:
            first = max(position, self._part.first, numbers[0] * FAN)
            cuts = (number * FAN for number in numbers[GROUPS_PER_TASK::GROUPS_PER_TASK])
            for span in pairwise((first, *cuts, self._part.stop)):
                yield LeafRange(self._part.index, *span)

    def _compare(self, leaves: LeafComparison, numbers: list[int]) -> tuple[int, int]:
        """Compare groups as far as allowed; how many are finished, and the next leaf."""
        position = self._part.first
        for done, number in enumerate(numbers):
            start = max(self._part.first, number * FAN)
            stop = min(self._part.stop, (number + 1) * FAN)
            for first, last in leaves.steps(number, start, stop, self._work.step):
                if self.leaves >= self._allowance:
                    return done, position
                try:
                    self._work.check_stop()
                    leaves.compare(number, first, last)
                except StoppedError:
                    return done, position
                self.leaves += min(self._work.step, last - first)
                position = last
        return len(numbers), position

    def _has_damaged_header(self) -> bool:
        """Whether the layer is an overlay that cannot be opened because its header was changed."""
        if self._target.format != ADD_COW:
            return False
        try:
            head = self._work.manifests.manifest(self._target.path).head
            access = self._work.access_for(self._target)
            opener = access.open_named if self._target.holder is None else access.open_beneath
            with closing(opener(self._target.path)) as cow:
                return report_damaged_header(cow, head, self._report)
        except (AddcowError, OSError):
            return False
