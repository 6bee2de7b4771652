"""One task of verifying: hold parts of layers against what their manifests say that they were.

Each layer is looked at by itself, so that a difference has a file and a place in it. First comes
what costs nothing: whether there is a manifest at all and it is whole; whether the files are the
same ones, of the same size, unchanged since; whether what lies below is what lay below then. A
file that was replaced is not read. Then header and bitmap, then what the layer holds
(:mod:`addcow_mp.jobs.leaf_compare`). Times alone accuse nobody: a file that was written since holds
other bytes in some leaf, and that is found; one that was only touched does not.

A task is several parts, done one after the other until so much was looked at that another process
may want the rest; what is left comes back with what was seen, also when all shall stop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.files import BACKING, COW, IMAGE, File, new_buffer
from addcow_mp.device.headers import (
    Names,
    errors_naming,
    load_header,
    load_names,
    open_claimed,
    resolve,
)
from addcow_mp.device.layer import Layer
from addcow_mp.device.locks import READING
from addcow_mp.device.manifest_file import manifest_of
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.layer_digest import cow_digests, file_of
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.throttle import STEPS_PER_SECOND
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.errors import AddcowError, ManifestError, StoppedError
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.format.manifest import (
    FAN,
    GROUP,
    LEAF,
    FileState,
    Head,
    Manifest,
    digest,
    is_rounded_down,
)
from addcow_mp.jobs.layer_report import Grade, LayerReport, Range
from addcow_mp.jobs.leaf_compare import LeafComparison, Sample
from addcow_mp.units import EiB, MiB

#: Groups with something in them for one task, 256 MiB: so a large layer is shared out evenly.
GROUPS_PER_TASK = 256 * MiB // GROUP

#: A number behind all leaves.
END = EiB // LEAF * 16


@dataclass(frozen=True)
class LayerRef:
    """A layer to be verified: an overlay or a raw file.

    ``holder``: the overlay that names it, by the path that its names are relative to. Without a
    holder, the user named it.
    """

    path: str
    format: str = ADD_COW
    holder: str | None = None


@dataclass(frozen=True, order=True, slots=True)
class LeafRange:
    """The leaves ``[first, stop)`` of the layer that has this ``index`` among the targets."""

    index: int
    first: int = 0
    stop: int = END


@dataclass(frozen=True, slots=True)
class VerifyTask(Task):
    """Some parts to be looked at one after the other, and the layer of each."""

    parts: tuple[LeafRange, ...]
    targets: tuple[LayerRef, ...]


class Verified(NamedTuple):
    """What was found in a part, and what of it was not looked at."""

    part: LeafRange
    layer_report: LayerReport
    left: tuple[LeafRange, ...] = ()


class VerifyWork:
    """The work of a task. Layers are opened for it; manifests are kept from one to the next.

    ``sample``: what to read, None = all.
    """

    def __init__(
        self,
        access: Access,
        sample: Sample | None = None,
    ) -> None:
        self.access = access
        self.sample = sample
        #: The process that does the current task.
        self._worker = WorkerContext()
        self.buffer = new_buffer()
        self._manifests = _Manifests()
        self._beside: dict[str, Access] = {}
        self._reachable: dict[tuple[str, tuple[str, ...]], bool] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return (VerifyWork, (self.access, self.sample))

    def __call__(self, task: Task, worker: WorkerContext) -> list[Verified]:
        """What was seen of the parts of a :class:`VerifyTask` that were begun, in order."""
        assert isinstance(task, VerifyTask)  # noqa: S101 - what this work is given
        self._worker = worker
        allowance, verified = self._allowance, list[Verified]()
        for part, target in zip(task.parts, task.targets, strict=True):
            if allowance > 0 and not worker.must_stop():
                look = _Look(self, part, target, allowance)
                verified.append(look.verified())
                allowance -= look.leaves
        return verified

    @property
    def _allowance(self) -> int:
        """Leaves in one task: with a limit what takes about a second, which a crash may cost."""
        rate, most = self._worker.throttle.rate, GROUPS_PER_TASK * FAN
        return min(most, max(1, rate // LEAF)) if rate else most

    @property
    def step(self) -> int:
        """Leaves that are compared at once, which a stop may cost."""
        rate = self._worker.throttle.rate
        return min(FAN, max(1, rate // LEAF // STEPS_PER_SECOND)) if rate else FAN

    def spend(self, length: int) -> None:
        """Take note of bytes that were read. Raises :class:`StoppedError` when all shall stop."""
        self._worker.spend(length, "")

    def look_up(self) -> None:
        """See whether to go on. Raises :class:`StoppedError`."""
        self._worker.check("")

    def access_for(self, target: LayerRef) -> Access:
        """How the layer may be opened, and what it names."""
        return self.access_beside(target.holder or _base(target.path))

    def access_beside(self, base: str) -> Access:
        """What names that are relative to ``base`` may open."""
        directory = os.path.dirname(base)
        if directory not in self._beside:
            self._beside[directory] = self.access.beside(base)
        return self._beside[directory]

    def manifest(self, path: str) -> Manifest:
        """That of the layer at ``path``. Raises like :meth:`Manifest.load`."""
        return self._manifests.of(path)

    def head(self, path: str, holder: LayerRef) -> Head | None:
        """The head of the manifest of the layer at ``path``; None without one.

        Nor is there one for ``holder`` when what it names lies where names may not lead.
        """
        access = self.access_for(holder)
        if (path, access.roots) not in self._reachable:
            self._reachable[path, access.roots] = can_reach(path, access)
        return self._manifests.head(path) if self._reachable[path, access.roots] else None


class _Manifests:
    """Manifests that were read and found whole: a large one is needed for each part of its layer.

    One is kept whole, and of each, as the backing file of others, the head.
    """

    def __init__(self) -> None:
        self._last: tuple[str, FileState, Manifest] | None = None
        self._heads: dict[str, tuple[FileState, Head]] = {}

    def of(self, path: str) -> Manifest:
        name = manifest_of(path)
        state = FileState.of(os.stat(name))
        if self._last is None or self._last[:2] != (name, state):
            self._last = name, state, Manifest.load(name)
        return self._last[2]

    def head(self, path: str) -> Head | None:
        name = manifest_of(path)
        try:
            state = FileState.of(os.stat(name))
            if self._heads.get(name, (None,))[0] != state:
                self._heads[name] = state, Manifest.load(name).head
        except (OSError, ManifestError):
            return None  # that is said of the layer itself
        return self._heads[name][1]


class _Look:
    """One look at one part of a layer, at no more than ``allowance`` leaves of it."""

    def __init__(self, work: VerifyWork, part: LeafRange, target: LayerRef, allowance: int) -> None:
        self.work = work
        self.part = part
        self.target = target
        self.allowance = allowance
        self.layer_report = LayerReport(self.target.path)
        #: Leaves and groups that were looked at.
        self.leaves = 0
        self.groups = 0
        #: What an overlay names.
        self.names: Names | None = None

    def verified(self) -> Verified:
        """Look, and say what there was to see."""
        left: tuple[LeafRange, ...] = ()
        try:
            with ExitStack() as opened:
                left = tuple(self._left(self._opened(opened)))
        except AddcowError as error:
            if not self._is_header_damaged():
                path, told = self.target.path, str(error)
                told = told.removeprefix(f"{path}: ")
                self.layer_report.remark("unexamined", Grade.UNVERIFIED, path, told)
        return Verified(self.part, self.layer_report, left)

    def _opened(self, opened: ExitStack) -> Layer:
        """The layer alone, without what lies below."""
        target = self.target
        named = target.holder is None
        access = self.work.access if named else self.work.access_for(target)
        role = COW if target.format == ADD_COW else BACKING
        file = open_claimed(access, target.path, READING, role, named=named)
        opened.callback(file.close)
        if target.format != ADD_COW:
            return RawLayer(file)
        access = self.work.access_beside(file.base) if named else access
        header = load_header(file)
        self.names = load_names(file, header)
        with errors_naming(file, self.names.image, "image file") as path:
            image = open_claimed(access, path, READING, IMAGE, named=False)
        opened.callback(image.close)
        return Overlay(file, image, None, header)

    def _left(self, layer: Layer) -> Iterator[LeafRange]:
        """Look at ``layer`` as far as allowed, and say what is left of the part."""
        manifest = self._manifest(layer)
        if manifest is None or not self._is_same(layer, manifest):
            return
        leaves = LeafComparison(
            layer, manifest, self.work.sample, self.work.spend, self.work.buffer
        )
        leaves.trusted = self._has_sound_bits(layer, manifest)
        numbers = leaves.groups(self.part.first, self.part.stop)
        try:
            position = self._compared(leaves, numbers)
        finally:
            self._note(leaves)
        if not leaves.trusted and any(manifest.group(one).mixed.any() for one in manifest.records):
            told = "leaves that mix layers were not verified: that takes the bitmap as it was"
            self.layer_report.remark("mixed", Grade.UNVERIFIED, layer.path, told)
        if left := numbers[self.groups :]:
            # From the group in which it stopped on, then what others may take.
            first = max(position, self.part.first, left[0] * FAN)
            cuts = [
                first,
                *(number * FAN for number in left[GROUPS_PER_TASK::GROUPS_PER_TASK]),
                self.part.stop,
            ]
            yield from (LeafRange(self.part.index, *span) for span in pairwise(cuts))

    def _note(self, leaves: LeafComparison) -> None:
        self.layer_report.ranges += leaves.ranges()
        self.layer_report.bytes_read = leaves.bytes_compared
        for place, told in leaves.unreadable():
            self.layer_report.remark("unreadable", Grade.UNVERIFIED, place.file, told)

    def _compared(self, leaves: LeafComparison, numbers: list[int]) -> int:
        """Compare the leaves of groups as far as allowed; the leaf behind the last one."""
        position = self.part.first
        for number in numbers:
            start = max(self.part.first, number * FAN)
            stop = min(self.part.stop, (number + 1) * FAN)
            for first, last in leaves.steps(number, start, stop, self.work.step):
                if self.leaves >= self.allowance:
                    return position
                try:
                    self.work.look_up()
                    leaves.compare(number, first, last)
                except StoppedError:
                    return position
                self.leaves += min(self.work.step, last - first)
                position = last
            self.groups += 1
        return position

    # What costs nothing

    def _manifest(self, layer: Layer) -> Manifest | None:
        path = manifest_of(layer.path)
        try:
            return self.work.manifest(layer.path)
        except FileNotFoundError:
            form = "" if self.target.format == ADD_COW else " -f raw"
            told = f"it has no manifest; make one with 'addcow manifest create{form}'"
            self.layer_report.remark("no-manifest", Grade.UNVERIFIED, layer.path, told)
        except ManifestError as error:
            self.layer_report.remark("manifest", Grade.DAMAGE, path, error.fields["problem"])
        except OSError as error:
            told = error.strerror or str(error)
            self.layer_report.remark("manifest", Grade.UNVERIFIED, path, told)
        return None

    def _is_same(self, layer: Layer, manifest: Manifest) -> bool:
        """Whether the files are those that the manifest is about; what differs is remarked."""
        same = True
        for name, file in _files(layer):
            was, now = manifest.head.files.get(name), FileState.of(file.status)
            if was is None or was[:2] != now[:2]:
                told = "it was replaced: it is another file, or of another size, than its "
                self.layer_report.remark(
                    "replaced", Grade.DAMAGE, file.path, f"{told}manifest says"
                )
                same = False
            elif was != now:
                told = "it was written or touched after its manifest was made"
                self.layer_report.remark("changed", Grade.NOTE, file.path, told)
        if same and (manifest.head.kind, manifest.head.virtual_size) != _kind_of(layer):
            self._remark_other_size(layer, manifest)
            same = False
        self._compare_below(layer, manifest)
        return same

    def _remark_other_size(self, layer: Layer, manifest: Manifest) -> None:
        if isinstance(layer, RawLayer) and is_rounded_down(manifest.head.virtual_size, layer.held):
            told = (
                "it was made without the last, partial sector of the file, which is part of the "
                "disk; make it again with 'addcow manifest create --replace'"
            )
            self.layer_report.remark("stale", Grade.UNVERIFIED, manifest.path, told)
            return
        told = "it is of a layer of another format or size"
        self.layer_report.remark("manifest", Grade.DAMAGE, manifest.path, told)

    def _compare_below(self, layer: Layer, manifest: Manifest) -> None:
        """Remark a backing file that has a manifest, but of other content than was below then."""
        wanted = manifest.head.backing_digest
        if not isinstance(layer, Overlay) or wanted is None:
            return
        if self.names is None or self.names.backing is None:
            return
        path = resolve(layer.cow, self.names.backing)
        found = self.work.head(path, self.target)
        if found is None or found.guest_digest == wanted:
            return
        if found.kind == RAW and is_rounded_down(
            manifest.head.backing_size or 0, found.files["image"].size
        ):
            told = (
                f"it was made without the last, partial sector of {path}, which is part of that "
                "disk; make it again with 'addcow manifest create --replace'"
            )
            self.layer_report.remark("stale", Grade.UNVERIFIED, manifest.path, told)
            return
        told = f"what lies below, {path}, is not what lay there when the manifest was made"
        self.layer_report.remark("backing-replaced", Grade.DAMAGE, layer.path, told)

    def _has_sound_bits(self, layer: Layer, manifest: Manifest) -> bool:
        """Whether the bitmap is what it was; header and bitmap that are not are ranges."""
        if not isinstance(layer, Overlay):
            return True
        header, bitmap = cow_digests(layer, self.work.buffer)
        size = layer.header.header_size
        length = min(layer.cow.length - size, layer.geometry.bitmap_length)
        for name, same, start, extent in (
            ("header", header == manifest.head.header_digest, 0, size),
            ("bitmap", bitmap == manifest.head.bitmap_digest, size, length),
        ):
            if not same:
                self.layer_report.ranges.append(Range(layer.path, start, extent))
                told = f"its {name} is not what it was"
                self.layer_report.remark(name, Grade.DAMAGE, layer.path, told)
        return bitmap == manifest.head.bitmap_digest

    def _is_header_damaged(self) -> bool:
        """Whether an overlay that cannot be opened is so because its header was changed."""
        if self.target.format != ADD_COW:
            return False
        try:
            head = self.work.manifest(self.target.path).head
            with closing(_opened_cow(self.target, self.work.access_for(self.target))) as cow:
                found = bytearray(min(head.header_size or 0, cow.length))
                cow.read_into(memoryview(found), 0)
        except (AddcowError, OSError):
            return False
        if head.header_digest is None or digest(found).hex() == head.header_digest:
            return False
        if found:
            self.layer_report.ranges.append(Range(self.target.path, 0, len(found)))
        told = "its header is not what it was, and nothing else of it could be verified"
        self.layer_report.remark("header", Grade.DAMAGE, self.target.path, told)
        return True


def _base(path: str) -> str:
    """What the names of the file at ``path`` are relative to; only a link costs a second look."""
    return os.path.realpath(path) if os.path.islink(path) else path


def can_reach(path: str, access: Access) -> bool:
    """Whether a name in an image may lead to ``path``, and it can be opened."""
    try:
        access.open_beneath(path).close()
    except AddcowError:
        return False
    return True


def _opened_cow(target: LayerRef, access: Access) -> File:
    opener = access.open_named if target.holder is None else access.open_beneath
    return opener(target.path)


def _kind_of(layer: Layer) -> tuple[str, int]:
    """Format and virtual size."""
    return (ADD_COW if isinstance(layer, Overlay) else RAW), layer.size


def _files(layer: Layer) -> Iterator[tuple[str, File]]:
    yield "image", file_of(layer)
    if isinstance(layer, Overlay):
        yield "cow", layer.cow
