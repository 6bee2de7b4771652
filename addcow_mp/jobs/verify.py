"""Verify: hold what layers are now against what their manifests say that they were.

Each layer is looked at by itself, so that a difference has a file and a place in it. First comes
what costs nothing: whether there is a manifest at all and it is whole; whether the files are the
same ones, of the same size, unchanged since; whether what lies below is what lay below then. A
file that was replaced is not read. Then header and bitmap, then leaf by leaf what the layer holds.

The manifest says which leaves are the layer's own: a bitmap that was damaged can neither hide data
nor accuse sound data. Only leaves that mix layers need the bits; where those are wrong, these
leaves remain unverified.

Times alone accuse nobody: a file that was written since holds other bytes in some leaf, and that
is found; one that was only touched does not. Layers with much data are cut, small ones dealt out
whole, and each is opened by whoever looks at it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count, groupby, pairwise

from bitarray import bitarray

from addcow_mp.device.access import Access
from addcow_mp.device.files import BACKING, COW, IMAGE, File
from addcow_mp.device.headers import (
    MAX_DEPTH,
    load_header,
    load_names,
    open_claimed,
    resolve,
    telling,
)
from addcow_mp.device.layer import Layer
from addcow_mp.device.locks import READING
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.raw import RawLayer
from addcow_mp.device.sidecar import manifest_of
from addcow_mp.engine.leaves import Hasher, file_of
from addcow_mp.engine.plan import Task
from addcow_mp.engine.pool import Done, Failed, Part, Pool, usable_cpus
from addcow_mp.errors import AddcowError, BeginsAnewError, ManifestError
from addcow_mp.format.bits import Run, merged, runs
from addcow_mp.format.header import ADD_COW
from addcow_mp.format.manifest import (
    DIGEST,
    FAN,
    GROUP,
    LEAF,
    FileState,
    Manifest,
    digest,
)
from addcow_mp.jobs.manifest import cow_digests
from addcow_mp.jobs.report import Conduct
from addcow_mp.units import EiB, MiB

#: Groups with something in them for one task, 256 MiB: so a large layer is shared out evenly.
PART = 256 * MiB // GROUP

#: A number behind all groups.
END = EiB // GROUP * 16


class Grade(Enum):
    """What a remark means."""

    NOTE = "note"
    UNVERIFIED = "unverified"
    DAMAGE = "damage"


@dataclass(frozen=True)
class Remark:
    """What was noticed about a file, beside ranges of it that differ."""

    name: str
    grade: Grade
    file: str
    message: str


@dataclass(frozen=True)
class Range:
    """Bytes ``[start, start + length)`` of ``file`` that are not what they were."""

    file: str
    start: int
    length: int


@dataclass
class Verdict:
    """What was found about one layer, and how many bytes of it were compared."""

    path: str
    ranges: list[Range] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    bytes_read: int = 0
    #: Where further parts of a large layer begin, in groups.
    cuts: tuple[int, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 as it was, 1 not verified, 2 different."""
        grades = {remark.grade for remark in self.remarks}
        if self.ranges or Grade.DAMAGE in grades:
            return 2
        return 1 if Grade.UNVERIFIED in grades else 0

    def join(self, other: Verdict) -> None:
        """Add what was found in another part of the same layer."""
        self.ranges = list(joined({*self.ranges, *other.ranges}))
        self.remarks += [one for one in other.remarks if one not in self.remarks]
        self.bytes_read += other.bytes_read


def joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """``ranges`` in order of files and places, those that touch as one."""
    for file, group in groupby(sorted(ranges, key=_place), key=lambda one: one.file):
        spans = merged((one.start, one.start + one.length) for one in group)
        yield from (Range(file, start, stop - start) for start, stop in spans)


def _place(one: Range) -> tuple[str, int]:
    return one.file, one.start


@dataclass(frozen=True)
class Target:
    """A layer to be verified: an overlay or a raw file, and ``holder``, the overlay that names it.

    Without a holder, the user named it.
    """

    path: str
    format: str = ADD_COW
    holder: str | None = None


def verify(path: str, conduct: Conduct | None = None, *, format_: str = ADD_COW) -> list[Verdict]:
    """Verify every layer of the chain of ``path``, from the top down.

    Raises :class:`AddcowError` when that file cannot be opened, and :class:`BeginsAnewError` when
    ``conduct`` stops it.
    """
    conduct = conduct or Conduct()
    conduct.access.open_named(path).close()
    access = conduct.access.beside(path)
    return verify_all(list(chain_of(path, format_, access)), replace(conduct, access=access))


def chain_of(path: str, format_: str, access: Access) -> Iterator[Target]:
    """The layers of a chain as far down as sound headers lead; what is damaged is the last."""
    holder: str | None = None
    for _ in range(MAX_DEPTH):
        yield Target(path, format_, holder)
        below = _below(path, access, named=holder is None) if format_ == ADD_COW else None
        if below is None:
            return
        holder, (path, format_) = path, below


def _below(path: str, access: Access, *, named: bool) -> tuple[str, str] | None:
    """Path and format of the backing file of an overlay; None without one that counts."""
    try:
        with closing(access.open_named(path) if named else access.open_beneath(path)) as cow:
            header = load_header(cow)
            names = load_names(cow, header)
            if header.all_allocated or names.backing is None or names.backing_format is None:
                return None
            return resolve(path, names.backing), names.backing_format
    except AddcowError:
        return None


def verify_all(targets: list[Target], conduct: Conduct) -> list[Verdict]:
    """Verify many layers with one pool, each by itself; verdicts are in their order.

    Raises :class:`BeginsAnewError` when ``conduct`` stops it.
    """
    verdicts = [Verdict(target.path) for target in targets]
    numbers = count()
    tasks = [_Part(next(numbers), 0, END, 1, index) for index in range(len(targets))]
    done, total = 0, len(tasks)
    jobs = usable_cpus() if conduct.jobs is None else conduct.jobs
    part = Part.NONE if conduct.manner.idle else Part.FIRST
    work = _Looking(targets, conduct.access)
    with Pool(work, jobs, idle=conduct.manner.idle, part=part) as pool:
        for result in pool.run(tasks, conduct.stopping):
            if result is None:
                continue
            done += 1
            index = result.task.index  # type: ignore[attr-defined]
            looked = _outcome(result, targets[index])
            verdicts[index].join(looked)
            # A large layer says so when its first part has been looked at.
            more = pairwise((*looked.cuts, END))
            parts = [_Part(next(numbers), at, stop, 1, index) for at, stop in more]
            pool.add(parts)
            total += len(parts)
            conduct.progress(done, total)
    if done < total:
        raise BeginsAnewError(path=f"{len(targets)} layers")
    return verdicts


@dataclass(frozen=True, slots=True)
class _Part(Task):
    """The groups ``[first, stop)`` of the layer that has this ``index`` among the targets."""

    index: int


def _outcome(result: Done | Failed, target: Target) -> Verdict:
    if isinstance(result, Done):
        verdict: Verdict = result.result
        return verdict
    return Verdict(target.path, remarks=[_unexamined(target, result.error)])


def _unexamined(target: Target, error: AddcowError) -> Remark:
    return Remark("unexamined", Grade.UNVERIFIED, target.path, str(error))


class _Looking:
    """The work of a task: some groups of one layer, which is opened for it."""

    def __init__(self, targets: list[Target], access: Access) -> None:
        self.targets = targets
        self.access = access

    def __reduce__(self) -> tuple[object, ...]:
        return (_Looking, (self.targets, self.access))

    def __call__(self, task: Task, slot: int) -> Verdict:  # noqa: ARG002
        assert isinstance(task, _Part)  # noqa: S101 - what this work is given
        target = self.targets[task.index]
        verdict = Verdict(target.path)
        try:
            with ExitStack() as opened:
                layer = _opened(target, self.access, opened)
                _look(layer, verdict, task.first, task.stop)
        except AddcowError as error:
            if not _is_header_damaged(target, self.access, verdict):
                verdict.remarks.append(_unexamined(target, error))
        return verdict


def _is_header_damaged(target: Target, access: Access, verdict: Verdict) -> bool:
    """Whether an overlay that cannot be opened is so because its header was changed."""
    if target.format != ADD_COW:
        return False
    try:
        size, wanted = _header_of(Manifest.load(manifest_of(target.path)))
        access = access.beside(target.holder or target.path)
        opener = access.open_named if target.holder is None else access.open_beneath
        with closing(opener(target.path)) as cow:
            head = bytearray(min(size, cow.length))
            cow.read_into(memoryview(head), 0)
    except (AddcowError, OSError):
        return False
    if digest(head).hex() == wanted:
        return False
    verdict.ranges.append(Range(target.path, 0, len(head)))
    told = "its header is not what it was, and nothing else of it could be verified"
    verdict.remarks.append(Remark("header", Grade.DAMAGE, target.path, told))
    return True


def _header_of(manifest: Manifest) -> tuple[int, str]:
    return manifest.head.header_size or 0, manifest.head.header_digest or ""


def _opened(target: Target, access: Access, opened: ExitStack) -> Layer:
    """The layer alone, without what lies below."""
    access = access.beside(target.holder or target.path)
    named = target.holder is None
    role = COW if target.format == ADD_COW else BACKING
    file = open_claimed(access, target.path, READING, role, named=named)
    opened.callback(file.close)
    if target.format != ADD_COW:
        return RawLayer(file)
    names = load_names(file, load_header(file))
    with telling(target.path, names.image, "image file") as path:
        image = open_claimed(access, path, READING, IMAGE, named=False)
    opened.callback(image.close)
    return Overlay(file, image, None)


# One layer


def _look(layer: Layer, verdict: Verdict, first: int, stop: int) -> None:
    manifest = _manifest_of(layer, verdict)
    if manifest is None or not _is_same(layer, manifest, verdict):
        return
    trusted = _has_sound_bits(layer, manifest, verdict)
    hasher = Hasher(file_of(layer), layer.size)
    differing: list[int] = []
    numbers = _groups(layer, manifest, first, stop)
    if first == 0:
        verdict.cuts = tuple(numbers[PART::PART])
        numbers = numbers[:PART]
    for number in numbers:
        differing += _differing(layer, manifest, number, hasher, trusted=trusted)
    verdict.ranges += _ranges(layer, differing)
    verdict.bytes_read = hasher.bytes_read
    if not trusted and any(_mixed(manifest, number) for number in manifest.records):
        told = "leaves that mix layers were not verified: that takes the bitmap as it was"
        verdict.remarks.append(Remark("mixed", Grade.UNVERIFIED, layer.path, told))


def _manifest_of(layer: Layer, verdict: Verdict) -> Manifest | None:
    path = manifest_of(layer.path)
    try:
        return Manifest.load(path)
    except FileNotFoundError:
        told = "it has no manifest; make one with 'addcow manifest create'"
        remark = Remark("no-manifest", Grade.UNVERIFIED, layer.path, told)
    except ManifestError as error:
        remark = Remark("manifest", Grade.DAMAGE, path, error.fields["problem"])
    except OSError as error:
        remark = Remark("manifest", Grade.UNVERIFIED, path, error.strerror or str(error))
    verdict.remarks.append(remark)
    return None


def _is_same(layer: Layer, manifest: Manifest, verdict: Verdict) -> bool:
    """Whether the files are those that the manifest is about; whatever differs is remarked."""
    same = True
    for name, file in _files(layer):
        was, now = manifest.head.files.get(name), FileState.of(file.status)
        if was is None or was[:2] != now[:2]:
            told = "it was replaced: it is another file, or of another size, than its manifest says"
            verdict.remarks.append(Remark("replaced", Grade.DAMAGE, file.path, told))
            same = False
        elif was != now:
            told = "it was written or touched after its manifest was made"
            verdict.remarks.append(Remark("changed", Grade.NOTE, file.path, told))
    _compare_below(layer, manifest, verdict)
    return same


def _files(layer: Layer) -> Iterator[tuple[str, File]]:
    yield "image", file_of(layer)
    if isinstance(layer, Overlay):
        yield "cow", layer.cow


def _compare_below(layer: Layer, manifest: Manifest, verdict: Verdict) -> None:
    """Remark a backing file that has a manifest, but of other content than was below then."""
    wanted = manifest.head.backing_digest
    if not isinstance(layer, Overlay) or wanted is None:
        return
    names = load_names(layer.cow, layer.header)
    if names.backing is None:
        return
    path = resolve(layer.path, names.backing)
    try:
        found = Manifest.load(manifest_of(path)).head.guest_digest
    except (OSError, ManifestError):
        return  # that is said of the backing file itself
    if found != wanted:
        told = f"what lies below, {path}, is not what lay there when the manifest was made"
        verdict.remarks.append(Remark("backing-replaced", Grade.DAMAGE, layer.path, told))


def _has_sound_bits(layer: Layer, manifest: Manifest, verdict: Verdict) -> bool:
    """Whether header and bitmap are what they were; each that is not is a range."""
    if not isinstance(layer, Overlay):
        return True
    header, bitmap = cow_digests(layer)
    size = layer.header.header_size
    length = min(layer.cow.length - size, layer.geometry.bitmap_length)
    for name, same, start, extent in (
        ("header", header == manifest.head.header_digest, 0, size),
        ("bitmap", bitmap == manifest.head.bitmap_digest, size, length),
    ):
        if not same:
            verdict.ranges.append(Range(layer.path, start, extent))
            told = f"its {name} is not what it was"
            verdict.remarks.append(Remark(name, Grade.DAMAGE, layer.path, told))
    return bitmap == manifest.head.bitmap_digest


def _groups(layer: Layer, manifest: Manifest, first: int, stop: int) -> list[int]:
    """The groups in ``[first, stop)`` that hold something, or did."""
    numbers = {number for number in manifest.records if first <= number < stop}
    if manifest.head.all_local:
        start, end = first * GROUP, min(stop * GROUP, layer.size)
        for here, there in file_of(layer).data_runs(start, end):
            numbers.update(range(here // GROUP, -(-there // GROUP)))
    return sorted(numbers)


def _mixed(manifest: Manifest, number: int) -> bool:
    return manifest.group(number).mixed.any()


def _differing(
    layer: Layer, manifest: Manifest, number: int, hasher: Hasher, *, trusted: bool
) -> list[int]:
    """The leaves of a group that do not hold what they held."""
    was, base = manifest.group(number), number * FAN
    own = was.covered & ~was.mixed
    spans = [
        ((base + first) * LEAF, min((base + last) * LEAF, layer.size))
        for first, last in runs(own, 1, 0, FAN)
    ]
    counted = own
    if trusted and was.mixed.any():
        counted = was.covered
        spans += _parts_in(_local(layer, number), was.mixed, base)
    now = hasher.held(number, spans, was.mixed)
    if now == was.held:
        return []
    places = range(0, FAN * DIGEST, DIGEST)
    return [
        base + leaf
        for leaf, at in enumerate(places)
        if counted[leaf] and now[at : at + DIGEST] != was.held[at : at + DIGEST]
    ]


def _local(layer: Layer, number: int) -> list[Run]:
    """What the bitmap calls local in a group, whatever a damaged header says besides."""
    assert isinstance(layer, Overlay)  # noqa: S101 - nothing else mixes layers
    start, stop = number * GROUP, min((number + 1) * GROUP, layer.size)
    first, last = layer.geometry.touched(start, stop)
    return [layer.geometry.span(*run) for run in layer.bitmap.runs(1, first, last)]


def _parts_in(spans: list[Run], mixed: bitarray, base: int) -> list[Run]:
    """The parts of ``spans`` in leaves that are mixed."""
    leaves = [
        ((base + first) * LEAF, (base + last) * LEAF) for first, last in runs(mixed, 1, 0, FAN)
    ]
    return [
        (max(start, first), min(stop, last))
        for first, last in leaves
        for start, stop in spans
        if start < last and first < stop
    ]


def _ranges(layer: Layer, leaves: list[int]) -> list[Range]:
    """Whole leaves of the file, joined and clipped to it."""
    file = file_of(layer)
    parts = merged((leaf, leaf + 1) for leaf in leaves)
    spans = ((first * LEAF, min(stop * LEAF, file.length)) for first, stop in parts)
    return [Range(file.path, start, stop - start) for start, stop in spans]
